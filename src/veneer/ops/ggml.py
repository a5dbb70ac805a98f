"""Weights in the blocks of a GGUF file: kept as they are, dequantised where they are used.

A row is a run of blocks, each with scales of its own (gguf-py's `quants` has the formulas of every type, and is the
reference). The common types are dequantised by compiled kernels, the rest by that reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.ops.cpu import compiled

__all__ = ["Ggml"]

_COMPILED = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
"""The types of ops/cpu/quantised.c, by ggml's numbers."""


@dataclass(frozen=True)
class Ggml:
    """raw: (rows, bytes of a row) uint8. `type`: ggml's name, as Q4_K."""

    type: str
    shape: tuple[int, ...]
    raw: Tensor

    @property
    def kind(self) -> str:
        return self.type

    def tensors(self) -> dict[str, Tensor]:
        return {"raw": self.raw}

    def moved(self, change: Callable[[Tensor], Tensor]) -> Ggml:
        return replace(self, raw=change(self.raw))

    def dense(self, dtype: torch.dtype, first: int, last: int) -> Tensor:
        rows = self.raw[first:last]
        library = compiled.usable("ggml_dense") if rows.device.type == "cpu" and rows.is_contiguous() else None
        if library is None or self.type not in _COMPILED or dtype not in (torch.bfloat16, torch.float32):
            return self._reference(rows).to(rows.device, dtype)
        out = torch.empty(last - first, self.shape[-1], dtype=dtype)
        library.ggml_dense(
            _COMPILED[self.type], rows.data_ptr(), rows.numel(), out.data_ptr(), int(dtype == torch.float32),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _reference(self, rows: Tensor) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(rows.cpu().numpy(), GGMLQuantizationType[self.type]))
