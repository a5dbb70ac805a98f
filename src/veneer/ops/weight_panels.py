"""Weights in panels of 64 rows each, the layout that ops/cpu/decoder.c reads.

Panels store bfloat16 or codes. Codes are converted to bfloat16 a few at a time, in the first-level cache,
once for all rows of a step, so that a step reads only the codes from memory. The values are the dequantized
values, rounded once to bfloat16. With int8 codes and one scale per row, the codes are multiplied exactly, and
the sum is multiplied by the scale.

Two kernels multiply by panels: one uses AVX-512, the other AMX tiles. They sum in different orders, so a
weight uses the same kernel for any number of rows, and a row's bits do not depend on other rows. The op
"panel_linear" chooses the kernel, according to the machine's profile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.cpu import compiled
from veneer.ops.dispatch import dispatch
from veneer.ops.quantization_formats import Groups, QuantizationFormat, Rows8
from veneer.ops.quantized import Quantized

_WIDTH = 64
"""Number of rows of W per panel."""
GROUP = 32
"""Number of inputs that share a scale and a zero in `Panels.int4`."""
_DENSE, _ROWS8, _EIGHT, _FOUR = range(4)
_ONE, _TWO, _PAIR = range(3)
_TILES = "amx_panel_product"
_SIZES = (8, 16, 32, 64)
"""Group sizes that decoder.c supports. The kinds and constants above are numbered as in decoder.c."""


@dataclass(frozen=True, eq=False)
class Panels:
    """W (out, in) in panels of a kind defined in decoder.c.

    `size` inputs share a scale; `constants` is the layout of scales and zeros, as defined in decoder.c. The
    last panel is padded with zero rows.

    codes: (⌈out/64⌉, in/2, 64, 2) bfloat16 or int8; (⌈out/64⌉, in/4, 256) int8 if there is one scale per row;
        (⌈out/64⌉, in/8, 4, 16, 4) uint8 for 4 bits.
    kernel: name of the kernel that multiplies by the panels. A row's product does not depend on other
        rows."""

    out: int
    kind: int
    codes: Tensor
    scales: Tensor | None = None
    size: int = 0
    constants: int = _ONE
    table: Tensor | None = None
    kernel: str = "panel_product"

    @classmethod
    def from_weight(cls, weight: Tensor) -> Panels:
        """Return a weight in bfloat16 panels.

        Raises ValueError unless `out` is a multiple of 16 and `in` is even."""
        return cls(len(weight), _DENSE, _panels(weight), kernel=_kernel(16))

    @classmethod
    def int8(cls, weight: Tensor) -> Panels:
        """Return panels of W quantized to int8: W ≈ scale ⊙ q.

        See `quantize_int8`. Raises the errors of `from_weight`."""
        q, scale = quantize_int8(weight)
        return cls.of_groups(Groups(q, scale.float()[:, None]))

    @classmethod
    def int4(cls, weight: Tensor) -> Panels:
        """Return panels of W quantized to 4 bits: W ≈ scale·(q - 8) + zero.

        Raises the same errors as `quantize_int4`, which defines q, scale and zero."""
        q, scales = quantize_int4(weight)
        return cls.of_groups(Groups(q, scales[..., 0], scales[..., 1], torch.arange(-8.0, 8.0)))

    @classmethod
    def of_groups(cls, groups: Groups) -> Panels:
        """Return a quantized weight in panels.

        Raises ValueError if panels do not support its codes."""
        rows, columns = groups.codes.shape
        by_row = groups.values is None and groups.zeros is None and groups.size == columns
        if by_row and int(groups.codes.min()) > -128:
            scales = _constants(groups.scales).flatten()
            return cls(rows, _ROWS8, _pack_rows8(groups.codes), scales, table=_bytes_of_bf16(), kernel=_kernel(8))
        if groups.size % 8:
            raise ValueError(f"{groups.size} inputs per scale are not supported")
        groups = groups.split(next(size for size in _SIZES[::-1] if not groups.size % size))
        kind, codes = (_EIGHT, _panels(groups.codes)) if groups.values is None else (_FOUR, _pack_int4(groups.codes))
        scales, constants = _constants(groups.scales), _ONE
        if groups.zeros is not None:
            pair = groups.scales.dtype == torch.bfloat16 == groups.zeros.dtype
            constants = _PAIR if pair else _TWO
            scales = torch.stack([scales, _constants(groups.zeros)], 3 if pair else 2)
        scales = scales if constants == _PAIR else scales.float()
        kernel = _kernel(8 if kind == _EIGHT else 4)
        return cls(rows, kind, codes, scales.contiguous(), groups.size, constants, groups.values, kernel)

    @cached_property
    def pointers(self) -> Tensor:
        """Return the kind, sizes and addresses that form decoder.c's `matrix` struct."""
        addresses = [0 if t is None else t.data_ptr() for t in (self.codes, self.scales, self.table)]
        return torch.tensor([self.kind, self.size, self.constants, int(self.kernel == _TILES), *addresses])

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * {_FOUR: 8, _ROWS8: 4}.get(self.kind, 2)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales) if t is not None)

    def groups(self, first: int, last: int) -> Groups:
        """Return rows first … last as Groups; not supported for bfloat16."""
        assert self.scales is not None
        panels = slice(first // _WIDTH, -(-last // _WIDTH))
        selected = slice(first % _WIDTH, first % _WIDTH + last - first)
        unpack = {_FOUR: _of_halves, _ROWS8: _of_fours}.get(self.kind, _rows)
        codes = unpack(self.codes[panels])[selected]
        if self.kind == _ROWS8:
            return Groups(codes, self.scales[first:last, None])
        scales = self.scales[panels]
        if self.constants == _ONE:
            return Groups(codes, _by_row(scales)[selected], None, self.table)
        scale, zero = scales.unbind(3 if self.constants == _PAIR else 2)
        return Groups(codes, _by_row(scale)[selected], _by_row(zero)[selected], self.table)

    def dense(self) -> Tensor:
        """Return the weight (out, in) in bfloat16."""
        if self.kind == _DENSE:
            return _rows(self.codes)[: self.out]
        return self.groups(0, self.out).dense().bfloat16()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.new_empty(len(x), self.out)
        self._into(y, x, bias, onto=False)
        return y

    def add_onto(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        self._into(y, x, bias, onto=True)

    def _into(self, y: Tensor, x: Tensor, bias: Tensor | None, onto: bool) -> None:
        library = compiled.usable(self.kernel, x, y)
        assert library is not None
        at = (None if t is None else t.data_ptr() for t in (self.pointers, bias, y))
        getattr(library, self.kernel)(x.data_ptr(), *x.shape, *at, self.out, int(onto), torch.get_num_threads())


def panels_here(bits: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Return whether this machine has a kernel for panels of this many bits per weight."""
    return dispatch("panel_linear", torch.empty(0, dtype=dtype), bits) is not None


def _kernel(bits: int) -> str:
    return dispatch("panel_linear", torch.empty(0, dtype=torch.bfloat16), bits) or "panel_product"


def _padded(t: Tensor) -> Tensor:
    """Return (rows, …) padded and reshaped to (⌈rows/64⌉, 64, …)."""
    padded: Tensor = F.pad(t, (*(0, 0) * (t.ndim - 1), 0, -len(t) % _WIDTH)).unflatten(0, (-1, _WIDTH))
    return padded


def _panels(weight: Tensor) -> Tensor:
    out, n = weight.shape
    if out % 16 or n % 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be stored in panels")
    return _padded(weight).view(-1, _WIDTH, n // 2, 2).transpose(1, 2).contiguous()


def _rows(panels: Tensor) -> Tensor:
    """Return the rows of panels, including the padding rows; the inverse of `_panels`."""
    return panels.transpose(1, 2).reshape(-1, 2 * panels.shape[1])


def _pack_int4(codes: Tensor) -> Tensor:
    """Return 4-bit codes (out, in) packed in decoder.c's FOUR layout."""
    out, n = codes.shape
    if out % 16 or n % 8:
        raise ValueError(f"a weight of shape {tuple(codes.shape)} cannot be stored in 4-bit panels")
    split = _padded(codes).view(-1, 4, 2, 8, n // 8, 4, 2)  # axes: panel, 16 rows, half, row, 8 inputs, pair, input
    low, high = split.permute(0, 4, 1, 3, 6, 5, 2).unbind(-1)
    return (low | high << 4).flatten(3, 4)


def _of_halves(halves: Tensor) -> Tensor:
    """Return unpacked 4-bit codes, with the padding rows; the inverse of `_pack_int4`."""
    both: Tensor = torch.stack([halves & 15, halves >> 4], -1).unflatten(3, (8, 2))
    return both.permute(0, 2, 6, 3, 1, 5, 4).flatten(4).flatten(0, 3)


def _pack_rows8(codes: Tensor) -> Tensor:
    """Return int8 codes (out, in) packed in decoder.c's ROWS8 layout."""
    out, n = codes.shape
    if out % 16 or n % 4:
        raise ValueError(f"a weight of shape {tuple(codes.shape)} cannot be stored in 8-bit panels")
    split = _padded(codes).view(-1, 4, 4, 4, n // 4, 2, 2)  # axes: panel, 16 rows, 4 rows, row, 4 inputs, pair, input
    return split.permute(0, 4, 1, 2, 5, 3, 6).flatten(2)


def _of_fours(fours: Tensor) -> Tensor:
    """Return unpacked int8 codes, with the padding rows; the inverse of `_pack_rows8`."""
    split: Tensor = fours.unflatten(2, (4, 4, 2, 4, 2))
    return split.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(0, 3)


@functools.cache
def _bytes_of_bf16() -> Tensor:
    """Return (256,): the low bytes of the bfloat16 numbers 0 … 127, then the high bytes."""
    return torch.arange(128.0).bfloat16().view(torch.uint8).view(128, 2).t().flatten()


def _constants(t: Tensor) -> Tensor:
    """Return (out, groups) reshaped to (⌈out/64⌉, groups, 64)."""
    return _padded(t).transpose(1, 2).contiguous()


def _by_row(t: Tensor) -> Tensor:
    """Return constants with one row per weight row; the inverse of `_constants`.

    The padding rows are included."""
    return t.transpose(1, 2).flatten(0, 1)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (out, in) int8 and scale (out,), with W ≈ scale ⊙ q.

    The scale is max|row| / 127, in the weight's dtype."""
    scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(weight.dtype)
    q = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (out, in), 0 … 15, and (scale, zero) (out, in / GROUP, 2).

    W ≈ scale·(q - 8) + zero, with one scale and zero per GROUP inputs of a row: scale = (max - min)/15,
    zero = min + 8 scale. Raises ValueError unless `in` is a multiple of GROUP and `out` of 16."""
    rows, n = weight.shape
    if n % GROUP or rows % 16:
        raise ValueError(f"a weight {tuple(weight.shape)} has no int4 form")
    grouped = weight.float().view(rows, -1, GROUP)
    low, high = grouped.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype).float()
    zero = (low + 8 * scale).to(weight.dtype).float()
    q = ((grouped - zero[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15).to(torch.uint8).view(rows, n)
    return q, torch.stack([scale, zero], -1).to(weight.dtype)


@dataclass(frozen=True)
class PanelRows:
    """The weights of a quantized base, stored only as panels; a format of `Quantized`.

    The dequantized values are bit-identical to those of the original format.

    absmax: the scales of an int8 base."""

    panels: Panels
    kind: str
    absmax: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.panels.out, self.panels.columns

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.panels.codes, "scales": self.panels.scales, "absmax": self.absmax}
        return {name: t for name, t in tensors.items() if t is not None}

    def moved(self, change: Callable[[Tensor], Tensor]) -> PanelRows:
        tensors = {name: change(t) for name, t in self.tensors().items()}
        panels = replace(self.panels, codes=tensors["codes"], scales=tensors["scales"])
        return PanelRows(panels, self.kind, tensors.get("absmax"))

    def dense(self, dtype: torch.dtype, first: int, last: int, into: Tensor | None = None) -> Tensor:
        groups = self.groups(first, last)
        if self.absmax is None:
            result = groups.dense().to(dtype)
        else:
            result = Rows8(tuple(groups.codes.shape), groups.codes, self.absmax[first:last]).dense(
                dtype, 0, last - first
            )
        return result if into is None else into.copy_(result)

    def groups(self, first: int, last: int) -> Groups:
        return self.panels.groups(first, last)


def panels_of_codes(weights: Sequence[Tensor]) -> tuple[Panels, list[Quantized]] | None:
    """Return panels of a quantized base's weight matrices, and one view for each matrix.

    The matrices are concatenated along the rows. Returns None if panels do not support the weights."""
    codes = [w for w in weights if isinstance(w, Quantized) and not w.transposed and w.ndim == 2]
    if len(codes) < len(weights):
        return None
    groups = Groups.joined([w.stored.groups(w.first, w.last) for w in codes])
    if groups is None:
        return None
    try:
        panels = Panels.of_groups(groups)
    except ValueError:
        return None
    rows8 = [absmax[w.first : w.last] for w in codes if (absmax := _absmax(w.stored)) is not None]
    absmax = torch.cat(rows8) if len(rows8) == len(codes) else None
    # All parts share one format object, so that they can be joined again.
    stored = {w.stored.kind: PanelRows(panels, w.stored.kind, absmax) for w in codes}
    views, at = [], 0
    for w in codes:
        views.append(Quantized(stored[w.stored.kind], w.dtype, tuple(w.shape), at, at := at + len(w)))
    return panels, views


def _absmax(stored: QuantizationFormat) -> Tensor | None:
    return stored.absmax if isinstance(stored, Rows8 | PanelRows) else None
