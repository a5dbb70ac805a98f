"""Read data files as records, each with its file and line.

The sources are JSONL, JSON, CSV, TSV, Parquet, hub data sets, and rows that reasoning-gym generates. Files
can have a byte-order mark, CRLF line ends, blank lines, and semicolons or tabs between CSV cells. Callers
interpret the columns: text runs read rows, and image runs read captions.
"""

from __future__ import annotations

import codecs
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

from veneer.errors import DataError, bullets, nearest
from veneer.train.config.section import SOURCES
from veneer.train.lazy import Lazy

LARGE = 16 << 20
"""Bytes above which rows stay in their files until needed, because a row in memory takes several times as much."""
_LINE_FIX = "each line must be one JSON object; for a JSON array, use the extension .json"
_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row, unchanged. `where`: `file:line` (JSONL, JSON, CSV) or `file row N`."""

    values: Mapping[str, Any]
    where: str


def read_data_files(names: Sequence[str], limit: int | None = None) -> list[Record]:
    """Return the records of the given files, globs and hub data sets. Raise DataError."""
    records: list[Record] = []
    for file in [file for name in names for file in _expand(name)]:
        count_before = len(records)
        left = None if limit is None else limit - len(records)
        if left is not None and left <= 0:
            break
        records += _remote_records(file, left) if file.startswith(SOURCES) else _file(Path(file), left)[:left]
        if len(records) == count_before:
            raise DataError("this file has no rows", where=file, fix="remove it from data.train, or add rows")
    return records


class Lines(Lazy[Record]):
    """The records of JSONL files, read from the files when they are needed.

    `digest`: sha256 of the files' bytes. Reading a record raises DataError if its file has changed."""

    def __init__(self, paths: Sequence[Path], limit: int | None = None) -> None:
        self.paths, self._files, self._stamps = paths, list[IO[bytes]](), list[tuple[int, int]]()
        self._begins, self._ends, self._numbers, self._starts = array("q"), array("q"), array("q"), array("q")
        self._lock, h = Lock(), hashlib.sha256()
        for path in paths:
            file = path.open("rb")
            weakref.finalize(self, file.close)
            self._files.append(file)
            self._starts.append(len(self._begins))
            self._stamps.append(_stamp(file))
            begin = 0
            for number, line in enumerate(file, 1):
                if len(self._begins) == limit:
                    break
                h.update(line)
                skipped = 3 if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if line[skipped:].strip():
                    self._begins.append(begin + skipped)
                    self._ends.append(begin + len(line))
                    self._numbers.append(number)
                begin += len(line)
            h.update(b"\xff")  # separates files, because UTF-8 text cannot contain this byte
            if len(self._begins) == self._starts[-1] != limit:
                raise DataError("this file has no rows", where=file.name, fix="remove it from data.train, or add rows")
        self.digest = h.hexdigest()
        super().__init__(len(self._begins), self._record)

    def columns(self) -> list[str]:
        """Parse all records, and return their columns. Raises DataError with the malformed lines of a file."""
        columns: dict[str, None] = {}
        for n, (path, start) in enumerate(zip(self.paths, self._starts, strict=True)):
            bad = []
            for i in range(start, self._starts[n + 1] if n + 1 < len(self._starts) else len(self)):
                record, why = self._read(i)
                columns |= dict.fromkeys(record.values)
                bad += [f"{record.where}: {why}"] if why else []
            _refuse(bad, path, _LINE_FIX)
        return list(columns)

    def _record(self, i: int) -> Record:
        record, why = self._read(i)
        _refuse([f"{record.where}: {why}"] if why else [], Path(record.where), _LINE_FIX)
        return record

    def _read(self, i: int) -> tuple[Record, str]:
        """Return (record i, why it cannot be used or "")."""
        n = bisect_right(self._starts, i) - 1
        file, path = self._files[n], self.paths[n]
        with self._lock:
            changed = _stamp(file) != self._stamps[n]
            file.seek(self._begins[i])
            raw = file.read(self._ends[i] - self._begins[i])
        if changed:
            text = "the data file was changed while the run was reading it"
            raise DataError(text, where=str(path), fix="start the run again")
        text, where = _decoded(raw, path, self._numbers[i]), f"{path}:{self._numbers[i]}"
        value, _, why = _parsed(text.removesuffix("\n"))
        why = why or _unusable(value, text)
        return Record({} if why else value, where), why


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_mtime_ns, stat.st_size


class ArrowRows(Lazy[Record]):
    """The records of a data set of the library `datasets`, which maps its Arrow files instead of reading them.

    where: returns the name of record i. name: distinguishes data sets that come from the same files."""

    def __init__(self, data: Any, where: Callable[[int], str], name: str = "") -> None:
        self._data, self._name = data, name
        self._files = [Path(file["filename"]) for file in data.cache_files]
        self.bytes = sum(file.stat().st_size for file in self._files)
        super().__init__(len(data), lambda i: Record(data[i], where(i)))

    @functools.cached_property
    def digest(self) -> str:
        """Return a sha256 of the name and of the files' bytes."""
        return _content_digest(self._files, self._name)

    def columns(self) -> list[str]:
        return list(self._data.column_names)


def large_files(names: Sequence[str], limit: int | None = None) -> Lines | ArrowRows | None:
    """Return the records of large JSONL files, large Parquet files or a large hub data set; None for other data.

    Records are read when they are needed. Raises DataError for a missing file."""
    if len(names) == 1 and names[0].startswith("hub:"):
        rows = _hub(names[0][4:], limit)
        return rows if rows.bytes > LARGE else None
    if any(name.startswith(SOURCES) for name in names):
        return None
    paths = [Path(file) for name in names for file in _expand(name)]
    suffixes = {path.suffix.lower() for path in paths}
    try:
        if sum(os.path.getsize(path) for path in paths) <= LARGE:
            return None
        if suffixes <= {*_LINES}:
            return Lines(paths, limit)
    except OSError:  # `_file` says what is wrong, or reads more files than can be open at once
        return None
    return _mapped(paths, limit) if suffixes == {".parquet"} else None


def data_stamp(names: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """Return each file's name, modification time and size, to detect changed files.

    Raises DataError for a missing file."""
    files = [file for name in names for file in _expand(name)]
    stats = [(file, os.stat(file)) for file in files if not file.startswith(SOURCES)]
    return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def count_records(names: Sequence[str]) -> int | None:
    """Return the number of records, or None for records from the hub or a generator.

    Files with one record per line are not parsed. Raises DataError."""
    if any(name.startswith(SOURCES) for name in names):
        return None
    paths = [Path(file) for name in names for file in _expand(name)]
    return sum(count_lines(path) if path.suffix.lower() in _LINES else len(_file(path)) for path in paths)


_LINE = re.compile(rb"\S[^\n]*")


def count_lines(path: Path, most: int | None = None, *, chunk: int = 1 << 20) -> int:
    """Return the number of nonblank lines, at most `most`.

    Reading stops at `most`. Blank lines are skipped in C, and the GIL is released between chunks, so a
    client's file of blank lines cannot block other clients."""
    count, within = 0, False  # within: whether the current chunk begins in a line that is already counted
    with path.open("rb") as file:
        while (most is None or count < most) and (read := file.read(chunk)):
            begin = read.find(b"\n") if within else 0
            if begin < 0 or (not within and read.isspace()):
                continue
            end = begin
            for line in _LINE.finditer(read, begin):
                count, end = count + 1, line.end()
            within = end == len(read)
    return count if most is None else min(count, most)


def _expand(name: str) -> list[str]:
    if name.startswith(SOURCES):
        return [name]
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, does not raise for a name that is too long
        matches = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not matches:
            fix = f"known extensions: {', '.join(_SUFFIXES)}"
            raise DataError("this folder has no data files", where=name, fix=fix)
        return matches
    if os.path.exists(path):
        return [str(path)]
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError("this pattern matches no file", where=name, fix="check the folder and the extension")
        return matches
    neighbors = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    suggestions = nearest(path.name, neighbors, 1)
    hint = f"did you mean {path.parent / suggestions[0]}?" if suggestions else "give a file, a glob, or hub:ID@SPLIT"
    raise DataError("the data file does not exist", where=name, fix=hint)


def _remote_records(name: str, limit: int | None) -> Sequence[Record]:
    if name.startswith("hub:"):
        return _hub(name[4:], limit)
    from veneer.train.rewards.reasoning_gym import generated_rows

    return [Record(row, f"{name} row {n}") for n, row in enumerate(generated_rows(name, limit), 1)]


def _file(path: Path, most: int | None = None) -> list[Record]:
    """Return the records of a file. If `most` is given, reading can stop after that many records."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        message = f"unknown kind of data file `{suffix or path.name}`"
        raise DataError(message, where=str(path), fix=f"known: {', '.join(_SUFFIXES)}")
    if suffix == ".parquet":
        return list(_parquet(path))
    try:
        raw = path.read_bytes() if most is None or suffix not in _LINES else _first_lines(path, most)
    except OSError as error:
        raise DataError(f"the data file cannot be read: {error.strerror}", where=str(path)) from None
    if raw.startswith(b"version https://git-lfs"):
        raise DataError("this is a Git LFS pointer, not the data", where=str(path), fix="run `git lfs pull`")
    text = _decoded(raw, path)
    if not text.strip():
        raise DataError("the data file is empty", where=str(path), fix="remove it from data.train, or add rows")
    if suffix in (".csv", ".tsv"):
        return _csv(text, path, "\t" if suffix == ".tsv" else _delimiter(text))
    return _json(text, path, is_array=suffix == ".json" and text.lstrip().startswith("["))


def _first_lines(path: Path, most: int) -> bytes:
    """Return the file's bytes up to the end of the `most`-th nonblank line."""
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            lines.append(line)
            most -= bool(line.strip())
            if most <= 0:
                break
    return b"".join(lines)


def _decoded(raw: bytes, path: Path, first: int = 1) -> str:
    """Return the text of `raw`, which begins at line `first` of the file."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + first
        problem = f"not UTF-8 text: bytes {raw[error.start : error.end].hex(' ')}"
        raise DataError(problem, where=f"{path}:{line}", fix="save the file as UTF-8") from None


def _delimiter(text: str) -> str:
    """Return the delimiter of a CSV file: a comma, or a semicolon or tab if the header has no comma.

    Spreadsheets write semicolons in locales with decimal commas."""
    header = next(line for line in text.splitlines() if line.strip())
    unquoted = "".join(header.split('"')[::2])
    return "," if "," in unquoted else max(",;\t", key=unquoted.count)


def _json(text: str, path: Path, *, is_array: bool) -> list[Record]:
    fix = _LINE_FIX
    if is_array:
        fix = "the file must be one array of objects"
        values, line, why = _parsed(text)
        _refuse([f"{path}:{line}: {why}"] if why else [], path, fix)
        parsed = [(f"{path} row {n}", json.dumps(value), value, "") for n, value in enumerate(values, 1)]
    else:  # do not use splitlines, because a JSON string can contain U+2028
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        parsed = [(f"{path}:{n}", line, *_parsed(line)[::2]) for n, line in lines]
    records, bad = [], []
    for where, source, value, why in parsed:
        if why := why or _unusable(value, source):
            bad.append(f"{where}: {why}")
        else:
            records.append(Record(value, where))
    _refuse(bad, path, fix)
    return records


def _parsed(text: str) -> tuple[Any, int, str]:
    """Parse a JSON text. Return (value, 1, "") or (None, line of the error, message)."""
    try:
        return json.loads(text), 1, ""
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
        return None, error.lineno, f"not valid JSON: {error.msg} at column {error.colno}: near `{near}`"
    except RecursionError:
        return None, 1, "nested too deeply"
    except ValueError:
        return None, 1, "a number with too many digits"


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _unusable(value: Any, text: str) -> str:
    """Return why a JSON value, parsed from `text`, cannot be used as a row, or ""."""
    if not isinstance(value, dict):
        return f"expected a JSON object, found {type(value).__name__}"
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "half of a surrogate pair (such as `\\ud83d`), because a character was cut in two"
    return ""


def _csv(text: str, path: Path, delimiter: str) -> list[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    records, bad = [], []
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                repeated = sorted({h for h in header if header.count(h) > 1})
                if repeated:
                    bad.append(f"{path}:{start}: the header has {', '.join(repeated)} more than once")
                continue
            if len(cells) != len(header):
                bad.append(f"{path}:{start}: {len(cells)} cells, but the header has {len(header)}")
                continue
            records.append(Record(dict(zip(header, cells, strict=True)), f"{path}:{start}"))
    except csv.Error as error:
        bad.append(f"{path}:{line}: {error}")
    _refuse(bad, path, "quote cells that contain the delimiter or a line break, and double any quotes inside them")
    return records


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        values = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file that can be read: {error}", where=str(path)) from None
    for n, value in enumerate(values, 1):
        yield Record(value, f"{path} row {n}")


def _mapped(paths: Sequence[Path], limit: int | None) -> ArrowRows | None:
    """Return the records of Parquet files, or None if they cannot be read as one data set.

    `datasets` keeps its copy of the files in its own cache, in a folder for their content: it would otherwise
    return the old rows of a file that was replaced by one with the same modification time."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        ends = [*itertools.accumulate(pq.read_metadata(path).num_rows for path in paths)]
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "veneer", _content_digest(paths))
        data = datasets.Dataset.from_parquet([*map(str, paths)], cache_dir=cache)
    except (pa.ArrowException, OSError, ValueError, datasets.exceptions.DatasetsError):
        return None  # `_parquet` then reads files with different columns, or raises DataError

    def where(i: int) -> str:
        n = bisect_right(ends, i)
        return f"{paths[n]} row {i - (ends[n - 1] if n else 0) + 1}"

    return ArrowRows(data if limit is None else data.select(range(min(limit, len(data)))), where)


def _content_digest(paths: Sequence[Path], name: str = "") -> str:
    h = hashlib.sha256(name.encode())
    for path in paths:
        with path.open("rb") as file:
            h.update(hashlib.file_digest(file, "sha256").digest())
    return h.hexdigest()


def _hub(name: str, limit: int | None) -> ArrowRows:
    """Return the records of a hub data set.

    name: `ID`, `ID@SPLIT`, `ID@SPLIT[:1000]` or `ID:CONFIG@SPLIT`. The default split is `train`."""
    import datasets

    ident, _, split = name.partition("@")
    ident, _, subset = ident.partition(":")
    try:
        data = datasets.load_dataset(ident, subset or None, split=split or "train")
    except Exception as error:  # the library raises many types of errors, and each means that no rows can be read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"the hub data set `{ident}` cannot be loaded: {reason}"
        fix = "check the name and the network, or download the data set and set data.train to its files"
        raise DataError(text, where=f"hub:{name}", fix=fix) from None
    rows = data.select(range(min(limit, len(data)))) if limit is not None else data
    return ArrowRows(rows, lambda i: f"hub:{name} row {i + 1}", name)


def _refuse(bad: list[str], path: Path, fix: str) -> None:
    if bad:
        raise DataError(f"{len(bad)} malformed row(s):\n{bullets(bad)}", where=os.fspath(path), fix=fix)
