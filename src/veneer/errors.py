"""Every error veneer raises on purpose.

    VeneerError                 what happened, where, and what to do about it; the command line exits with `exit_code`
    ├── ConfigError             a configuration file or override: unknown key, wrong type, impossible combination
    ├── DataError               a training or evaluation file: missing, empty, malformed (with its line), wrong row
    ├── BaseError               a base cannot be found, read or used
    ├── TargetError             a target pattern that matches nothing, or something that cannot carry a pair
    ├── AdapterError            an adapter file or object: missing, extra, misshapen, not understood, not finite
    │   └── UnsafeFileError     a file that is not opened at all: a pickle, a header that lies, a path that escapes
    ├── MismatchError           an adapter that belongs to another base
    ├── PreflightError          a training run that would go wrong, seen before step one
    ├── TrainingError           a run that went wrong after step one: a loss or gradient that is not finite
    │   └── NoGain              a run that ended worse than it began: there is no adapter to keep (exit code 3)
    ├── Interrupted             Ctrl-C or SIGTERM during training, after the state was saved (exit code 130 or 143)
    ├── CheckpointError         a checkpoint that cannot be written, read or resumed from
    ├── ResourceError           out of disk or memory
    ├── UnavailableError        a store or a database that does not answer now, whatever was asked of it
    └── MissingExtraError       an optional dependency that is not installed

And what messages are made with: `shown`, through which every text of a file goes before a person sees it, `quoted`,
`bullets`, `counted`, `gigabytes`, `nearest`; `one_of`, which checks a word; and `lacks_memory`, by which everybody
tells that memory ran out. Imports nothing of veneer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# C0 and C1 controls and DEL; the overrides, embeddings and isolates of direction; the line and paragraph separators;
# halves of surrogate pairs, which no terminal can print. The marks that right-to-left text needs (U+200E, 200F, 061C)
# change nothing beside them and stay.
_UNSHOWABLE = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff"
_ALL = re.compile(f"[{_UNSHOWABLE}]")
_BUT_LINES = re.compile(f"(?![\n\t])[{_UNSHOWABLE}]")


def shown(text: object, *, lines: bool = False) -> str:
    """`text` as a terminal may have it: what would move its cursor, set its title, recolour, hide or reorder what is
    beside it is written out as JSON does, `\\u001b`. `lines`: line ends and tabs stay, for text that we laid out."""
    pattern = _BUT_LINES if lines else _ALL
    return pattern.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def quoted(text: str, most: int = 100) -> str:
    """Somebody's own word in a message: in quotes, and no longer than a line has room for."""
    return repr(text if len(text) <= most else text[:most] + "…")


def bullets(lines: Iterable[str], most: int | None = 20) -> str:
    """A line of a message for each; of more than `most` the first, and how many more there are. None: every one."""
    lines = list(lines)
    more = [] if most is None or len(lines) <= most else [f"  … and {len(lines) - most} more"]
    return "\n".join([*(f"  - {line}" for line in lines[:most]), *more])


def first_few(items: Sequence[object], most: int) -> str:
    """The first of them, with commas between, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def counted(count: int, noun: str) -> str:
    """How many there are of a thing whose plural ends in s: `1 step`, `1,200 steps`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def gigabytes(count: float) -> str:
    """Bytes as GB (10⁹), or MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class VeneerError(Exception):
    """Base of all errors. `what` is one sentence, `where` a file, line, key or module, `fix` the way out.
    `already_shown`: another process of the same run has shown it to the person already."""

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
    """Raised when a configuration has an unknown key, a value of the wrong kind or an impossible combination."""


class DataError(VeneerError):
    """Raised when a data file is missing, empty or malformed; `where` names the file and the line."""


class BaseError(VeneerError):
    """Raised when a base cannot be found, read or used."""


class TargetError(VeneerError):
    """Raised when a target matches no module, or matches one that cannot carry a pair."""


class AdapterError(VeneerError):
    """Raised when an adapter has anything missing, extra, misshapen, not finite or not understood."""


class UnsafeFileError(AdapterError):
    """Raised for a file that is refused unread: a pickle, a header that lies about its size, a path that escapes."""


class MismatchError(VeneerError):
    """Raised when an adapter belongs to another base; names both fingerprints and the first shapes that differ."""


class PreflightError(VeneerError):
    """Raised before step one when a run would train nothing, the wrong thing, or not fit."""


class TrainingError(VeneerError):
    """Raised when a run goes wrong after step one; names the step and the rows. No checkpoint is harmed."""


class NoGain(TrainingError):
    """Raised at the end of a run whose held-out loss was never below that of before step one; its checkpoints stay."""

    exit_code = 3


class Interrupted(VeneerError):
    """Raised when a person or the machine asks a run to stop; the state is saved, `fix` says how to go on. `signal`: by
    which signal's number; 2 is Ctrl-C's, 15 SIGTERM's. The exit code is 128 more, as a shell has it."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, signal: int = 2) -> None:
        super().__init__(what, where=where, fix=fix)
        self.signal = signal
        self.exit_code = 128 + signal


class CheckpointError(VeneerError):
    """Raised when a checkpoint cannot be written, read or resumed from."""


class ResourceError(VeneerError):
    """Raised when the disk or the memory is exhausted."""


class UnavailableError(VeneerError):
    """Raised when a store or a database does not answer now: trying again later may do."""


class MissingExtraError(VeneerError):
    """Raised when an optional dependency is missing; `fix` is the command that installs it."""


_MOST_EDITS = 3


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` entries of `known` that `name` may be a typing error for, nearest first.

    Entries are within one edit per three characters, and within three edits in total. All "did you mean" hints come
    from this function."""
    found = []
    for each in dict.fromkeys(known):
        most = min(_MOST_EDITS, max(len(name), len(each)) // 3)
        if abs(len(name) - len(each)) <= most and (edits := _edits(name.casefold(), each.casefold(), most)) <= most:
            found.append((edits, each))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])[:n]]


def _edits(a: str, b: str, most: int) -> int:
    """Return the edit distance of `a` and `b` (optimal string alignment); any number above `most` if it exceeds `most`.

    An edit inserts, deletes or replaces a character, or swaps two neighbors."""
    far = [most + 1] * (len(b) + 1)  # cells farther than `most` from the diagonal need more than `most` edits
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
    """Raises ConfigError, with the nearest, where `value` is none of the words in `known`: 'nf5' is not a quantisation.
    `what`: with its article. `where`: the option or key."""
    words = list(known)
    if value not in words:
        near = nearest(value.lower(), words, 1)
        meant = f"did you mean {near[0]}? " if near and len(words) > 1 else ""
        raise ConfigError(f"{quoted(value)} is not {what}", where=where, fix=f"{meant}There are {first_few(words, 20)}")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, or torch's, on a device or on the CPU.

    torch's are known by their name and their text: torch need not be loaded."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
