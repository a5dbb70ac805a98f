"""What is in a base's weight files, read from their headers alone: names, dtypes, shapes, and where the bytes are.

Every header is checked against the file before anything else trusts it, so that a truncated or foreign file is one
clear BaseError and not a crash inside a loader. Needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseError

__all__ = ["StoredTensor", "digests", "file_table", "pickles_refused", "stored_dtype", "tensor_table", "weight_files"]

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file. `dtype` is the file's own word; the bytes are file[start : start + size]."""

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
    """The weight files of a base: the GGUF file itself, or a directory's safetensors (by its index if it has one).

    Raises BaseError where there are none, where shards are missing, and for pickles, which are not opened."""
    if base.is_file():
        return [base]
    index = base / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [base / Path(name).name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseError("the index of the weight files cannot be read", where=str(index)) from error
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise BaseError(
                f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}",
                where=str(base),
                fix="copy or download the base again; its index names them",
            )
        return files
    files = sorted(base.glob("model*.safetensors")) or sorted(base.glob("*.safetensors"))
    files = [f for f in files if not f.name.startswith("adapter_")]
    if files:
        return files
    raise pickles_refused(base)


def pickles_refused(folder: Path) -> BaseError:
    """The error for a folder without safetensors: its weights are pickles, or there are none."""
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt"), *folder.glob("*.ckpt")])
    if pickles:
        return BaseError(
            f"the weights are pickles ({pickles[0].name}), which can run code when opened; veneer does not open them",
            where=str(folder),
            fix="use a safetensors copy of this base, or convert it yourself where you trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    return BaseError("this directory has no weights (*.safetensors)", where=str(folder))


def tensor_table(base: Path) -> list[StoredTensor]:
    """Every stored tensor of a base, in canonical (name) order. Raises BaseError for files that are not whole."""
    return file_table(weight_files(base))


def file_table(files: Iterable[Path]) -> list[StoredTensor]:
    """Every stored tensor of these files, in name order. Raises BaseError for files that are not whole."""
    table: list[StoredTensor] = []
    for file in files:
        table += _gguf_table(file) if file.suffix == ".gguf" else _safetensors_table(file)
    twice = [name for name, n in Counter(t.name for t in table).items() if n > 1]
    if twice:
        where = str(table[0].file.parent)
        raise BaseError(f"{len(twice)} tensors are stored in two files, {twice[0]!r} among them", where=where)
    return sorted(table, key=lambda t: t.name)


def stored_dtype(table: Iterable[StoredTensor]) -> str:
    """The dtype that most weights are stored in, in the file's own word ("BF16", "F32", "Q4_1", …)."""
    sizes: Counter[str] = Counter()
    for tensor in table:
        sizes[tensor.dtype] += tensor.elements
    return sizes.most_common(1)[0][0] if sizes else "F32"


def digests(table: list[StoredTensor]) -> list[str]:
    """sha256 of the bytes of each tensor, in the table's order; read in chunks, a few tensors at a time."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, table))


def _digest(tensor: StoredTensor) -> str:
    h = hashlib.sha256()
    with tensor.file.open("rb") as f:
        f.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = f.read(min(left, _CHUNK))
            if not chunk:
                raise BaseError("the file became shorter while it was read", where=str(tensor.file))
            h.update(chunk)
            left -= len(chunk)
    return h.hexdigest()


def _safetensors_table(file: Path) -> list[StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little") if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise _not_whole(file, head + f.read(120))
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [
            (name, str(e["dtype"]), tuple(int(n) for n in e["shape"]), *map(int, e["data_offsets"]))
            for name, e in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_whole(file, head + text[:120]) from error
    table = []
    for name, dtype, shape, start, end in entries:
        needs = math.prod(shape) * _BITS.get(dtype, 0) // 8
        if not 0 <= start <= end or (needs and end - start != needs):
            raise BaseError(f"the header of {file.name} does not add up at tensor {name!r}", where=str(file))
        table.append(StoredTensor(name, dtype, shape, file, 8 + length + start, end - start))
    want = max((t.start + t.size for t in table), default=8 + length)
    if size < want:
        raise BaseError(
            f"{file.name} is cut short: its header describes {want:,} bytes, the file has {size:,}",
            where=str(file),
            fix="copy or download the base again",
        )
    return table


def _not_whole(file: Path, start: bytes) -> BaseError:
    """Says what a file that is no safetensors file seems to be, from its first bytes."""
    again = "copy or download the base again"
    if start.startswith(b"version https://git-lfs"):
        return BaseError(
            f"{file.name} is a Git LFS pointer, not the weights", where=str(file), fix="run `git lfs pull` there"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return BaseError(f"{file.name} is a web page that was saved as weights", where=str(file), fix=again)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return BaseError(f"{file.name} is a pickle under another name; it is not opened", where=str(file), fix=again)
    return BaseError(f"{file.name} is not a whole safetensors file", where=str(file), fix=again)


def _gguf_table(file: Path) -> list[StoredTensor]:
    with file.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise BaseError(f"{file.name} is not a GGUF file: it starts with {magic!r}", where=str(file))
    from veneer.files.gguf_header import Outline

    try:
        reader = Outline(str(file))
        table = [
            StoredTensor(t.name, t.tensor_type.name, tuple(map(int, t.shape)), file, int(t.data_offset), int(t.n_bytes))
            for t in reader.tensors
        ]
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise BaseError(
            f"{file.name} is cut short or damaged: {error}", where=str(file), fix="copy or download it again"
        ) from error
    size = file.stat().st_size
    if any(t.start + t.size > size for t in table):
        raise BaseError(f"{file.name} is cut short ({size:,} bytes)", where=str(file), fix="copy or download it again")
    return table
