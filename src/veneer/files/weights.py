"""A model's weights on disk: find weight files, and read tensors one at a time.

Headers are read and checked when a file is opened, so that a truncated file, or a file in another format,
gives one clear error instead of a crash inside a loader. Each tensor is read on demand into its own memory,
so comparing two large models needs memory for only two tensors. torch is imported only to read a tensor. This
module works on names, shapes and bytes, and does not depend on models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import AdapterError, BaseError, bullets
from veneer.files.gguf import read_gguf_file
from veneer.files.safetensors import BITS, PICKLE_FIX, STORED_DTYPES, Header, HeaderEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {**BITS, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
"""Bits per value of all safetensors dtypes, including dtypes that torch does not support."""
COMPONENT_STEMS = ("diffusion_pytorch_model", "model")
"""File name stems of a component's weights, as diffusers and transformers save them."""
_AGAIN = "copy or download the base again"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file, stored in file[start : start + size].

    dtype: the dtype's name in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def weight_files(base: Path) -> list[Path]:
    """Return a base's weight files: a GGUF file, or a directory's safetensors files.

    Uses the directory's index if one exists. Raises BaseError if there are no weight files, if shards are
    missing, and for pickles, which are not opened."""
    if base.is_file():
        return [base]
    index = base / "model.safetensors.index.json"
    if index.exists():
        return _shards_of(index)
    files = sorted(base.glob("model*.safetensors")) or sorted(base.glob("*.safetensors"))
    files = [f for f in files if not f.name.startswith("adapter_")]
    if files:
        return files
    raise _pickles_refused(base)


def _shards_of(index: Path) -> list[Path]:
    """Return the files that a shard index lists, all in the index's folder.

    Raises BaseError if the index cannot be read or a file is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseError("the index of the weight files cannot be read", where=str(index)) from error
    missing = [f.name for f in files if not f.exists()]
    if missing:
        problem = f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}"
        raise BaseError(problem, where=str(index.parent), fix="copy or download the base again; its index names them")
    return files


def component_files(folder: Path) -> tuple[list[Path], str]:
    """Return a component's weight files and their variant.

    The variant is "fp16" if the component has only fp16 files, else "". Looks for the names that diffusers
    and transformers use when they save a component, and uses an index if one exists. Raises the errors of
    `weight_files`."""
    for variant in ("", ".fp16"):
        for stem in COMPONENT_STEMS:
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                return _shards_of(index), variant.removeprefix(".")
            if (folder / f"{stem}{variant}.safetensors").exists():
                return [folder / f"{stem}{variant}.safetensors"], variant.removeprefix(".")
    raise _pickles_refused(folder)


def _pickles_refused(folder: Path) -> BaseError:
    """Return the error for a folder without safetensors files: pickles only, or no weights."""
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt"), *folder.glob("*.ckpt")])
    if pickles:
        return BaseError(
            f"the weights are pickles ({pickles[0].name}), which can run code when opened; veneer does not open them",
            where=str(folder),
            fix="use a safetensors copy of this base, or convert it yourself if you trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    return BaseError("this directory has no weights (*.safetensors)", where=str(folder))


def tensor_table(base: Path) -> list[StoredTensor]:
    """Return every tensor of a base, sorted by name. Raises BaseError for damaged files."""
    return file_table(weight_files(base))


def file_table(files: Iterable[Path]) -> list[StoredTensor]:
    """Return all tensors of these files, sorted by name. Raises BaseError for damaged files."""
    table: list[StoredTensor] = []
    for file in files:
        table += _gguf_table(file) if file.suffix == ".gguf" else _safetensors_table(file)
    twice = [name for name, n in Counter(t.name for t in table).items() if n > 1]
    if twice:
        where = str(table[0].file.parent)
        raise BaseError(f"{len(twice)} tensors are stored in two files, {twice[0]!r} among them", where=where)
    return sorted(table, key=lambda t: t.name)


def read_values(stored: StoredTensor, first: int = 0, last: int | None = None) -> Tensor:
    """Return a safetensors tensor, or only its values [first, last) as a flat tensor.

    Only the requested bytes are read. The file is not memory-mapped, because mapped pages count as memory of
    the process while the file is open. Raises BaseError for a dtype that torch does not support, and for a
    truncated file."""
    import torch

    if stored.dtype not in STORED_DTYPES:
        raise BaseError(
            f"the weights are stored in {stored.dtype}, which torch does not support",
            where=f"{stored.file}: {stored.name}",
        )
    dtype: torch.dtype = getattr(torch, STORED_DTYPES[stored.dtype])
    end = stored.elements if last is None else last
    out = torch.empty((end - first) * dtype.itemsize, dtype=torch.uint8)
    if len(out):
        with stored.file.open("rb") as file:
            file.seek(stored.start + first * dtype.itemsize)
            if file.readinto(memoryview(out.numpy())) != len(out):  # type: ignore[arg-type]
                raise BaseError("the file became shorter while it was read", where=str(stored.file))
    flat = out.view(dtype)
    return flat.view(stored.shape) if last is None and not first else flat


def stored_dtype(table: Iterable[StoredTensor]) -> str:
    """Return the dtype of most weights, as named in the file: "BF16", "F32", "Q4_1", …"""
    sizes: Counter[str] = Counter()
    for tensor in table:
        sizes[tensor.dtype] += tensor.elements
    return sizes.most_common(1)[0][0] if sizes else "F32"


def digests(table: list[StoredTensor]) -> list[str]:
    """Return the SHA-256 of each tensor's bytes, in the table's order.

    Reads in chunks, a few tensors at a time."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, table))


def _digest(tensor: StoredTensor) -> str:
    h = hashlib.sha256()
    with tensor.file.open("rb") as f:
        f.seek(tensor.start)
        remaining = tensor.size
        while remaining:
            chunk = f.read(min(remaining, _CHUNK))
            if not chunk:
                raise BaseError("the file became shorter while it was read", where=str(tensor.file))
            h.update(chunk)
            remaining -= len(chunk)
    return h.hexdigest()


def _safetensors_table(file: Path) -> list[StoredTensor]:
    try:
        header = read_header(file, bits=_BITS)
    except AdapterError as error:
        fix = _AGAIN if error.fix in (None, PICKLE_FIX) else error.fix
        raise BaseError(f"{file.name} cannot be read: {error.what}", where=str(file), fix=fix) from error
    return [
        StoredTensor(name, e.kind, e.shape, file, header.data_start + e.begin, e.end - e.begin)
        for name, e in header.entries.items()
    ]


def _gguf_table(file: Path) -> list[StoredTensor]:
    try:
        header = read_gguf_file(file, long_arrays=False)
    except AdapterError as error:
        raise BaseError(
            f"{file.name} cannot be read: {error.what}", where=str(file), fix="copy or download it again"
        ) from error
    return [  # keep the file's order of dimensions, innermost first, because fingerprints use this order
        StoredTensor(n, e.kind, e.shape[::-1], file, e.begin, e.end - e.begin) for n, e in header.entries.items()
    ]


class Checkpoint:
    """A full model's weights in safetensors: a file, or a folder's *.safetensors.

    files: path -> header.
    entries: tensor name -> header entry.

    Raises BaseError if there are no safetensors files, or if two files contain the same tensor; AdapterError
    for a damaged file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        paths = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not paths:
            raise BaseError("no safetensors files here", where=str(path), fix="give a model's folder or file")
        self.files: dict[Path, Header] = {file: read_header(file) for file in paths}
        self.entries: dict[str, HeaderEntry] = {}
        self._place: dict[str, Path] = {}
        twice = []
        for file, header in self.files.items():
            for name, entry in header.entries.items():
                if name in self._place:
                    twice.append(f"{name}: in {self._place[name].name} and {file.name}")
                self.entries[name], self._place[name] = entry, file
        if twice:
            fix = "give the file, or remove the copies that do not belong to the model"
            raise BaseError(f"{len(twice)} tensors are in two files:\n{bullets(twice, 10)}", where=str(path), fix=fix)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def find(self, name: str) -> str | None:
        """Return `name` if a tensor has this name, else the only tensor name that differs by a prefix.

        A prefix is, for example, `model.`. Return None if no name, or more than one name, matches."""
        if name in self.entries:
            return name
        ends = [n for n in self.entries if n.endswith(f".{name}") or name.endswith(f".{n}")]
        return ends[0] if len(ends) == 1 else None

    def __iter__(self) -> Iterator[str]:
        """Yield tensor names in the order in which files and data are read fastest."""
        for header in self.files.values():
            yield from sorted(header.entries, key=lambda n: header.entries[n].begin)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, read from its file."""
        entry, file = self.entries[name], self._place[name]
        start = self.files[file].data_start + entry.begin
        return read_values(StoredTensor(name, entry.kind, entry.shape, file, start, entry.end - entry.begin))


def checkpoint_parts(base: Path) -> dict[str, Checkpoint]:
    """Return the weights of each component of a diffusers pipeline, by component name.

    For a single model, return {"": weights}."""
    if not (base / "model_index.json").is_file():
        return {"": Checkpoint(base)}
    return {p.name: Checkpoint(p) for p in sorted(base.iterdir()) if p.is_dir() and any(p.glob("*.safetensors"))}
