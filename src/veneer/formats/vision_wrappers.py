"""Map module names between a language model and its vision-language wrapper.

| the text model's layers        | model                                                                       |
| model.layers.N                 | a text model; Qwen2-VL before transformers 4.52                             |
| model.language_model.layers.N  | Qwen-VL, Qwen 3.5, Gemma 3 and 4, Mistral 3, … since transformers 4.52      |
| language_model.model.layers.N  | Gemma 3, Mistral 3, Llava, … before transformers 4.52; Llama 4              |

This module also maps vision towers, projectors, the head, and Mixtral's `block_sparse_moe`, which is called
`mlp` since transformers 5. Nothing is renamed if a file and a base use the same names, or if one of them has
several names for the same part; in the latter case, errors list the names that do not fit. This module uses
names only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_INNER = ("model.language_model.model.", "model.language_model.", "language_model.model.", "language_model.")
_TEXT = (*_INNER, "model.", "")
_OF_TEXT = re.compile(r"(layers\.\d+|embed_tokens(_per_layer)?|norm|per_layer_\w+)(\.|$)")
_ANY, _WHOLE = re.compile(""), re.compile(r"(\.|$)")
_PARTS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    (_TEXT, _OF_TEXT),
    (("model.visual.", "visual."), _ANY),
    (("model.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_tower.", "vision_tower."), _ANY),
    (("model.vision_model.", "vision_model."), _ANY),
    (("model.multi_modal_projector.", "multi_modal_projector."), _ANY),
    (("model.audio_tower.", "audio_tower."), _ANY),
    (("model.embed_vision.", "embed_vision."), _ANY),
    (("model.embed_audio.", "embed_audio."), _ANY),
    (("language_model.lm_head", "lm_head"), _WHOLE),
)
"""For each model part, the past and present prefixes, and a pattern for the rest of the name.

A prefix that begins with another prefix comes before the shorter prefix."""

_MIXTRAL = (re.compile(r"(layers\.\d+)\.block_sparse_moe\."), re.compile(r"(layers\.\d+)\.mlp\."))


@dataclass(frozen=True)
class Renaming:
    """A mapping between a file's module names and a base's module names.

    `rules`: (the file's prefix, the base's prefix, pattern of the rest). `mixtral`: the file uses
    block_sparse_moe for mlp. `parts`: (prefix, pattern of the rest) of the model parts in the file."""

    rules: tuple[tuple[str, str, re.Pattern[str]], ...]
    mixtral: bool = False
    parts: tuple[tuple[str, re.Pattern[str]], ...] = ()

    def concerns(self, name: str) -> bool:
        """Return whether the file's model has the part that contains the module `name`.

        `name` is a module's name in the file. A text model, for example, has no vision tower."""
        return any(_is(name, start, pattern) for start, pattern in self.parts)

    def to_base(self, name: str) -> str:
        name = _MIXTRAL[0].sub(r"\1.mlp.", name) if self.mixtral else name
        return next((new + name[len(old) :] for old, new, pattern in self.rules if _is(name, old, pattern)), name)

    def to_file(self, name: str) -> str:
        name = _MIXTRAL[1].sub(r"\1.block_sparse_moe.", name) if self.mixtral else name
        return next((old + name[len(new) :] for old, new, pattern in self.rules if _is(name, new, pattern)), name)

    def describe(self) -> str:
        renames = [f"{old or '(no prefix)'} is {new or '(no prefix)'}" for old, new, _ in self.rules]
        renames += ["block_sparse_moe is mlp"] if self.mixtral else []
        return f"names of another class of the same model, converted to the base's names: {', '.join(renames)}"


def renaming(file: Iterable[str], base: Collection[str]) -> Renaming | None:
    """Return how names in a file map to a base's names, or None if no name changes.

    file, base: names of modules or parameters."""
    file = list(file)
    rules, parts = [], []
    for starts, pattern in _PARTS if base else ():
        theirs, ours = (_start(names, starts, pattern) for names in (file, base))
        parts += [] if theirs is None else [(theirs, pattern)]
        if theirs is not None and ours is not None and theirs != ours:
            rules.append((theirs, ours, pattern))
    mixtral = any(_MIXTRAL[0].search(n) for n in file) and not any(_MIXTRAL[0].search(n) for n in base)
    mixtral = mixtral and any(".mlp.experts" in n for n in base)
    return Renaming(tuple(rules), mixtral, tuple(parts)) if rules or mixtral else None


def _is(name: str, start: str, pattern: re.Pattern[str]) -> bool:
    return name.startswith(start) and pattern.match(name, len(start)) is not None


def _start(names: Iterable[str], starts: tuple[str, ...], pattern: re.Pattern[str]) -> str | None:
    """Return the prefix that the names use; None if they use none or several."""
    present = {s for n in names if (s := next((s for s in starts if _is(n, s, pattern)), None)) is not None}
    return present.pop() if len(present) == 1 else None
