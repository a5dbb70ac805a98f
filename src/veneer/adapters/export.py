"""Export a mix of adapters, merged into its base, for another program.

    with exported(base, ["support@prod"], "support.gguf", target="gguf", kind="q4_k_m") as export:
        model = export.load()        the exported weights, read back from the new file and dequantized

The export is written under a temporary name and renamed at the end of the with-block, so that the caller can
measure the result first; an error in the block removes the temporary files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from veneer.adapters import use as using
from veneer.adapters.merge import merged_model
from veneer.adapters.ollama import modelfile
from veneer.errors import ConfigError
from veneer.files.atomic import Staged, as_veneer_errors, atomic_write
from veneer.models.text.base import TextBase
from veneer.models.text.gguf import load_gguf
from veneer.models.text.gguf_write import TYPES, write_gguf_model

_GGUF_FILE = "model.gguf"


@dataclass
class Export:
    """A finished export under a temporary name.

    temporary, path: where the export is, and where it will be.
    types: number of tensors of each type.
    system: a system message to include, if the target has a place for it."""

    base: TextBase
    target: str
    kind: str
    temporary: Path
    path: Path
    name: str
    system: str = ""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bytes: int = 0

    def load(self) -> TextBase:
        """Return the base with the exported weights instead of its own, in the base's dtype."""
        model = TARGETS[self.target].load(self).to(self.base.device)  # type: ignore[arg-type]
        return replace(self.base, model=model.eval().requires_grad_(False))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "for": self.target,
            "type": self.kind,
            "base": self.base.name,
            "adapters": self.adapters,
            "bytes": self.bytes,
            "tensors": self.types,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Target:
    """A program to export for.

    types: accepted types of weights, the default first.
    ending: suffix of the file, or "" for a folder.
    write: writes a merged model (float32) to `export.temporary`.
    load: reads the written model back."""

    types: Sequence[str]
    ending: str
    write: Callable[[Export, Any], None]
    load: Callable[[Export], Any]


def _write_gguf(export: Export, model: Any, file: Path | None = None) -> None:
    export.types = dict(write_gguf_model(file or export.temporary, model, export.base, export.kind, export.name))


def _load_gguf(export: Export) -> Any:
    file = export.temporary if export.temporary.is_file() else export.temporary / _GGUF_FILE
    return load_gguf(file, export.base.dtype)


def _write_ollama(export: Export, model: Any) -> None:
    text, export.notes = modelfile(export.base, _GGUF_FILE, export.system)
    export.temporary.mkdir()
    _write_gguf(export, model, export.temporary / _GGUF_FILE)
    atomic_write(export.temporary / "Modelfile", [text.encode()])


TARGETS: Mapping[str, Target] = {
    "gguf": Target(tuple(TYPES), ".gguf", _write_gguf, _load_gguf),
    "ollama": Target(tuple(TYPES), "", _write_ollama, _load_gguf),
}
"""Name for --for -> how to export. To add a target, add a row."""


def export_path(names: Sequence[str], output: str | Path | None, target: str, kind: str, force: bool) -> Path:
    """Return the path of an export, by default named like the first adapter, in the current folder.

    Raises ConfigError for an unknown target or type, or if the path exists and `force` is false."""
    if target not in TARGETS:
        raise ConfigError(f"--for {target!r} is not a known target", fix=f"one of: {', '.join(TARGETS)}")
    if kind not in TARGETS[target].types:
        fix = f"one of: {', '.join(TARGETS[target].types)}"
        raise ConfigError(f"--type {kind!r} is not a type for {target}", fix=fix)
    stem = Path(using.parse_spec(names[0])[0]).name.partition("@")[0]
    path = Path(output or f"{stem}-{kind}{TARGETS[target].ending or f'-{target}'}")
    if (path.exists() or path.is_symlink()) and not force:
        raise ConfigError("the output exists", where=str(path), fix="another -o, or --force to replace it")
    if path.exists() and path.is_dir() == bool(TARGETS[target].ending):
        kinds = "a file" if TARGETS[target].ending else "a folder"
        raise ConfigError(f"the output is not {kinds}, so it is not replaced", where=str(path), fix="another -o")
    return path


@contextmanager
def exported(
    base: TextBase,
    adapters: Sequence[using.AdapterSpec],
    output: str | Path,
    *,
    target: str,
    kind: str,
    system: str = "",
    force: bool = False,
    allow_other_base: bool = False,
) -> Iterator[Export]:
    """Merge `adapters` into `base`, write the result for `target`, and yield it; see the module's docstring.

    The sum is computed in float32. The base does not change. Raises the errors of `export_path`, of reading
    adapters and of the target's writer."""
    if not adapters:
        raise ConfigError("there is nothing to export", fix="name at least one adapter")
    specs = [using.parse_spec(a) for a in adapters]
    path = export_path([name for name, _ in specs], output, target, kind, force)
    with as_veneer_errors(path):
        staged = Staged.next_to(path)
    temporary = staged.temporary
    name = " + ".join(Path(n).name if s == 1 else f"{Path(n).name}:{s:g}" for n, s in specs)
    export = Export(base, target, kind, temporary, path, name, system)
    try:
        with as_veneer_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with using.attach_adapters(base, specs, allow_other_base=allow_other_base) as attachment:
                digests = {n: attachment.adapters[n].digest() for n, _ in specs}
                export.adapters = [{"name": n, "strength": s, "digest": digests[n]} for n, s in specs]
                model = merged_model(base.model, attachment.selection.mix, torch.float32)
            TARGETS[target].write(export, model)
            del model
            files = [f for f in (temporary, *temporary.rglob("*")) if f.is_file()]
            export.bytes = sum(f.stat().st_size for f in files)
        yield export
        with as_veneer_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            staged.commit()
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        staged.discard()
