"""Checkpoints: the complete state of a run, for an exact continuation.

    checkpoints/
      step-00000040/
        adapter.safetensors      the trained parameters by name, in their own dtype
        optimizer.safetensors    every tensor of the optimizer, keyed "<parameter>|<entry>"
        random.safetensors       state of the random generators of torch, Python and each CUDA device
        adapter/                 the adapter in its output format; only with `checkpoint.adapters`
        state.json               the rest: progress, optimizer scalars, identity, the machine's profile and
                                 implementations of ops, and a sha256 of each safetensors file above

A directory is written under a temporary name, synced and renamed, so it is never incomplete. An old directory
is renamed before it is removed. Files are safetensors and JSON, never pickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError, CheckpointError, ResourceError, bullets
from veneer.files.atomic import flush_folder, replace_file
from veneer.files.safetensors import encode_tensors, read_tensors
from veneer.ops.dispatch import choices
from veneer.ops.profile import processor_name, profile, profile_from, use_profile

_PREFIX = "step-"
_VERSION = 1


@dataclass
class Progress:
    """The progress of a run.

    recent: (Σ NLL, trained tokens or pairs) of the last steps
    evaluated: the last step after which the held-out rows were scored; −1 if they were never scored
    waited: number of evaluations since the best evaluation
    first_loss: validation loss before the first step, which is the loss of the base
    last_loss: validation loss of the last evaluation"""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    recent: list[tuple[float, int]] = field(default_factory=list)
    evaluated: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    waited: int = 0
    stopped: str = ""

    @property
    def loss(self) -> float | None:
        """Return the mean loss of the last steps, per trained token or pair; None before the first step."""
        trained = sum(n for _, n in self.recent)
        return sum(nll for nll, _ in self.recent) / trained if trained else None

    def metrics(self) -> dict[str, Any]:
        """Return an unfinished run's metrics for the card.

        The validation losses are included if the held-out rows were scored after this step."""
        scored = self.last_loss if self.evaluated == self.step else None
        values = {"steps": self.step, "training_loss": self.loss, "validation_loss": scored}
        values |= {"validation_loss_before": self.first_loss if scored is not None else None}
        return {name: value for name, value in values.items() if value is not None}


def save(
    directory: Path,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    keep: int = 2,
    newest: int = 1,
    shared: bool = False,
    metadata: Mapping[str, Any] | None = None,
    devices: int = 1,
    conditions: Mapping[str, Any] | None = None,
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Write the state after `progress.step`, and remove old checkpoints.

    The best checkpoint remains, as do the newest `keep` checkpoints that are not shared, and the newest
    `newest` checkpoints, shared or not.

    parameters: the trained tensors, and other tensors of the adapter outside the optimizer (moving averages)
    identity: JSON values that must be the same in a run that resumes from the checkpoint: data, base
    shared: whether this checkpoint was requested by another run in the group and not by this one
    metadata: stored, but not compared
    devices: number of devices, which can be different in a resumed run
    conditions: further values that, like the environment, must be equal for bit-for-bit equal results
    fill: function that writes further files into the given folder

    An existing checkpoint of this step is not changed, because a run is a function of its step. Raises
    ResourceError if the disk is full. Existing checkpoints then remain, and no incomplete file is left."""
    final = directory / f"{_PREFIX}{progress.step:08d}"
    if final.is_dir():
        return final
    tensors, scalars = _optimizer_out(optimizer, parameters)
    files = {
        "adapter.safetensors": {name: p.detach() for name, p in parameters.items()},
        "optimizer.safetensors": tensors,
        "random.safetensors": rng_state(),
    }
    with disk_errors(final):
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        temporary = directory / f".{final.name}.tmp"
        try:
            temporary.mkdir()
            digests = {name: _write(temporary / name, encode_tensors(content)) for name, content in files.items()}
            state = {
                "version": _VERSION,
                "progress": asdict(progress),
                "optimizer": scalars,
                "identity": dict(identity),
                "about": dict(metadata or {}),
                "extra": shared,
                "environment": environment(devices) | dict(conditions or {}),
                "machine": {"profile": asdict(profile()), "ops": _chosen_ops()},
                "files": digests,
            }
            if fill is not None:
                fill(temporary)
            _write(temporary / "state.json", [(json.dumps(state, indent=1, sort_keys=True) + "\n").encode()])
            os.rename(temporary, final)
            flush_folder(directory)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _prune(directory, keep, newest, progress.best_step)
    return final


def latest(directory: Path) -> Path | None:
    """Return the newest checkpoint in `directory`, or None."""
    return next(reversed(by_step(directory).values()), None)


def by_step(directory: Path) -> dict[int, Path]:
    """Return step -> checkpoint for all checkpoints in `directory`, oldest first."""
    folders = sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())
    return {int(path.name[len(_PREFIX) :]): path for path in folders if path.name[len(_PREFIX) :].isdigit()}


def at_step(directory: Path, step: int) -> Path:
    """Return the checkpoint of `step`. Raises CheckpointError if the checkpoint does not exist."""
    path = directory / f"{_PREFIX}{step:08d}"
    if not path.is_dir():
        raise CheckpointError(f"the checkpoint of step {step} is gone", where=str(path))
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the checkpoint's `state.json`, after verifying the digest of every file."""
    fix = f"delete {path} and resume from the previous checkpoint"
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["version"] != _VERSION:
            text = f"the checkpoint has version {state['version']}, but this version of veneer reads version {_VERSION}"
            raise CheckpointError(
                text, where=str(path), fix="resume with the version of veneer that wrote the checkpoint"
            )
        for name, digest in state["files"].items():
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
                raise CheckpointError(f"{name} is damaged: its digest differs", where=str(path), fix=fix)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}", where=str(path), fix=fix) from error
    return state


class Restored(NamedTuple):
    """What `restore` returns about a checkpoint.

    notes: a sentence for each difference of the environment (torch, threads, devices) that can prevent
        bit-for-bit equality
    metadata: the argument of `save`"""

    progress: Progress
    notes: list[str]
    metadata: Mapping[str, Any]


def restore(
    path: Path,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    devices: int = 1,
    conditions: Mapping[str, Any] | None = None,
) -> Restored:
    """Restore parameters, optimizer and random generators, or raise an error and change nothing.

    Raises CheckpointError, with the differing keys, if `identity` differs."""
    state = read_checkpoint(path)
    if changes := differences(state["identity"], json.loads(json.dumps(dict(identity)))):
        text = f"the checkpoint belongs to another run:\n{bullets(changes, None)}"
        fix = "resume with the settings and data that the run began with, or choose a new output directory"
        raise CheckpointError(text, where=str(path), fix=fix)
    tensors = _read_parameters(path, parameters)
    previous_rng = rng_state()
    try:
        saved_optimizer = _load(path / "optimizer.safetensors")
        optimizer_state = _optimizer_state(optimizer, parameters, saved_optimizer, state["optimizer"])
        saved = state["progress"]
        progress = Progress(**{**saved, "recent": [tuple(pair) for pair in saved["recent"]]})
        current = environment(devices) | dict(conditions or {})
        notes = [
            f"{key} was {value!r} and is {current[key]!r}: results can differ in the last bits"
            for key, value in ({"devices": 1} | state["environment"]).items()
            if key in current and current[key] != value
        ]
        rng_restore(_load(path / "random.safetensors"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        rng_restore(previous_rng)
        text = f"the checkpoint cannot be restored: {type(error).__name__}: {error}"
        fix = f"delete {path} and resume from the previous checkpoint"
        raise CheckpointError(text, where=str(path), fix=fix) from error
    optimizer.load_state_dict(optimizer_state)
    _copy_into(tensors, parameters)
    return Restored(progress, notes, state.get("about", {}))


def read_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Restore the checkpoint's trained parameters into `parameters`, and nothing else."""
    read_checkpoint(path)
    _copy_into(_read_parameters(path, parameters), parameters)


def environment(devices: int = 1) -> dict[str, Any]:
    """Return the properties of the environment that affect bit-for-bit reproducibility."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor_name(),
    }


def _chosen_ops() -> dict[str, str]:
    """Return op -> the implementations that run it on this processor under the profile in use; {} with a GPU."""
    return {} if torch.cuda.is_available() else {op: choice.name for op, choice in choices("cpu").items()}


@contextmanager
def machine_of(path: Path, *, allow_other: bool, note: Callable[[str], None]) -> Iterator[None]:
    """Use a checkpoint's profile inside a with-block, so that the same implementations run as before.

    allow_other: what to do if this machine would run an op with another implementation. True: use this machine's
        own profile, and emit a note. False: raise CheckpointError, which names the op.

    If the checkpoint has no readable profile, this machine's profile is used."""
    try:
        saved = json.loads((path / "state.json").read_text(encoding="utf-8"))["machine"]
        known, ops = profile_from(saved["profile"]), {str(op): str(name) for op, name in saved["ops"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known, ops = None, {}
    with ExitStack() as stack:
        if known is not None:
            stack.enter_context(use_profile(known))
            here = _chosen_ops()
            other = [f"{op} ({name} there, {here[op]} here)" for op, name in ops.items() if here.get(op, name) != name]
            if other and not allow_other:
                text = f"this machine would run {len(other)} of the checkpoint's ops differently: {', '.join(other)}"
                fix = "resume on a machine like the first one, or add --allow-other-machine (the last bits then differ)"
                raise CheckpointError(text, where=str(path), fix=fix)
            if other:
                stack.close()
                note(f"other implementations than before run {', '.join(other)}: results differ in the last bits")
        yield


# --- random generators ------------------------------------------------------------------------------------------


def seed_all(*key: int | str) -> None:
    """Seed the generators of torch and Python with a digest of `key`, the same on every device."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    random.seed(seed)


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a generator with the state that torch's generator has after `seed_all`."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """Return a 63-bit seed, a hash of the key, which is the same on every machine."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()) >> 1


def rng_state() -> dict[str, Tensor]:
    """Return the state of torch's and Python's generators."""
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def rng_restore(state: Mapping[str, Tensor]) -> None:
    """Restore a state returned by `rng_state`."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{i}"], i)


# --- files ------------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Convert OSErrors while writing `where` to ResourceError (disk full) or CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            fix = "free some space, then run the same command with --resume; complete checkpoints are intact"
            raise ResourceError("the disk is full", where=str(where), fix=fix) from error
        text = f"cannot write: {error}"
        raise CheckpointError(text, where=str(where), fix="check the path and its permissions") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises the errors of `disk_errors`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # left by a killed run
            left.unlink(missing_ok=True)
        replace_file(path, [content])


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a file, and return the sha256 of its contents."""
    digest = hashlib.sha256()

    def hashed_chunks() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    replace_file(path, hashed_chunks())
    return digest.hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # Values that are not finite are allowed, because an optimizer can contain infinities and the loop has
        # checked the parameters.
        return read_tensors(path)[0]
    except AdapterError as error:
        raise CheckpointError(f"cannot be read: {error.what}", where=str(path)) from error


def _sweep(directory: Path) -> None:
    """Remove incomplete directories that a killed run left."""
    for leftover in directory.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def is_shared(path: Path) -> bool:
    """Return whether only other runs of the group requested a checkpoint; False if it is unreadable."""
    try:
        return bool(json.loads((path / "state.json").read_text(encoding="utf-8")).get("extra"))
    except (OSError, ValueError):
        return False


def _prune(directory: Path, keep: int, newest: int, best_step: int | None) -> None:
    """Remove old checkpoints.

    Each remaining checkpoint names the best checkpoint up to its step. These best checkpoints are kept too,
    because a resumed run can need them."""
    checkpoints = list(by_step(directory).values())
    recent = {*[path for path in checkpoints if not is_shared(path)][-max(1, keep) :], *checkpoints[-newest:]}
    bests = {best_step}
    for path in recent:
        try:
            bests.add(json.loads((path / "state.json").read_text(encoding="utf-8"))["progress"]["best_step"])
        except (OSError, ValueError, KeyError):
            continue
    best_names = {f"{_PREFIX}{step:08d}" for step in bests if step is not None}
    for path in checkpoints:
        if path in recent or path.name in best_names:
            continue
        doomed = directory / f".{path.name}.tmp"
        try:
            os.rename(path, doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)


# --- optimizer and parameters -----------------------------------------------------------------------------------


def _read_parameters(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors for `parameters`.

    Raises CheckpointError if names, shapes or dtypes differ."""
    tensors = _load(path / "adapter.safetensors")
    wrong = [f"{name}: not in the run" for name in sorted(tensors.keys() - parameters.keys())]
    wrong += [f"{name}: not in the checkpoint" for name in sorted(parameters.keys() - tensors.keys())]
    wrong += [
        f"{name}: {tuple(tensors[name].shape)} {tensors[name].dtype} in the checkpoint, {tuple(p.shape)} {p.dtype} here"
        for name, p in sorted(parameters.items())
        if name in tensors and (tensors[name].shape != p.shape or tensors[name].dtype != p.dtype)
    ]
    if wrong:
        text = f"the parameters of the checkpoint and the run differ:\n{bullets(wrong, None)}"
        raise CheckpointError(text, where=str(path))
    return tensors


def _copy_into(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _optimizer_out(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors, and its scalars and groups as JSON values.

    Each tensor has the key "<parameter>|<entry>"."""
    names = {id(p): name for name, p in parameters.items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key not in {"params", "names"}}
        | {"names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"kind": type(optimizer).__name__, "groups": groups, "scalars": scalars}


def _optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a state for `optimizer.load_state_dict`.

    Raises CheckpointError for another optimizer or other parameter groups."""
    by_id = {id(p): name for name, p in parameters.items()}
    current = [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if scalars["kind"] != type(optimizer).__name__ or [g["names"] for g in scalars["groups"]] != current:
        text = f"the checkpoint's optimizer is {scalars['kind']} with other parameter groups, "
        text += f"not this run's {type(optimizer).__name__}"
        raise CheckpointError(text)
    position = {name: i for i, name in enumerate(name for names in current for name in names)}
    entries: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars["scalars"].items()}
    for key, value in tensors.items():
        name, entry = key.rsplit("|", 1)
        entries.setdefault(name, {})[entry] = value
    at, groups = 0, []
    for group, names in zip(scalars["groups"], current, strict=True):
        values = {k: tuple(v) if isinstance(v, list) and k != "names" else v for k, v in group.items()}
        groups.append(values | {"params": list(range(at, at + len(names)))})
        at += len(names)
    state = {position[name]: values for name, values in entries.items()}
    return {"state": state, "param_groups": groups}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for each key with different values. Nested keys are joined by dots."""
    lines: list[str] = []
    for key in sorted(saved.keys() | current.keys()):
        a, b = saved.get(key), current.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} in the checkpoint, {json.dumps(b)} now")
    return lines
