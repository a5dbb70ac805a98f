"""Tables of bases and GPUs by name, bundled as data files in this folder.

The files contain the source of each number.

    base_config("meta-llama/Llama-3.1-70B")      fields of its config.json
    device_named("h100-80gb")                    the numbers of a GPU that a plan uses
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, counted, nearest, quoted
from veneer.models.config import read_config_json
from veneer.models.device import thread_count

if TYPE_CHECKING:
    import torch

_MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """The device that a run is planned for.

    memory: total bytes.
    flops: peak bfloat16 operations per second.
    bandwidth: bytes per second.
    price: US dollars per hour of one device; None if unknown.
    count: number of devices."""

    name: str
    kind: str
    memory: int
    flops: float
    bandwidth: float
    label: str = ""
    price: float | None = None
    count: int = 1


@functools.cache
def _bases() -> tuple[dict[str, Any], dict[str, str]]:
    table = json.loads(Path(__file__).with_name("bases.json").read_text(encoding="utf-8"))["bases"]
    names = {name.lower(): name for name in table}
    for name, entry in table.items():
        names.update({alias.lower(): name for alias in entry.get("aliases", ())})
    return table, names


def base_names() -> list[str]:
    """Return the hub names of the bases in the table."""
    return list(_bases()[0])


def base_config(name: str) -> dict[str, Any]:
    """Return the config of a base (for an image base, of its denoiser).

    name: a name in the table, or the path of a directory, a config.json or a GGUF file.

    Raises ConfigError for an unknown name (suggesting similar names) and for invalid values
    (models/config.py), and BaseError for an unreadable GGUF file."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_config(path)
    for file in (path / "config.json", path / "transformer" / "config.json", path / "unet" / "config.json", path):
        if file.is_file() and file.suffix == ".json":
            config = read_config_json(file)
            return {**_picture(path, config), **config}
    if len(inside := sorted(path.glob("*.gguf"))) == 1:
        return _gguf_config(inside[0])
    table, names = _bases()
    key = names.get(name.lower())
    if key is None:
        short_names = {n.rpartition("/")[2]: n for n in names}
        key = names.get(short_names.get(name.lower(), ""))
    if key is None:
        if (name and path.is_dir()) or name.startswith((".", "/", "~")) or path.suffix in (".json", ".gguf"):
            message = f"there is no config.json in {name}" if path.is_dir() else f"there is no {name}"
            raise ConfigError(message, where=str(path.absolute()), fix="the folder, config.json or GGUF file of a base")
        nearest_names = nearest(name, [*table, *(n.rpartition("/")[2] for n in table)])
        hint = f"did you mean {' or '.join(nearest_names)}? " if nearest_names else ""
        text = f"no base {quoted(name)} is in the table"
        raise ConfigError(text, fix=f"{hint}`veneer plan --list` lists bases; or name a folder or config.json")
    return dict(table[key]["config"])


def _gguf_config(file: Path) -> dict[str, Any]:
    from veneer.models.text.base import read_base_config

    return dict(read_base_config(file).to_dict())


def _picture(base: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Return an image base's pixels per latent position and default image side.

    The side comes from the U-Net's config, or else from the VAE's."""
    file = base / "vae" / "config.json"
    if "_class_name" not in config or not file.is_file():
        return {}
    vae = read_config_json(file)
    # Qwen-Image's VAE has `dim_mult` instead: multiples of a base width.
    levels = vae.get("block_out_channels", vae.get("dim_mult", [0] * 4))
    sample_size = config.get("sample_size")
    sides = [side for side in (sample_size, vae.get("sample_size")) if side is not None]
    if not isinstance(levels, list) or not 0 < len(levels) < 10 or not all(type(n) is int and n > 0 for n in sides):
        text = "block_out_channels must be a list of widths, and sample_size a number of pixels or null"
        raise ConfigError(text, where=str(file))
    scale = 2 ** (len(levels) - 1)
    picture = scale * int(sample_size) if sample_size else int(vae.get("sample_size") or 1024)
    return {"vae_scale": scale, "picture": picture}


@functools.cache
def _gpus() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))["gpus"]
    return table


def gpu_names() -> list[str]:
    return list(_gpus())


def device_named(name: str, *, count: int = 1, price: float | None = None) -> Device:
    """Return a GPU from the table. `price` replaces the price in the table.

    Raises ConfigError, with similar names, for an unknown name."""
    table = _gpus()
    key = _key(name)
    name_in_table = next((n for n in table if _key(n) == key), None)
    name_in_table = name_in_table or next((n for n in table if key and _key(n).startswith(key)), None)
    if name_in_table is None:
        nearest_names = nearest(name, table) or list(table)
        raise ConfigError(f"no GPU {name!r} is in the table", where="--gpu", fix=f"one of {', '.join(nearest_names)}")
    row = table[name_in_table]
    return Device(
        name_in_table,
        "cuda",
        int(row["memory_mib"] * _MIB),
        row["bf16_tflops"] * 1e12,
        row["bandwidth_gb"] * 1e9,
        row["label"],
        row["price"] if price is None else price,
        count,
    )


def device_by_cuda_name(name: str, memory: int) -> Device:
    """Return the device for a card with this CUDA name and `memory` bytes.

    A card that is in the table gets its name from the table. An unknown card is assumed to reach 100 TFLOP/s
    and 800 GB/s."""
    for gpu in gpu_names():
        row = device_named(gpu)
        has_name = row.label.lower().split(" (")[0].removeprefix("nvidia ") in name.lower() or _key(gpu) in _key(name)
        if has_name and abs(row.memory - memory) < 0.1 * memory:
            return row
    similar = [device_named(n) for n in gpu_names() if n.split("-")[0] in name.lower()]
    same_memory = [row for row in similar if abs(row.memory - memory) < 0.1 * memory]
    return same_memory[0] if same_memory else Device(name, "cuda", memory, 100e12, 800e9, name)


def cpu_device() -> Device:
    """Return this machine's CPU, with rates from the machine's profile (plan/time.py)."""
    import psutil

    cores = thread_count()
    total = int(psutil.virtual_memory().total)
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="utf-8").strip() if group.is_file() else ""
    total = min(total, int(limit)) if limit.isdigit() else total
    return Device("cpu", "cpu", total, cores * 1e12, 20e9, f"this CPU, {counted(cores, 'thread')}")


def device_for(where: torch.device) -> Device:
    """Return the `Device` for a torch device: a GPU, or this machine's CPU."""
    import torch

    if where.type == "cuda":
        return device_by_cuda_name(torch.cuda.get_device_name(where), int(torch.cuda.mem_get_info(where)[1]))
    return cpu_device()


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
