"""Saved checkpoints of a training client: paths, files, library versions.

    tinker://<run>/weights/<name>              training state on the server's disk, with optimizer state
    tinker://<run>/sampler_weights/<name>      weights to sample from

Each checkpoint is also an adapter in the library, a version of the run's name. A file in the run's folder
maps the checkpoint to the version. A checkpoint expires after its time to live.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, ConfigError
from veneer.files.atomic import atomic_write
from veneer.library.library import Library
from veneer.models.text.base import TextBase
from veneer.train.text.save import write_adapter

_log = logging.getLogger("veneer.tinker")

_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""Part of a path -> Tinker's checkpoint type. No new checkpoints have external weights."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SavedWeights:
    """A saved checkpoint.

    id: kind and name, as in the path
    seq: number of the request that saved the checkpoint
    reference: the library version that has the checkpoint's adapter
    made, expires: seconds since 1970; `expires` is None if the checkpoint never expires"""

    id: str
    run: str
    seq: int
    reference: str
    digest: str
    bytes: int
    made: float
    expires: float | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.id}"

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= time.time()

    def to_json(self) -> dict[str, Any]:
        """Return the checkpoint in Tinker's format."""
        return {
            "checkpoint_id": self.id,
            "checkpoint_type": _KINDS[self.id.partition("/")[0]],
            "time": _date(self.made),
            "tinker_path": self.path,
            "size_bytes": self.bytes,
            "public": False,
            "user_metadata": self.metadata,
            "expires_at": None if self.expires is None else _date(self.expires),
        }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def parse_path(path: str) -> tuple[str, str]:
    """Return (run, checkpoint id) of a tinker:// path. Raises ConfigError."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in _KINDS:
        message = f"{path[:200]!r} is not a checkpoint path"
        raise ConfigError(message, where="path", fix="tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME")
    return parts[0], f"{parts[1]}/{parts[2]}"


class Checkpoints:
    """The checkpoints of one run, stored in the run's folder.

    A checkpoint's training state is in the folder `state` of the checkpoint's folder.

    name: the name of the run's adapters in the library."""

    def __init__(self, run: str, folder: Path, name: str, library: Library) -> None:
        self.run, self.folder, self.name, self.library = run, folder, name, library

    def all(self) -> list[SavedWeights]:
        """Return the checkpoints that have not expired, oldest first."""
        return sorted((each for each in self._stored() if not each.expired), key=lambda each: (each.made, each.id))

    @property
    def empty(self) -> bool:
        """Whether the folder has no checkpoints, neither readable nor damaged."""
        return not any(self.folder.glob("*/*/about.json"))

    def find(self, id: str) -> SavedWeights | None:
        saved = self._read(self.folder / id / "about.json") if self._is_valid(id) else None
        return None if saved is None or saved.expired else saved

    def check_name(self, id: str) -> None:
        """Raise ConfigError unless a new checkpoint can have this id."""
        if not self._is_valid(id):
            message = f"{id.partition('/')[2][:100]!r} is not a valid checkpoint name"
            fix = "at most 100 letters, digits and . _ -; the first is a letter or digit"
            raise ConfigError(message, where="path", fix=fix)

    def save(
        self, id: str, seq: int, adapter: Adapter, base: TextBase, ttl: int | None, metadata: Mapping[str, str] | None
    ) -> SavedWeights:
        """Save a checkpoint, and add its adapter to the library.

        The checkpoint is complete when this method returns."""
        with tempfile.TemporaryDirectory() as temporary:
            files = Path(temporary) / "adapter"
            digest = write_adapter(adapter, files, base)
            size = sum(path.stat().st_size for path in files.iterdir())
            reference = self.library.add(files, self.name, source=f"tinker://{self.run}/{id}").version.reference
        now, previous = time.time(), self.find(id)
        expires = None if ttl is None else now + ttl
        saved = SavedWeights(id, self.run, seq, reference, digest, size, now, expires, metadata or None)
        (self.folder / id).mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / id / "about.json", [json.dumps(asdict(saved)).encode()])
        if previous is not None:
            self._remove_adapter(previous.reference)
        return saved

    def remove(self, saved: SavedWeights) -> None:
        """Remove a checkpoint, and remove its adapter from the library.

        The adapter stays if another checkpoint uses the same version or an alias points to the version."""
        (self.folder / saved.id / "about.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / saved.id, ignore_errors=True)
        self._remove_adapter(saved.reference)

    def _remove_adapter(self, reference: str) -> None:
        """Remove a version from the library, unless another checkpoint uses it."""
        if all(checkpoint.reference != reference for checkpoint in self.all()):
            with suppress(AdapterError):  # an alias points to the version, or the version was already removed
                self.library.remove(reference)

    def sweep(self) -> None:
        """Remove expired checkpoints."""
        for saved in self._stored():
            if saved.expired:
                self.remove(saved)

    def _stored(self) -> list[SavedWeights]:
        stored = [self._read(path) for path in self.folder.glob("*/*/about.json")]
        return [saved for saved in stored if saved is not None]

    def _is_valid(self, id: str) -> bool:
        kind, _, name = id.partition("/")
        return kind in _KINDS and _NAME.fullmatch(name) is not None

    def _read(self, path: Path) -> SavedWeights | None:
        try:
            return SavedWeights(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            _log.error("the checkpoint in %s is not available: about.json cannot be read", path.parent)
            return None
