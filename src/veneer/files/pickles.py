"""Read tensors from pickle files (.bin, .pt, .pth, .ckpt), on explicit request.

torch's weights-only loader builds tensors, numbers, strings, lists and dicts, and refuses everything else, so
no code in the file runs. The result is checked with the rules for safetensors files: names must be valid, and
sizes must match the file's bytes. Supported layouts: a state dict, a state dict under `state_dict`, and
nested dicts (joined by dots). This module works on pickles and tensors, and does not depend on adapters.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, UnsafeFileError, bullets
from veneer.files.safetensors import name_problem

MAX_TENSORS, MAX_DEPTH = 100_000, 6
_WRAPPERS = ("state_dict", "model_state_dict", "lora_state_dict")


def read_pickle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a pickle, sorted by name, and its strings and numbers as metadata.

    The result has the form of `read_tensors`. Raises UnsafeFileError for a pickle that refers to anything
    except tensors and plain values, and for an archive that unpacks to more bytes than it contains. Raises
    one AdapterError that lists every unsupported value and every invalid name."""
    path, where = Path(path), str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise AdapterError(f"cannot read the file: {error.strerror or error}", where=where) from None
    if start != b"PK" and start[:1] != b"\x80":
        message = "the file is not a pickle of torch.save"
        raise AdapterError(message, where=where, fix="if the file is a safetensors file, rename it to .safetensors")
    if start == b"PK":
        _check_archive(path, size)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    for name, value in _walk(_state_dict_of(_load(path)), path.name):
        if isinstance(value, Tensor):
            tensor = value.detach()
            if name in tensors:
                problems.append(f"{name!r} {tuple(tensor.shape)}: a second tensor of this name")
            elif problem := name_problem(name) or _tensor_problem(tensor, size):
                problems.append(f"{name[:80]!r} {tuple(tensor.shape)}: {problem}")
            else:
                tensors[name] = tensor
        elif value is None or isinstance(value, str | int | float | bool):
            metadata[name] = str(value)
        else:
            problems.append(f"{name[:80]!r}: {type(value).__name__} is neither a tensor, a text nor a number")
    if problems:
        raise AdapterError(f"the pickle holds objects that adapters do not have:\n{bullets(problems)}", where=where)
    if not tensors:
        raise AdapterError("the pickle holds no tensors", where=where)
    return {name: t.contiguous() for name, t in sorted(tensors.items())}, metadata


def _check_archive(path: Path, size: int) -> None:
    """Raise an error if a member is compressed; torch.save stores members uncompressed.

    A compressed member could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterError(
            f"the archive is damaged: {error}", where=str(path), fix="download or copy the file again"
        ) from None
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UnsafeFileError(
            "the archive unpacks to more than it holds; torch.save does not write such archives", where=str(path)
        )


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = (
            f"it names {named[1]}, which is not a tensor"
            if named
            else "torch.save does not write such files for tensors"
        )
        message = f"the pickle is refused: {problem}. No code of the file was run"
        raise UnsafeFileError(message, where=str(path), fix="ask for the safetensors file") from None
    except Exception as error:  # torch and pickle raise almost any exception type for a damaged file
        message = f"the pickle cannot be read: {type(error).__name__}: {str(error)[:200]}"
        raise AdapterError(message, where=str(path), fix="download or copy the file again") from None


def _state_dict_of(value: Any) -> Any:
    """Return the state dict inside a wrapper such as {"state_dict": …}.

    Other values of the wrapper (epoch, step) become metadata."""
    if isinstance(value, Mapping):
        for key in _WRAPPERS:
            if isinstance(value.get(key), Mapping):
                settings = {k: v for k, v in value.items() if k != key and not isinstance(v, Tensor | Mapping | list)}
                return {**settings, **value[key]}
    return value


def _walk(value: Any, file: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for every value in nested dicts, with names joined by dots."""
    count = 0
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    while stack:
        name, item, depth = stack.pop()
        if isinstance(item, Mapping) and depth < MAX_DEPTH:
            stack.extend((f"{name}.{k}" if name else str(k), v, depth + 1) for k, v in item.items())
            count += len(item)
            if count > MAX_TENSORS:
                raise AdapterError(f"more than {MAX_TENSORS:,} entries in the pickle", where=file)
        elif name.rpartition(".")[2] == "alpha" and type(item) in (int, float):
            yield name, torch.tensor(float(item))
        else:
            yield name, item


def _tensor_problem(tensor: Tensor, size: int) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"{tensor.layout}, {tensor.device.type}: a plain tensor is expected"
    if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), size):
        return "it claims more values than the file holds"
    return None
