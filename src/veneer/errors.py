"""The errors that veneer raises on purpose.

    VeneerError                 what happened, where, and how to fix it; the command line exits with `exit_code`
    ├── ConfigError             a configuration file or override: unknown key, wrong type, impossible combination
    ├── DataError               a training or evaluation file: missing, empty, malformed (with its line), wrong row
    ├── BaseError               a base that cannot be found, read or used
    ├── TargetError             a target pattern that matches nothing, or a module that does not support a pair
    ├── AdapterError            an adapter file or object: missing, extra, misshapen, not understood, not finite
    │   └── UnsafeFileError     a file refused as possibly harmful: a pickle or an invalid header
    ├── MismatchError           an adapter that belongs to another base
    ├── PreflightError          a training run that would fail, detected before step one
    ├── TrainingError           a run that failed after step one: a loss or gradient that is not finite
    │   └── NoGain              a run that ended worse than it began and has no adapter to store (exit code 3)
    ├── Interrupted             Ctrl-C or SIGTERM during training, after the state was saved (exit code 130 or 143)
    ├── CheckpointError         a checkpoint that cannot be written, read or resumed from
    ├── ResourceError           out of disk or memory
    ├── UnavailableError        a store or a database that currently does not respond
    └── MissingExtraError       an optional dependency that is not installed

Helpers for messages: `install_command` says how to install an extra; `shown` escapes text from files before
printing; `quoted`, `bullets`, `counted` and `gigabytes` format values; `nearest` finds similar names; `one_of`
checks that a value is one of a list; `lacks_memory` recognizes out-of-memory errors. This module does not import
other modules of veneer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# C0 and C1 control characters and DEL; direction overrides, embeddings and isolates; line and paragraph
# separators; surrogate halves, which terminals cannot print. The marks U+200E, U+200F and U+061C, which
# right-to-left text needs, are allowed, because they do not reorder other text.
_UNSHOWABLE = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff"
_ALL = re.compile(f"[{_UNSHOWABLE}]")
_BUT_LINES = re.compile(f"(?![\n\t])[{_UNSHOWABLE}]")


def shown(text: object, *, lines: bool = False) -> str:
    r"""Return `text` with terminal control and direction characters escaped.

    The escapes are those of JSON, such as \u001b. If printed, these characters could move the cursor, set the
    title, or recolor, hide or reorder other text.

    lines: keep line ends and tabs, for text that veneer formatted."""
    pattern = _BUT_LINES if lines else _ALL
    return pattern.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def quoted(text: str, most: int = 100) -> str:
    """Return a user's text in quotes, shortened to `most` characters."""
    return repr(text if len(text) <= most else text[:most] + "…")


def bullets(lines: Iterable[str], most: int | None = 20) -> str:
    """Return one "  - " line per item, then the number of items left out, if any.

    most: the maximum number of items to include; None includes all."""
    lines = list(lines)
    more = [] if most is None or len(lines) <= most else [f"  … and {len(lines) - most} more"]
    return "\n".join([*(f"  - {line}" for line in lines[:most]), *more])


def first_few(items: Sequence[object], most: int) -> str:
    """Return the first `most` items, comma-separated, and the number of items left out."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: `1 step`, `1,200 steps`. The plural ends in s."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def gigabytes(count: float) -> str:
    """Return a number of bytes as text in GB (10⁹ bytes) or MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class VeneerError(Exception):
    """Base class of veneer's errors.

    what: one sentence that describes the error.
    where: a file, line, key or module.
    fix: how to resolve the error.
    already_shown: whether another process of the same run has already printed the error."""

    exit_code = 2
    already_shown = False

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__(shown("\n".join(lines), lines=True))


class ConfigError(VeneerError):
    """An unknown configuration key, an invalid value or an impossible combination."""


class DataError(VeneerError):
    """A missing, empty or malformed data file; `where` names the file and the line."""


class BaseError(VeneerError):
    """A base cannot be found, read or used."""


class TargetError(VeneerError):
    """A target matches no module, or matches a module that does not support a pair."""


class AdapterError(VeneerError):
    """A part of an adapter is missing, extra, misshapen, not finite or unknown."""


class UnsafeFileError(AdapterError):
    """A file is refused as possibly harmful: a pickle or an invalid header."""


class MismatchError(VeneerError):
    """An adapter belongs to another base.

    The message contains both fingerprints and the first shapes that differ."""


class PreflightError(VeneerError):
    """A check before step one found a run that would fail or train nothing."""


class TrainingError(VeneerError):
    """A run failed after step one.

    The message names the step and the rows. Earlier checkpoints are intact."""


class NoGain(TrainingError):
    """A run ended, and its held-out loss was never lower than at the start.

    The run's checkpoints are kept."""

    exit_code = 3


class Interrupted(VeneerError):
    """Ctrl-C or SIGTERM stopped a run after its state was saved.

    `fix` says how to resume.

    signal: the signal's number: 2 for Ctrl-C, 15 for SIGTERM. The exit code is 128 + signal, as in a shell.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, signal: int = 2) -> None:
        super().__init__(what, where=where, fix=fix)
        self.signal = signal
        self.exit_code = 128 + signal


class CheckpointError(VeneerError):
    """A checkpoint cannot be written, read or resumed from."""


class ResourceError(VeneerError):
    """The disk or the memory is full."""


class UnavailableError(VeneerError):
    """A store or a database currently does not respond; a later attempt can succeed."""


class MissingExtraError(VeneerError):
    """An optional dependency is missing; `fix` is the command that installs it.

    extra: the extra of veneer that has the dependency; sets `fix`."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, extra: str = "") -> None:
        super().__init__(what, where=where, fix=install_command(extra) if extra else fix)


def install_command(extras: str = "", *, bases: bool = False) -> str:
    """Return the command that installs these extras from where this veneer was installed.

    pip and uv record a clone, a wheel file or a repository in direct_url.json (PEP 610); without this file,
    veneer is from a package index.

    extras: comma-separated.
    bases: install the distribution of image bases instead."""
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        known = distribution("veneer")
        version, origin = known.version, json.loads(known.read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a clone on PYTHONPATH
        version, origin = "", {"url": Path(__file__).resolve().parents[2].as_uri(), "dir_info": {"editable": True}}
    url, git, name = origin.get("url", ""), origin.get("vcs_info"), "veneer-bases" if bases else "veneer"
    named = f"[{extras}]" if extras else ""
    what = f"{name}{named}=={version}"
    if git:
        what = f"{name}{named} @ {git['vcs']}+{url}@{git['commit_id']}{'#subdirectory=src/veneer_bases' * bases}"
    elif url:
        place = url2pathname(urlsplit(url).path) if url.startswith("file:") else url
        if bases and "dir_info" in origin:
            place += "/src/veneer_bases"
        elif bases:  # the wheel that was built into the same folder
            place = re.sub(r"veneer-(?=[^/\\]*$)", "veneer_bases-", place)
        what = f"{'.' if place == os.getcwd() else place}{named}"
    editable = origin.get("dir_info", {}).get("editable") and not bases
    return f'pip install {"-e " * bool(editable)}"{what}"'


_MOST_EDITS = 3


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` entries of `known` that `name` could be a typo of.

    The nearest entry comes first. An entry matches within one edit per three characters, and within three
    edits in total. All "did you mean" hints come from this function."""
    found = []
    for each in dict.fromkeys(known):
        most = min(_MOST_EDITS, max(len(name), len(each)) // 3)
        if abs(len(name) - len(each)) <= most and (edits := _edits(name.casefold(), each.casefold(), most)) <= most:
            found.append((edits, each))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])[:n]]


def _edits(a: str, b: str, most: int) -> int:
    """Return the edit distance of `a` and `b` (optimal string alignment).

    If the distance is above `most`, returns any number above `most`. An edit inserts, deletes or replaces a
    character, or swaps two neighboring characters."""
    far = [most + 1] * (len(b) + 1)  # a cell more than `most` away from the diagonal needs more than `most` edits
    before, row = far, list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, before, row = before, row, far.copy()
        row[0] = i
        for j in range(max(1, i - most), min(len(b), i + most) + 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != b[j - 1]))
            if i > 1 and j > 1 and x == b[j - 2] and b[j - 1] == a[i - 2]:
                edits = min(edits, last[j - 2] + 1)
            row[j] = edits
        if min(row) > most and min(before) > most:
            return most + 1
    return row[-1]


def one_of(value: str, known: Iterable[str], what: str, where: str) -> None:
    """Raise ConfigError, with the nearest match, unless `value` is one of `known`.

    what: the expected kind with its article, for example "a quantization" in "'nf5' is not a quantization".
    where: the option or key."""
    words = list(known)
    if value not in words:
        near = nearest(value.lower(), words, 1)
        meant = f"did you mean {near[0]}? " if near and len(words) > 1 else ""
        raise ConfigError(
            f"{quoted(value)} is not {what}", where=where, fix=f"{meant}Choose one of {first_few(words, 20)}"
        )


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, in Python or torch.

    torch's errors are recognized by name and text, because torch might not be imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
