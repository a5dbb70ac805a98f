"""Compute a base's fingerprint, which an adapter's card records.

    fingerprint = sha256( config fields that shape the model  ‖  name, dtype, shape, sha256(bytes) of every
    weight )

Tensors are sorted by name, so the fingerprint does not change if a base is resharded or saved again, or if
its card is edited. It changes if a weight or the rope base changes. Fields with their default value are left
out; these defaults do not depend on the installed version of transformers (see `models.architecture`). Token
ids and other generation settings are left out too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.files.atomic import replace_file
from veneer.files.weights import StoredTensor, digests, tensor_table
from veneer.models.architecture import NOT_SHAPE, default_fields, plain_value
from veneer.models.home import veneer_home

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_VERSION = 1


def fingerprint(base: Path, config: PreTrainedConfig, table: list[StoredTensor] | None = None) -> str:
    """Return the fingerprint of a base directory or GGUF file as `sha256:<hex>`.

    Hashing reads every weight once. The result is cached under the veneer home; the cache is valid as long as
    the size and modification time of every weight file stay the same."""
    table = tensor_table(base) if table is None else table
    fields = shaping_fields(config)
    if fields.get("tie_word_embeddings"):
        # A tied head equals the embedding, and only some tools store both.
        table = [t for t in table if t.name != "lm_head.weight"] or table
    h = hashlib.sha256(b"veneer-base-1\n")
    h.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for tensor, digest in zip(table, _cached_digests(table), strict=True):
        h.update(f"\n{tensor.name}|{tensor.dtype}|{tensor.shape}|{digest}".encode())
    return "sha256:" + h.hexdigest()


def fingerprint_parts(parts: Mapping[str, tuple[Mapping[str, Any], list[StoredTensor]]]) -> str:
    """Return the fingerprint of a base with several components.

    parts: name -> (fields that shape the component, stored tensors of the component)."""
    h = hashlib.sha256(b"veneer-image-1\n")
    for name in sorted(parts):
        fields, table = parts[name]
        h.update(json.dumps({name: fields}, sort_keys=True, separators=(",", ":"), default=str).encode())
        for tensor, digest in zip(table, _cached_digests(table), strict=True):
            h.update(f"\n{tensor.name}|{tensor.dtype}|{tensor.shape}|{digest}".encode())
    return "sha256:" + h.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the sha256 of a whole file, by which other tools identify a checkpoint.

    The digest is cached under the veneer home. The cache is valid as long as the file's size and modification
    time stay the same."""
    cache_file = _home_file(file).with_suffix(".sha256.json")
    stat = file.stat()
    state = {"version": _VERSION, "size": stat.st_size, "mtime": stat.st_mtime_ns}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(cache_file.read_text(encoding="utf-8"))
        if {**cached, **state} == cached:
            return str(cached["sha256"])
    with file.open("rb") as opened:
        sha = hashlib.file_digest(opened, "sha256").hexdigest()
    _write(cache_file, json.dumps(state | {"sha256": sha}))
    return sha


def shaping_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the non-default config fields that decide what the model computes.

    See `models.architecture` for the defaults. Numbers are rounded to six significant digits, because a GGUF
    file stores 1e-5 as the nearest float32."""
    mine = config.to_dict()
    try:
        installed: Mapping[str, Any] = type(config)().to_dict()
    except Exception:  # Some config classes cannot be created without arguments, so they have no defaults.
        installed = {}
    fields = _differing(mine, default_fields(config.model_type, installed))
    fields["model_type"] = config.model_type
    return fields


def _differing(mine: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for name, value in mine.items():
        if name in NOT_SHAPE or (name == "quantization_config" and _is_gguf(value)):
            continue
        value, usual = plain_value(value), plain_value(default.get(name))
        if isinstance(value, dict) and isinstance(usual, dict):
            value = _differing(value, usual) or usual
        if value != usual:
            out[name] = value
    return out


def _is_gguf(value: Any) -> bool:
    return isinstance(value, dict) and value.get("quant_method") == "gguf"


def _cached_digests(table: list[StoredTensor]) -> list[str]:
    """Return the sha256 of each tensor.

    The digests are cached under the veneer home; the cache is valid until a weight file changes."""
    files = sorted({tensor.file for tensor in table})
    if not files:
        return []
    cache_file = _home_file(files[0])
    state = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(cache_file.read_text(encoding="utf-8"))
        if cached["version"] == _VERSION and cached["files"] == state:
            return [cached["tensors"][t.name] for t in table]
    values = digests(table)
    record = {"version": _VERSION, "files": state, "tensors": {t.name: d for t, d in zip(table, values, strict=True)}}
    _write(cache_file, json.dumps(record))
    return values


def _home_file(path: Path) -> Path:
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return veneer_home() / "fingerprints" / f"{key}.json"


def _write(file: Path, text: str) -> None:
    """Write a cache file. Errors are ignored, because the cache only saves time."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, [text.encode()], mode=0o600)
