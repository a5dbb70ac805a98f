"""Which tensors of a file of original weights no component took.

The file is converted once more, by diffusers' own converters, with tensors that have shapes and no numbers: each
carries the names that it came from through whatever is done to it (cut, joined, turned). Names that no weight of a
component carries at the end are left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.compat_diffusers import DIFFUSERS
from veneer.models.image.flux_file import flux_state
from veneer.models.weights import StoredTensor

__all__ = ["left_over", "some_of"]

_CLIP = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
_BARE = ("Flux2Transformer2DModel", "QwenImageTransformer2DModel")
"""Those whose prefix image_single_file takes off itself."""
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")


class _Named(Tensor):
    """A tensor on the meta device that knows the names of those it was made of."""

    names: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        made = list(_tensors(out))
        if made:
            names = frozenset().union(*(t.names for t in _tensors((args, tuple((kwargs or {}).values())))))
            for tensor in made:
                tensor.names = names
        return out


def _tensors(value: Any) -> Iterator[_Named]:
    if isinstance(value, _Named):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def left_over(table: Iterable[StoredTensor], parts: Mapping[str, Any]) -> list[str]:
    """The names of a file's tensors that are in none of these components, which were read from it."""
    state: dict[str, Tensor] = {}
    for stored in table:
        named = torch.empty(stored.shape, device="meta").as_subclass(_Named)
        named.names = frozenset([stored.name])
        state[stored.name] = named
    placed: set[str] = set()
    for part in parts.values():
        held = part.state_dict()
        own = {_plain(name): tensor.shape for name, tensor in held.items()}
        for convert in [dict] if held.keys() <= state.keys() else _converters(part):
            for name, tensor in convert(dict(state)).items():
                if isinstance(tensor, _Named) and own.get(_plain(name)) == tensor.shape:
                    placed |= tensor.names
    return [name for name in state if name not in placed]


def _plain(name: str) -> str:
    return name.removeprefix("text_model.")  # a level that one of transformers' classes of CLIP has


_SINGLE = "diffusers.loaders.single_file_utils"
Converter = Callable[[dict[str, Tensor]], Mapping[str, Any]]


def _converters(part: nn.Module) -> list[Converter]:
    """What diffusers may have used to read this component. Of text encoders, whose prefixes tell them apart, all."""
    known = DIFFUSERS("diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES")
    kind = type(part).__name__
    if kind == "FluxTransformer2DModel":
        return [flux_state]
    if kind in known:
        convert = known[kind]["checkpoint_mapping_fn"]
        prefix = "model.diffusion_model." if kind in _BARE else ""

        def converted(state: dict[str, Tensor]) -> Mapping[str, Any]:
            plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            found: Mapping[str, Any] = convert(checkpoint=plain, config=dict(part.config))  # type: ignore[arg-type]
            return found

        return [converted]
    if kind.startswith("T5"):
        return [DIFFUSERS(f"{_SINGLE}.convert_sd3_t5_checkpoint_to_diffusers")]
    ldm, open_clip = (DIFFUSERS(f"{_SINGLE}.convert_{kind}_clip_checkpoint") for kind in ("ldm", "open"))
    return [
        ldm,
        *(lambda state, p=p: ldm(state, p) for p in _CLIP),
        *(lambda state, p=p: open_clip(part, state, p) for p in _OPEN_CLIP),
    ]


def some_of(names: list[str], shown: int = 6) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
