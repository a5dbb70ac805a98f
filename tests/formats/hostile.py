"""A folder of hostile files; for each file, FILES has the words that its error must contain.

The files are harmless unless a reader executes them: the pickles then create a file `made-by-a-pickle`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

MARK = "made-by-a-pickle"


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def kohya(down: list[int], up: list[int], dtype: str = "F8_E4M3", value: bytes = b"\x01") -> bytes:
    """Return a well-formed file with a pair of the given shapes, although a reader must refuse the pair."""
    sizes = [down[0] * down[1], up[0] * up[1]]
    width = {"F8_E4M3": 1, "F32": 4}[dtype]
    at = [sizes[0] * width, (sizes[0] + sizes[1]) * width]
    header = {"x.lora_down.weight": entry(down, 0, at[0], dtype), "x.lora_up.weight": entry(up, at[0], at[1], dtype)}
    return safetensors(header, value * (at[1] // len(value)))


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def saved(value: object, **how: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


def packed(raw: bytes) -> bytes:
    """Return a zip archive with the same members, but compressed, as in a zip bomb."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int = 0, fields: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


FIELD = text("general.type") + struct.pack("<I", 8) + text("adapter")
NAN = struct.pack("<f", float("nan"))
ONE = {"a": entry([2], 0, 8)}
DATA = b"\0" * 8

FILES: dict[str, tuple[bytes, str]] = {
    # files that are not safetensors
    "empty.safetensors": (b"", "the file is empty"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    "page.safetensors": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "json.safetensors": (b'{"error": "Access to model x is restricted"}', "the file is text"),
    "zip.safetensors": (saved(ONE), "zip archive"),
    "pickle.safetensors": (pickle.dumps({"a": list(range(99))}, 2), "the file is a pickle"),
    "gguf.safetensors": (gguf() + bytes(16), "the file is GGUF"),
    "picture.safetensors": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG picture"),
    "gzip.safetensors": (b"\x1f\x8b\x08" + bytes(64), "a gzip archive"),
    "short.safetensors": (b"\x01\x02\x03", "only 3 bytes"),
    # false headers
    "huge-header.safetensors": (safetensors(ONE, DATA, length=1 << 62), "the header claims 4,611,686,018,427,387,904"),
    "half.safetensors": (safetensors(ONE, DATA)[:-3], "truncated"),
    "cut-header.safetensors": (safetensors(ONE)[:30], "only 22 follow: the file is truncated or damaged"),
    "not-json.safetensors": (safetensors(b"{" + b"\xff" * 40), "not valid JSON"),
    "deep.safetensors": (safetensors(b'{"a":' * 9_000), "not valid JSON"),
    "deeper.safetensors": (safetensors(b'{"a":' * 60_000), "60,000 entries that are not tensors"),
    "duplicate.safetensors": (
        safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', DATA),
        "'a' appears twice",
    ),
    "list.safetensors": (safetensors(b"[1, 2, 3, 4]"), "does not start with '{'"),
    "offsets.safetensors": (safetensors({"a": entry([2], 8, 0)}, DATA), "is not [begin, end]"),
    "beyond.safetensors": (safetensors({"a": entry([2_000_000], 0, 8_000_000)}, DATA), "need 8,000,000 bytes of data"),
    "overlap.safetensors": (safetensors({**ONE, "b": entry([2], 4, 12)}, bytes(12)), "inside 'a'"),
    "hole.safetensors": (safetensors({**ONE, "b": entry([2], 16, 24)}, bytes(24)), "a hole of 8 bytes"),
    "left-over.safetensors": (safetensors(ONE, bytes(64)), "belong to no tensor"),
    "absurd-shape.safetensors": (safetensors({"a": entry([1 << 59, 1 << 59], 0, 8)}, DATA), "absurd"),
    "empty-absurd.safetensors": (safetensors({"a": entry([0, 1 << 59, 9], 0, 0)}), "absurd"),
    "negative.safetensors": (safetensors({"a": entry([-2], 0, 8)}, DATA), "is not a list of at most 16 sizes"),
    "dtype.safetensors": (safetensors({"a": entry([2], 0, 8, "OBJECT")}, DATA), "dtype 'OBJECT'"),
    "metadata.safetensors": (
        safetensors({**ONE, "__metadata__": {"a": {"b": 1}}}, DATA),
        "must map strings to strings",
    ),
    # names
    "path.safetensors": (safetensors({"../../.ssh/authorized_keys": entry([2], 0, 8)}, DATA), "looks like a path"),
    "nul.safetensors": (safetensors({"a\0b": entry([2], 0, 8)}, DATA), "control characters"),
    "long-name.safetensors": (safetensors({"n" * 5000: entry([2], 0, 8)}, DATA), "1 to 1024 characters"),
    # invalid values and invalid adapters
    "nan.safetensors": (safetensors({"x.diff": entry([2], 0, 8)}, NAN * 2), "NaN or infinity"),
    "rank.safetensors": (kohya([70_000, 1], [1, 70_000]), "rank 70,000: only ranks"),
    "rank-zero.safetensors": (kohya([0, 4], [4, 0]), "rank 0: only ranks"),
    "unpaired.safetensors": (safetensors({"x.lora_down.weight": entry([1, 2], 0, 8)}, DATA), "without its partner"),
    "misfit.safetensors": (kohya([2, 4], [4, 3]), "are not (rank, in…) and (out, rank)"),
    # pickles
    "runs.pt": (saved({"a": torch.ones(2), "b": Runs()}), "system"),
    "runs-old.bin": (saved({"b": Runs()}, _use_new_zipfile_serialization=False), "system"),
    "runs-bare.pkl": (pickle.dumps(Runs(), 2), "the pickle"),
    "bomb.pt": (packed(saved({"a": torch.zeros(100_000)})), "unpacks to more than it holds"),
    "expanded.pt": (saved({"a": torch.zeros(1).expand(1 << 40)}), "more values than the file holds"),
    "cut.pt": (saved({"a": torch.zeros(1000)})[:700], "the archive is damaged"),
    "bytes.bin": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x7f\x85R.", "the pickle"),
    "page.bin": (b"<html>not found</html>", "not a pickle"),
    # GGUF
    "short.gguf": (b"GGUF\x03", "a truncated GGUF file"),
    "page.gguf": (b"<html>", "not GGUF"),
    "big-endian.gguf": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "version.gguf": (gguf(version=9), "GGUF version 9"),
    "tensors.gguf": (gguf(tensors=1 << 60), "tensors are claimed"),
    "fields.gguf": (gguf(fields=1 << 60), "fields are claimed"),
    "array.gguf": (gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(16)), "numbers are claimed"),
    "texts.gguf": (gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(16)), "texts are claimed"),
    "nested.gguf": (gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) * 40), "an array of type 9"),
    "text.gguf": (gguf(0, 1, struct.pack("<Q", 1 << 40) + bytes(16)), "bytes of text are claimed"),
    "utf8.gguf": (gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16)), "not UTF-8"),
    "twice.gguf": (gguf(0, 2, FIELD + FIELD), "'general.type' appears twice"),
    "dimensions.gguf": (gguf(1, 0, text("a") + struct.pack("<I", 1 << 30) + bytes(32)), "1,073,741,824 dimensions"),
    "shape.gguf": (gguf(1, 0, tensor("a", (1 << 59, 1 << 59))), "the absurd shape"),
    "type.gguf": (gguf(1, 0, tensor("a", (4,), kind=999)), "the unknown type 999"),
    "beyond.gguf": (gguf(1, 0, tensor("a", (1 << 30,))), "truncated"),
    "overlap.gguf": (gguf(2, 0, tensor("a", (8,)) + tensor("b", (8,)) + bytes(64)), "begins inside"),
    "path.gguf": (gguf(1, 0, tensor("../a", (4,)) + bytes(64)), "looks like a path"),
    "model.gguf": (gguf(0, 1, text("general.type") + struct.pack("<I", 8) + text("model")), "not a LoRA adapter"),
    "odd-type.gguf": (gguf(0, 1, text("general.type") + struct.pack("<IIQB", 9, 0, 1, 7)), "not a LoRA adapter"),
}


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    return sorted(folder / name for name in FILES)
