"""What a training client saved: its names, and where it is.

    tinker://<run>/weights/<name>              to go on from: a state on the server's disk, with the optimiser's
    tinker://<run>/sampler_weights/<name>      to sample from
    tinker://<run>/external_weights/<name>     to download

Each is an adapter of the library too, a version of the run's name there, and downloads as PEFT's files; what
is beside it in the run's folder says which. One that has a time to live is not there after it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, ConfigError
from veneer.files.atomic import atomic_write
from veneer.library.library import Library
from veneer.models.text.base import TextBase
from veneer.train.text.save import write_adapter

_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""What stands in a path -> what Tinker calls it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_YEARS = 10 * 366 * 86400


@dataclass(frozen=True)
class SavedWeights:
    """`id`: kind and name, as in its path. `seq`: of the request that made it. `reference`: in the library.
    `made`, `expires`: seconds since 1970; None: never."""

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

    def shown(self) -> dict[str, Any]:
        """As Tinker tells it."""
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
    """(run, id) of a tinker:// path. Raises ConfigError."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in _KINDS:
        what = f"{path[:200]!r} is no path of a checkpoint"
        raise ConfigError(what, where="path", fix="tinker://RUN/weights/NAME, or sampler_weights in its middle")
    return parts[0], f"{parts[1]}/{parts[2]}"


class Checkpoints:
    """Those of one run, in its folder. `name`: what the run is called in the library."""

    def __init__(self, run: str, folder: Path, name: str, library: Library) -> None:
        self.run, self.folder, self.name, self.library = run, folder, name, library

    def all(self) -> list[SavedWeights]:
        """The oldest first."""
        found = [self._read(path) for path in self.folder.glob("*/*/about.json")]
        return sorted((each for each in found if each is not None), key=lambda each: (each.made, each.id))

    def find(self, id: str) -> SavedWeights | None:
        return self._read(self.folder / id / "about.json") if self._sound(id) else None

    def state(self, id: str) -> Path:
        """Where the training state of one is."""
        return self.folder / id / "state"

    def place(self, kind: str, name: str) -> Path:
        """The folder of one that is to be made. Raises ConfigError for a name that cannot be one."""
        if not self._sound(f"{kind}/{name}"):
            what = f"{name[:100]!r} cannot name a checkpoint"
            raise ConfigError(what, where="path", fix="letters, digits and . _ - between them, at most 100")
        return self.folder / kind / name

    def put(
        self,
        kind: str,
        name: str,
        seq: int,
        adapter: Adapter,
        base: TextBase,
        *,
        ttl: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SavedWeights:
        """Into the library; whole once this is back."""
        place = self.place(kind, name)
        if ttl is not None and not 3600 <= ttl <= _YEARS:
            raise ConfigError(f"ttl_seconds is {ttl}", where="ttl_seconds", fix="from an hour to ten years")
        with tempfile.TemporaryDirectory() as temporary:
            digest = write_adapter(adapter, Path(temporary) / "adapter", base)
            size = sum(path.stat().st_size for path in (Path(temporary) / "adapter").iterdir())
            added = self.library.add(
                Path(temporary) / "adapter", self.name, source=f"tinker://{self.run}/{kind}/{name}"
            )
        now, before = time.time(), self.find(f"{kind}/{name}")
        made = SavedWeights(
            f"{kind}/{name}",
            self.run,
            seq,
            added.version.reference,
            digest,
            size,
            now,
            None if ttl is None else now + ttl,
            dict(metadata) if metadata else None,
        )
        place.mkdir(parents=True, exist_ok=True)
        self._write(made)
        if before is not None:
            self._let_go(before.reference)
        return made

    def keep_for(self, id: str, ttl: int | None) -> None:
        """From now on; None: for good. Raises ConfigError where it is not there."""
        found = self._there(id)
        self._write(replace(found, expires=None if ttl is None else time.time() + ttl))

    def remove(self, id: str) -> None:
        """Its adapter goes too, unless another has the same version, or an alias points there. Raises
        ConfigError where it is not there."""
        found = self._there(id)
        shutil.rmtree(self.folder / id)
        self._let_go(found.reference)

    def _let_go(self, reference: str) -> None:
        """Of the library, unless another has it too."""
        if all(other.reference != reference for other in self.all()):
            with suppress(AdapterError):  # somebody promoted it, or removed it before
                self.library.remove(reference)

    def sweep(self) -> None:
        """Those whose time is over go."""
        for path in self.folder.glob("*/*/about.json"):
            if self._read(path) is None:
                data = SavedWeights(**json.loads(path.read_text(encoding="utf-8")))
                self._write(replace(data, expires=None))
                self.remove(data.id)

    def _there(self, id: str) -> SavedWeights:
        found = self.find(id)
        if found is None:
            raise ConfigError(f"the run {self.run} has no checkpoint {id[:200]!r}", where="checkpoint")
        return found

    def _sound(self, id: str) -> bool:
        kind, _, name = id.partition("/")
        return kind in _KINDS and _NAME.fullmatch(name) is not None

    def _read(self, path: Path) -> SavedWeights | None:
        try:
            found = SavedWeights(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return found if found.expires is None or found.expires > time.time() else None

    def _write(self, made: SavedWeights) -> None:
        atomic_write(self.folder / made.id / "about.json", [json.dumps(asdict(made)).encode()])
