"""The smallest card that can train an image base, and the settings for it.

    smallest_card(base_config("flux.1-dev"), side=1024)      the card, the settings, what smaller cards lack

One image at a time; text encoders and VAE are freed once everything is cached. A card must have memory for
two phases: training, and before that the fully loaded base while images and captions are encoded. Settings
are tried in order of their cost in time; CARDS maps a memory size to a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from veneer.models.config import LOADED_BYTES
from veneer.plan.fit import shares_of_blocks, usable_memory
from veneer.plan.image import ImageCounts, ImageLoad, encoded_pixels, image_counts, image_memory
from veneer.plan.memory import FITS, dtype_bytes
from veneer.plan.tables import Device, device_named

CARDS = {
    8: "rtx-4060-8gb", 10: "rtx-3080-10gb", 12: "rtx-4070-12gb", 16: "rtx-4080-16gb", 24: "rtx-4090-24gb",
    32: "rtx-5090-32gb", 48: "rtx-a6000-48gb", 80: "h100-80gb", 141: "h200-141gb",
}  # fmt: skip
"""Gigabytes as cards are sold -> a GPU of the table with this memory."""
_LARGE = 10**9
"""Parameters from which a text encoder is quantized with the denoiser: T5-XXL and language models, not CLIP.
"""
_VAE_VALUES = 4 * 128
"""Values per pixel allocated at once to encode an image: some layers of the VAE's 128 channels at full
size; assumed."""


@dataclass(frozen=True)
class CardFit:
    """A card that fits, with the settings for it.

    settings: configuration keys with their values.
    training, loading: peak bytes of either phase, of the `room` available.
    lacking: the next smaller card, and the bytes that the most economical settings need."""

    card: int
    device: Device
    load: ImageLoad
    settings: tuple[str, ...]
    training: int
    loading: int
    room: int
    lacking: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, in gigabytes as cards are sold and in bytes."""
        smaller = None if self.lacking is None else {"card_gb": self.lacking[0], "needs_bytes": self.lacking[1]}
        return {
            "card_gb": self.card,
            "gpu": self.device.name,
            "settings": list(self.settings),
            "training_bytes": self.training,
            "loading_bytes": self.loading,
            "room_bytes": self.room,
            "next_smaller": smaller,
        }


def image_settings(load: ImageLoad) -> Iterator[tuple[ImageLoad, tuple[str, ...]]]:
    """Yield ways to train the same images in less and less memory, faster ones first.

    Each is a load with the configuration keys for it."""
    kinds = (None, "int8", "nf4")
    ways: list[tuple[str | None, bool, int]] = [(kind, again, 0) for kind in kinds for again in (False, True)]
    # quantized blocks stay on the card
    ways += [(None, True, count) for count in shares_of_blocks(load.blocks)]
    for rank in sorted({load.rank, min(load.rank, 4)}, reverse=True):
        for kind, again, count in ways:
            said = [f"base.quantize={kind}"] if kind else []
            said += ["memory.activation_checkpointing=on"] if again else []
            said += [f"memory.offload_blocks={count}"] if count else []
            said += [f"adapter.rank={rank}"] if rank != load.rank else []
            yield replace(load, rank=rank, quantize=kind, checkpointing=again, offload=count), tuple(said)


def loaded_bytes(counts: ImageCounts, config: Mapping[str, Any], load: ImageLoad) -> int:
    """Return peak bytes while the whole base is loaded and one image is encoded.

    Includes what loading requires to start, the VAE's encoder and CUDA's own memory."""
    e = dtype_bytes(load.dtype)
    each = LOADED_BYTES.get(load.quantize or "", e)
    encoders = (config.get("encoders") or {}).values()
    held: float = each * (counts.parameters + counts.buffers) + sum(n * (each if n >= _LARGE else e) for n in encoders)
    held += e * (int(config.get("vae") or 0) + _VAE_VALUES * encoded_pixels(config, load))
    return round(held) + FITS["cuda", "image"].process


def smallest_card(
    config: Mapping[str, Any], *, side: int = 1024, rank: int = 16, targets: str = "attention", before: int = 0
) -> CardFit | None:
    """Return the smallest of CARDS that trains this base on square images, or None.

    One image of `side` × `side` pixels at a time. before: source images per image (editing). config: of
    the denoiser. Raises as `image_counts`."""

    @functools.cache
    def counts(rank: int) -> ImageCounts:
        return image_counts(config, height=side, width=side, rank=rank, targets=targets, before=before)

    lacking: tuple[int, int] | None = None
    for card, name in CARDS.items():
        device = device_named(name)
        room, needed = usable_memory(device), list[int]()
        start = ImageLoad(1, side, side, rank=rank, targets=targets, before=before, blocks=len(counts(rank).blocks))
        for load, settings in image_settings(start):
            own = counts(load.rank)
            training, loading = image_memory(own, load, device).peak, loaded_bytes(own, config, load)
            if max(training, loading) <= room:
                return CardFit(card, device, load, settings, training, loading, room, lacking)
            needed.append(max(training, loading))
        lacking = card, min(needed)
    return None
