"""Export an adapter as a folder that vLLM or TGI serves, with the command to serve it.

An adapter that the server would load with less than full effect is rejected with the reason; `merge=True`
instead writes a full model with the adapter merged, which any server loads. formats/server_export.py lists each
server's silent errors.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.adapters import use as using
from veneer.errors import AdapterError, ConfigError
from veneer.formats.convert import write
from veneer.formats.server_export import MAX_VLLM_RANKS
from veneer.serve.fleet.mixes import served_name
from veneer.serve.request import make_mix

_SERVERS = ("vllm", "tgi")


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    `command`: serves the folder. `name`: the adapter's name in requests, also used by a veneer front door.
    `digest`: of the exported adapter. `ranks`: rank -> modules, {} for a merged model.
    """

    folder: Path
    server: str
    base: str
    name: str
    digest: str
    command: str
    ranks: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder), "ranks": {str(r): n for r, n in self.ranks.items()}}


def export(
    adapter: str,
    server: str,
    folder: str | Path,
    *,
    base: str | None = None,
    merge: bool = False,
    dtype: str | None = None,
    log: Callable[[str], None] | None = None,
) -> Exported:
    """Write `adapter` (a name, folder or file) to `folder` for `server`.

    base: by default the base that the adapter states; needed for TGI, to know its layers. merge: write a full
    model. dtype: round to this dtype. Raises AdapterError if the server does not support the adapter, with
    every module and a fix; ConfigError if a base is needed and not known.
    """
    if server not in _SERVERS:
        raise ConfigError(f"there is no export for {server!r}", fix=" or ".join(_SERVERS))
    out, base = Path(folder), base or using.stated_base(adapter)
    if (merge or server == "tgi") and not base:
        raise ConfigError("the adapter does not state which base it belongs to", where=adapter, fix="--base NAME")
    if merge:
        return _merged(adapter, server, out, base, dtype, log)
    reading = using.read_adapter(adapter)
    layers = _layers(base, log) if server == "tgi" else None
    try:
        written = write(reading.adapter, out, server, dtype=dtype, layers=layers)
    except AdapterError as error:
        merged = f"veneer export {adapter} --for {server} --merge {out}"
        raise AdapterError(error.what, where=error.where, fix=f"as a full model: {merged}") from error
    digest = reading.adapter.digest()
    name = served_name(make_mix([(digest, 1.0)]))
    base_name, note = _served_base(base)
    command = _command(server, base_name or "BASE", name, out, max(written.ranks))
    return Exported(out, server, base, name, digest, command, written.ranks, [*reading.notes, *written.notes, *note])


def _served_base(base: str) -> tuple[str, list[str]]:
    """What another server loads for `base`, with notes.

    The folder of a built-in base, or its hub ID.
    """
    from veneer.models.builtin import BUILTIN, builtin_folder

    if (builtin := BUILTIN.get(base)) is None:
        return base, []
    folder = builtin_folder(builtin)
    if not (folder / "base.json").exists():
        return builtin.hub_id, [
            f"{builtin.hub_id} is the original of {base}, which holds a quantized copy of its weights"
        ]
    return str(folder), [f"on another machine, use {builtin.hub_id} as the base, or copy this folder there"]


def _layers(base: str, log: Callable[[str], None] | None) -> int:
    from veneer.models.sources import find_base
    from veneer.models.text.base import read_base_config

    return int(read_base_config(find_base(base, say=log)).get_text_config().num_hidden_layers)


def _command(server: str, base: str, name: str, folder: Path, rank: int) -> str:
    quoted_folder = shlex.quote(str(folder.absolute()))
    if server == "tgi":
        return f"LORA_ADAPTERS={name}={quoted_folder} text-generation-launcher --model-id {shlex.quote(base)}"
    need = next(n for n in MAX_VLLM_RANKS if n >= rank)
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {need} --lora-modules {name}={quoted_folder}"


def _merged(
    adapter: str, server: str, out: Path, base: str, dtype: str | None, log: Callable[[str], None] | None
) -> Exported:
    from veneer.adapters.merge import merge
    from veneer.files.weights import stored_dtype, tensor_table
    from veneer.models.sources import find_base
    from veneer.models.text.base import load_text

    stored = {"F32": "float32", "BF16": "bfloat16"}.get(stored_dtype(tensor_table(find_base(base, say=log))), "float16")
    wanted_dtype = dtype or stored
    # Loaded as stored if written as stored, else in float32, which represents every stored weight exactly.
    loaded = load_text(
        base, dtype=wanted_dtype if wanted_dtype == stored else "float32", say=log or (lambda line: None)
    )
    report = merge(loaded, [adapter], out, dtype=wanted_dtype)
    quoted_folder = shlex.quote(str(out.absolute()))
    command = (
        f"vllm serve {quoted_folder}" if server == "vllm" else f"text-generation-launcher --model-id {quoted_folder}"
    )
    rounding = f"rounding to {report.dtype} keeps {report.delta_kept:.1%} of the change"
    notes = [f"warning: {report.warning}; --dtype float32 keeps it exactly" if report.warning else rounding]
    return Exported(out, server, base, out.name, str(report.adapters[0]["digest"]), command, {}, notes)
