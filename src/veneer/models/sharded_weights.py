"""Read the weights of a model on the meta device from their files, in shards.

    reader = ShardReader.for_model(model, table, kind, dtype)      or a string: the reason to load the entire model
    reader.part(["model.layers.0.mlp.up_proj.weight"], weight, rank, count, device)

Process r of N = `count` gets rows r·⌈n/N⌉ … (r + 1)·⌈n/N⌉ of the n rows along a tensor's first dimension,
like torch.chunk and FSDP2. Rows in safetensors are consecutive, so the shard of an unquantized weight is one
range of a file, and only this range is read.

Each weight to be quantized is read and quantized whole, because its constants depend on the whole weight.
Codes and constants are therefore equal bit for bit to those of a weight quantized without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.core.targets import base_modules
from veneer.errors import BaseError
from veneer.files.safetensors import STORED_DTYPES
from veneer.files.weights import StoredTensor, read_values
from veneer.ops.quantized import Quantized, quantize


def shard_rows(n: int, rank: int, count: int) -> tuple[int, int]:
    """Return the first row of process `rank`, and the first row after its shard.

    The last processes can have fewer rows."""
    each = -(-n // count)
    return min(rank * each, n), min((rank + 1) * each, n)


@dataclass
class ShardReader:
    """Reads the weights of a model on the meta device from their files.

    `stored`: name in the model -> stored tensor. `kind`: format for the quantized weights, or "" for none.
    `dtype`: dtype of all other float weights. `bytes_read`: bytes read by this process so far.

    The weights are read one at a time, long after the files were found. Raises BaseError if a file has
    changed in the meantime, because shards of two versions cannot be combined."""

    stored: Mapping[str, StoredTensor]
    kind: str
    dtype: torch.dtype
    bytes_read: int = 0

    def __post_init__(self) -> None:
        self._found = {t.file: _state(t.file) for t in self.stored.values()}

    @classmethod
    def for_model(
        cls, model: nn.Module, table: Sequence[StoredTensor], kind: str, dtype: torch.dtype
    ) -> ShardReader | str:
        """Return a reader of the model's weights, or the reason to load the entire model.

        The entire model must be loaded if its names or shapes differ from the files (transformers renames and
        joins the weights of some families), or if some weights must stay in float32."""
        stored = {t.name: t for t in table}
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **_saved_buffers(model)}
        for name, tensor in tensors.items():
            stored_tensor = stored.get(name)
            if stored_tensor is None:
                return f"the files have no {name}"
            if stored_tensor.shape != tuple(tensor.shape):
                return f"{name} has another shape in the files"
            if stored_tensor.dtype not in STORED_DTYPES:
                return f"{name} is stored in {stored_tensor.dtype}"
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tensors.keys()
        if both := sorted(tied & stored.keys()):
            return f"the files have {both[0]}, which the config ties to another weight"
        for names in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            if getattr(model, names, None):
                return "some weights must stay in float32"
        return cls(stored, kind, dtype)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return the given rows of a weight, in the stored dtype."""
        stored = self.stored[name]
        wide = stored.elements // stored.shape[0]
        return torch.stack([self._values(name, row * wide, (row + 1) * wide) for row in rows])

    def read_full(self, name: str, device: torch.device) -> Tensor:
        """Return a whole weight on `device`; float weights are converted to `dtype`."""
        stored = self.stored[name]
        return self._cast(self._values(name, 0, stored.elements).view(stored.shape).to(device))

    def part(self, names: Sequence[str], weight: Tensor, rank: int, count: int, device: torch.device) -> list[Tensor]:
        """Return the shard of a weight that belongs to process `rank`, on `device`.

        For a quantized weight, returns the shard of each of its tensors, in order. `names`: names of the
        weights in the files whose rows form this weight; only one name if the weight is quantized. `weight`:
        the tensor on the meta device."""
        if not isinstance(weight, Quantized):
            first, last = shard_rows(weight.shape[0], rank, count)
            wide, at, parts = weight.shape[1:].numel(), 0, []
            for source in names:
                rows = self.stored[source].shape[0]
                begin, end = max(first - at, 0), min(last - at, rows)
                if begin < end:
                    parts.append(self._values(source, begin * wide, end * wide).to(device))
                at += rows
            values = torch.cat(parts) if parts else torch.empty(0, dtype=weight.dtype, device=device)
            return [self._cast(values).view(last - first, *weight.shape[1:])]
        (name,) = names
        codes = quantize(self.read_full(name, device), self.kind).stored.tensors().values()
        flat = (t.reshape(t.shape or 1) for t in codes)
        return [t[slice(*shard_rows(len(t), rank, count))].clone() for t in flat]

    def _values(self, name: str, first: int, last: int) -> Tensor:
        stored = self.stored[name]
        values = read_values(stored, first, last)
        if _state(stored.file) != self._found[stored.file]:
            message = "the file has changed since the base was found, and shards of two versions cannot be combined"
            raise BaseError(message, where=str(stored.file), fix="start again when no program is writing to the file")
        self.bytes_read += values.nbytes
        return values

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if values.is_floating_point() else values


def _state(file: Path) -> tuple[int, int, int]:
    """Return a file's inode, size and modification time, to detect changes."""
    now = file.stat()
    return now.st_ino, now.st_size, now.st_mtime_ns


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint stores."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def read_buffers(model: nn.Module, unread: ShardReader, device: torch.device) -> None:
    """Read the buffers stored in the files, and move all buffers to `device`."""
    for prefix, module in base_modules(model):
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                name = f"{prefix}.{key}" if prefix else key
                module._buffers[key] = unread.read_full(name, device) if name in unread.stored else buffer.to(device)
