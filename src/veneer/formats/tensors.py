"""Read the tensors of any adapter file, and check that they are finite.

This module works on files and tensors, and does not interpret the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.core.adapter import all_finite
from veneer.errors import AdapterError, bullets
from veneer.files.safetensors import PICKLE_SUFFIXES, read_tensors
from veneer.formats.arrays import Array, read_arrays

if TYPE_CHECKING:
    from torch import Tensor


def read_adapter_tensors(
    path: Path, *, from_pickle: bool = False, as_arrays: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a file by name, and the file's metadata.

    from_pickle: allow pickles.
    as_arrays: return the tensors of a safetensors file as formats.arrays.Array, without importing torch.

    Raises the errors of `read_tensors`, `read_pickle` and `check_finite`."""
    if from_pickle and path.suffix.lower() in PICKLE_SUFFIXES:
        from veneer.files.pickles import read_pickle

        tensors, metadata = read_pickle(path)
    else:
        tensors, metadata = read_arrays(path) if as_arrays else read_tensors(path)
    check_finite(tensors, where=str(path))
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Raise AdapterError for NaN or infinity.

    The error lists each affected tensor with its name, its shape and the number of NaN and infinite values."""
    bad = []
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and (count := _nonfinite(tensor)):
            bad.append(f"{name} {tuple(tensor.shape)}: {count:,} of {tensor.numel():,} values")
    if bad:
        problem = f"{len(bad)} tensor(s) hold NaN or infinity:\n{bullets(bad, None)}"
        raise AdapterError(problem, where=where, fix="the training run diverged; use an earlier checkpoint")


def _nonfinite(tensor: Tensor | Array) -> int:
    """Return the number of NaN and infinite values."""
    if isinstance(tensor, Array):
        return tensor.nonfinite()
    if all_finite(tensor):
        return 0
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return int((~wide.isfinite()).sum())
