"""A file's tensors as NumPy arrays, so that reports need not import torch.

An `Array` replaces a torch tensor: it has the tensor's shape, dtype and values. The methods that reports of
usual files call are computed with NumPy. Every other method, operator and torch function converts the array to a
tensor, which imports torch. The same code therefore reads a file with or without torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from veneer.files.safetensors import BITS, STORED_DTYPES, HeaderEntry, map_file

if TYPE_CHECKING:
    import mmap

    from torch import Tensor


class _Dtype(str):
    """The name of a torch dtype, such as "torch.bfloat16". It compares equal to the dtype itself."""

    __slots__ = ("itemsize",)
    itemsize: int

    def __new__(cls, kind: str) -> _Dtype:
        dtype = super().__new__(cls, f"torch.{STORED_DTYPES[kind]}")
        dtype.itemsize = BITS[kind] // 8
        return dtype

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    __hash__ = str.__hash__


_DTYPES = {kind: _Dtype(kind) for kind in STORED_DTYPES}


class Array:
    """A NumPy array with the interface of a torch tensor.

    stored: the values; for dtypes that NumPy lacks (bfloat16 and 8-bit floats), their bits as integers."""

    def __init__(self, stored: np.ndarray[Any, Any], dtype: _Dtype) -> None:
        self.stored, self.dtype, self.shape, self.ndim = stored, dtype, stored.shape, stored.ndim

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*_as_tensors(args), **(kwargs or {}))

    def tensor(self) -> Tensor:
        """Return the torch tensor. Imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.from_numpy(self.stored).view(dtype)

    def values(self) -> np.ndarray[Any, Any]:
        """Return the values in a dtype that NumPy has. Imports torch for 8-bit floats."""
        if self.dtype == _DTYPES["BF16"]:
            return (self.stored.astype(np.uint32) << 16).view(np.float32)
        if self.is_floating_point() and self.dtype.itemsize == 1:
            return cast("np.ndarray[Any, Any]", self.tensor().float().numpy())
        return self.stored

    def tobytes(self) -> bytes:
        return self.stored.tobytes()

    def nonfinite(self) -> int:
        """Return the number of NaN and infinite values."""
        return int(np.count_nonzero(~np.isfinite(self.values())))

    def _like(self, stored: np.ndarray[Any, Any]) -> Array:
        return Array(stored, self.dtype)

    # -- methods of torch.Tensor

    def __getitem__(self, at: Any) -> Array:
        return self._like(self.stored[at])

    def __float__(self) -> float:
        return float(self.values().item())

    def _computed(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        """Return function(self, other), with numpy in float64. In other dtypes, torch rounds in its own way."""
        is_wide = self.dtype == getattr(other, "dtype", self.dtype) == _DTYPES["F64"]
        if is_wide and isinstance(other, Array | float):
            return self._like(function(self.stored, getattr(other, "stored", other)))
        return function(self.tensor(), _as_tensors(other))

    def __matmul__(self, other: Any) -> Any:
        return self._computed(operator.matmul, other)

    def __mul__(self, other: Any) -> Any:
        return self._computed(operator.mul, other)

    @property
    def mT(self) -> Array:
        return self._like(self.stored.swapaxes(-1, -2))

    def detach(self) -> Array:
        return self

    def reshape(self, *shape: Any) -> Array:
        return self._like(self.stored.reshape(*shape))

    def flatten(self, start: int = 0) -> Array:
        return self.reshape(*self.shape[:start], -1)

    def double(self) -> Array:
        return Array(self.values().astype(np.float64), _DTYPES["F64"])

    def sum(self) -> Any:
        return self._like(np.asarray(self.stored.sum())) if self.dtype == _DTYPES["F64"] else self.tensor().sum()

    def any(self) -> bool:
        return bool(self.values().any())

    def numel(self) -> int:
        return self.stored.size

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return "float" in self.dtype

    def is_complex(self) -> bool:
        return "complex" in self.dtype


def _by_torch(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*_as_tensors(others))


# Python looks these methods up in the class, so `__getattr__` does not find them.
for _name in ("add", "radd", "sub", "rsub", "rmul", "truediv", "neg", "eq", "ne", "lt", "gt", "bool", "len"):
    setattr(Array, f"__{_name}__", _by_torch(f"__{_name}__"))


def _as_tensors(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(map(_as_tensors, tree))
    return tree.tensor() if isinstance(tree, Array) else tree


def read_arrays(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `files.safetensors.read_tensors` returns, with arrays in place of tensors.

    Raises the errors of `read_header`."""
    header, mapped = map_file(path)
    arrays = {name: _array(mapped, header.data_start, entry) for name, entry in sorted(header.entries.items())}
    return cast("dict[str, Tensor]", arrays), header.metadata


def _array(mapped: mmap.mmap, data_start: int, entry: HeaderEntry) -> Array:
    name = STORED_DTYPES[entry.kind]
    dtype = np.dtype(f"uint{BITS[entry.kind]}" if name.startswith(("bfloat", "float8")) else name)
    if entry.begin == entry.end:
        return Array(np.empty(entry.shape, dtype), _DTYPES[entry.kind])
    flat = np.frombuffer(mapped, dtype, math.prod(entry.shape), data_start + entry.begin)
    flat = flat if flat.flags.aligned else flat.copy()
    return Array(flat.reshape(entry.shape), _DTYPES[entry.kind])
