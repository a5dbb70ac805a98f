"""A full model's weights in safetensors, one tensor at a time.

A file, or a folder of shards: any `*.safetensors` in it, each tensor in exactly one. Headers are read and checked when
it is opened, tensors when they are asked for, each into memory of its own, so that two large models can be compared in
the memory of two tensors. Knows names, shapes and bytes; nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import AdapterError, BaseError
from veneer.files.tensors import Entry, Header, read_header

__all__ = ["Checkpoint", "components"]


class Checkpoint:
    """`files`: path -> header. `entries`: tensor name -> its entry. Raises BaseError where there are no safetensors or
    a tensor is in two files, AdapterError for a damaged file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not found:
            raise BaseError("no safetensors files here", where=str(path), fix="give a model's folder or file")
        self.files: dict[Path, Header] = {file: read_header(file) for file in found}
        self.entries: dict[str, Entry] = {}
        self._place: dict[str, Path] = {}
        twice = []
        for file, header in self.files.items():
            for name, entry in header.entries.items():
                if name in self._place:
                    twice.append(f"{name}: in {self._place[name].name} and {file.name}")
                self.entries[name], self._place[name] = entry, file
        if twice:
            raise BaseError(
                f"{len(twice)} tensors are in two files:\n" + "\n".join(f"  - {t}" for t in twice[:10]),
                where=str(path),
                fix="give the file, or remove the copies that do not belong to the model",
            )

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def find(self, name: str) -> str | None:
        """The tensor of this name, or the only one that is the same but for parts in front (`model.`)."""
        if name in self.entries:
            return name
        ends = [n for n in self.entries if n.endswith(f".{name}") or name.endswith(f".{n}")]
        return ends[0] if len(ends) == 1 else None

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files and of the data within, which is the order to read them in."""
        for header in self.files.values():
            yield from sorted(header.entries, key=lambda n: header.entries[n].begin)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file now."""
        entry, file = self.entries[name], self._place[name]
        out = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        if len(out):
            with file.open("rb", buffering=0) as source:
                source.seek(self.files[file].data_start + entry.begin)
                view, at = memoryview(out.numpy()), 0  # type: ignore[arg-type]
                while at < len(view):
                    if not (count := source.readinto(view[at:])):
                        raise AdapterError("the file became shorter while it was read", where=str(file))
                    at += count
        return out.view(entry.dtype).reshape(entry.shape)


def components(base: Path) -> dict[str, Checkpoint]:
    """Component -> its weights, of a pipeline's folder as diffusers saves it; "" -> the weights of a single model."""
    if not (base / "model_index.json").is_file():
        return {"": Checkpoint(base)}
    return {p.name: Checkpoint(p) for p in sorted(base.iterdir()) if p.is_dir() and any(p.glob("*.safetensors"))}
