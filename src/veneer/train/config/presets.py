"""Settings for three kinds of image adapters, each value with its evidence. A preset fills what the user leaves open.

    preset: style       a look, from tens of pictures of different things
    preset: subject     one character, person or animal, from 5 to 20 pictures, without losing its class
    preset: product     one object whose shape and writing must not change

Where the evidence is a convention and no measurement, it says so. Knows keys and values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """`settings`: `section.key` -> (value, why)."""

    meaning: str
    settings: Mapping[str, tuple[Any, str]]


_RATE = (1e-4, "the rate of diffusers', sd-scripts' and ai-toolkit's own examples (convention)")
_PAIRED = "scale 1: alpha equal to the rank, as the same examples (convention)"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "style": Preset(
            "a look: tens of pictures of different things, captions that name the things and not the look",
            {
                "adapter.rank": (
                    16,
                    "rank 16 took over the look of 50 drawings on a FLUX base (project's measurement)",
                ),
                "adapter.alpha": (16.0, _PAIRED),
                "adapter.targets": (
                    "attention+ff",
                    "InstantStyle and B-LoRA (arXiv 2403.14572) find style in the transformer blocks",
                ),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (8, "a look is what different pictures share: one step should see several"),
                "schedule.steps": (
                    1500,
                    "20 to 50 pictures at batch 8; ai-toolkit's range is 500 to 4000 (convention)",
                ),
                "data.caption_dropout": (
                    0.1,
                    "classifier-free guidance needs the empty prompt (arXiv 2207.12598: 10-20%)",
                ),
                "data.flip": (True, "a look is the same in the mirror; twice the pictures"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); the average of the last 100 steps"),
            },
        ),
        "subject": Preset(
            "one character, person or animal: 5 to 20 pictures, with a trigger word and a class prompt",
            {
                "adapter.rank": (16, "diffusers' DreamBooth guides use 4 to 32 (convention)"),
                "adapter.alpha": (16.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: more steps rather than larger ones"),
                "schedule.steps": (800, "DreamBooth (arXiv 2208.12242): about 1000 steps; its guides: 800 for faces"),
                "data.class_count": (100, "DreamBooth's prior preservation; diffusers' default is 100 class pictures"),
                "data.class_weight": (1.0, "DreamBooth's λ = 1 (arXiv 2208.12242)"),
                "data.flip": (False, "faces and marks are not symmetric"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); few pictures make single steps noisy"),
            },
        ),
        "product": Preset(
            "one object whose shape, colours and writing must stay: 10 to 30 pictures, best with loss masks",
            {
                "adapter.rank": (32, "detail such as writing needs more directions than a look (convention)"),
                "adapter.alpha": (32.0, _PAIRED),
                "optimizer.learning_rate": _RATE,
                "batching.rows": (2, "few pictures: more steps rather than larger ones"),
                "schedule.steps": (1500, "as subject, longer for the finer detail (convention)"),
                "data.masks": ("auto", "with a mask the background is not learned (kohya, OneTrainer: masked loss)"),
                "data.flip": (False, "writing in the mirror is wrong"),
                "data.crop": ("center", "an object cut off at random teaches cut-off objects"),
                "ema.decay": (0.99, "ai-toolkit's value (convention); few pictures make single steps noisy"),
            },
        ),
    }
)
