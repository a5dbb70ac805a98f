"""Predict a run's memory, duration and learned data, without changing anything.

    report = inspect_run(config)                     before a base is loaded: the first 200 rows, and report.guesses
    report = inspect_run(config, base, data)         the base is loaded and its data read: everything
    report.starts, report.plan, report.findings, report.sample

    page = preview_rows(config, offset=0, limit=50)  each row: learned, cut, held out, left out, and why
    images = preview_pictures(config)                  each picture: its crop, its caption, and why it is left out

Without a base, only its tokenizer and config are read. Data is cached while its files do not change, so that
a new rank does not read the data again.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from veneer.errors import DataError, counted
from veneer.plan.tables import Device, cpu_device
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import RunConfig
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.planning import base_fields, plan_of_config, planned_rows
from veneer.train.preflight import Finding, Report, RunSubject, learning_rate
from veneer.train.records import count_records, data_stamp

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.train.image.augmentation import PictureRow
    from veneer.train.image.pictures import TrainingPicture
    from veneer.train.text.data import TextData
    from veneer.train.text.encode import EncodedRows
    from veneer.train.text.rows import About, Row, UnusableRow

_C = TypeVar("_C", TrainConfig, ImageTrainConfig)
_MOST_ROWS = 5000
"""Maximum rows of a table, from the start of the data."""
_MOST_PICTURES = 400
"""Maximum number of pictures; with more, none is opened."""
_SAID = 400
"""Maximum characters of a row in a table."""

RowVerdict = Literal["learned", "cut", "held out", "left out", "unusable"]
VERDICTS: tuple[RowVerdict, ...] = get_args(RowVerdict)
"""The possible verdicts on a row or a picture."""


@dataclass(frozen=True)
class PreviewRow:
    """A row of a table.

    `where`: its file and line. `said`: its beginning. `pieces`: its whole text as (text, learned). `why`: the
    reason for a verdict other than learned."""

    where: str
    verdict: RowVerdict
    why: str = ""
    said: str = ""
    tokens: int = 0
    learned: int = 0
    pieces: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class PreviewPage:
    """A page of the `matching` rows.

    `counts`: verdict -> number among the `looked` rows. `total`: rows of the data."""

    rows: tuple[PreviewRow, ...]
    matching: int
    counts: dict[str, int]
    looked: int
    total: int | None
    format: str


@dataclass(frozen=True)
class PreviewPicture:
    """A picture of a table.

    `id`: identifies its content, for requests. `crop`: (left, top, width, height) of the learned part, as
    shares of the picture; None if it is left out. `size`: the learned size in pixels. `source`: the origin of
    its caption."""

    id: str
    name: str
    path: Path
    caption: str
    width: int
    height: int
    verdict: RowVerdict
    why: str = ""
    crop: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None


def inspect_run(
    config: RunConfig, base: Any = None, rows: Any = None, *, device: Device | None = None, **options: Any
) -> Report:
    """Inspect a run.

    Without `base`: reads the first `rows` rows (200) and plans for `device` (this machine). Raises
    ConfigError and BaseError for a base that cannot be found; problems of the data are findings.

    With `base`: `rows` is the data, TextData or ImageData, as the run has read it; `options` are
    `RunSubject`'s. Raises no errors of its own: see `Report.raise_if_stopped`."""
    if base is None:
        if device is None:
            device = cpu_device()
        inspect = _inspect_images if isinstance(config, ImageTrainConfig) else _inspect_text
        try:
            return inspect(config, device, 200 if rows is None else rows)  # type: ignore[arg-type]
        except DataError as error:
            where = f"{error.where}: " if error.where else ""
            return Report([Finding("stop", "data", f"{where}{error.what}", error.fix or "")], looked=0)
    if isinstance(config, ImageTrainConfig):
        from veneer.train.image.preflight import image_preflight

        return image_preflight(base, config, rows, **options)
    from veneer.train.text.preflight import text_preflight

    return text_preflight(base, config, rows, **options)


def _inspect_text(config: TrainConfig, device: Device, rows: int) -> Report:
    total = count_records(config.data.files("train"))
    loaded = _sample(*_key(config, rows))
    data, read_rows = loaded.data, loaded.row_count
    bounded = total is None or read_rows < (config.data.limit or total)
    report = Report(sample=list(loaded.sample), rows=total, looked=read_rows)
    first = f"of the first {counted(read_rows, 'row')}: " if bounded else ""
    report.add(*(replace(finding, text=first + finding.text) for finding in loaded.findings))
    if not data.train.items:
        return report
    complete = total is not None and (config.data.limit or total) <= read_rows
    row_count = read_rows if complete or total is None else min(total, config.data.limit or total)
    read = planned_rows(config, data.train.items)
    used_rows = read["rows"] if complete else max(1, round(row_count * read["rows"] / read_rows))
    report.plan = plan = plan_of_config(config, device, **read | {"rows": used_rows})
    steps = math.ceil(plan.job.rows / plan.job.batch)
    subject = RunSubject(base=None, config=config, steps_per_epoch=steps)
    report.add(*(finding for finding in learning_rate(subject) if finding.level != "ok"))
    if not complete:
        total_text = "all of them" if total is None else f"{total:,}"
        report.guesses.append(
            f"looked at the first {counted(read_rows, 'row')} of {total_text}, and the rest is taken to be like them"
        )
    if config.adapter.start is not None:
        report.guesses.append(f"the adapter's size, which is that of {config.adapter.start}")
    if config.sampling is not None:
        report.guesses.append("answers are taken to be as long as they may become")
    return report


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    data: TextData
    row_count: int
    findings: tuple[Finding, ...]
    sample: tuple[tuple[str, bool], ...]


_Key = tuple[str, tuple[tuple[str, int, int], ...], int]
_SECTIONS: Any = {"base": {"name"}} | dict.fromkeys(
    ["data", "preference", "reinforcement", "distillation", "seed"], True
)


def _key(config: TrainConfig, rows: int) -> _Key:
    """Return the settings that determine how rows are read, and the files' state."""
    values = config.model_dump_json(include=_SECTIONS, exclude_unset=True)
    stamp = data_stamp([*config.data.files("train"), *config.data.files("validation")])
    return values, stamp, rows


def _config(kind: type[_C], key: str) -> _C:
    """Return the configuration in a cache key."""
    return kind.model_validate_json(json.dumps({**json.loads(key), "output": {"directory": "."}}))


@functools.lru_cache(maxsize=4)
def _base(name: str) -> TextBase:
    from veneer.models.text.base import text_without_weights

    return text_without_weights(name)


@functools.lru_cache(maxsize=8)
def _sample(key: str, stamp: tuple[tuple[str, int, int], ...], rows: int) -> _Sample:
    """Read and check the first rows. Raises DataError, BaseError."""
    from veneer.train.text.data import read_data
    from veneer.train.text.preflight import TextSubject, data_findings, marked_pieces

    config = _config(TrainConfig, key)
    base = _base(config.base.name)
    data = read_data(config.model_copy(update={"data": _bounded(config, rows)}), base)
    subject = TextSubject(base=base, config=config, data=data)
    findings = tuple(data_findings(subject))
    encoded = data.train.encoded
    sample = tuple(marked_pieces(encoded.examples[0], base.tokenizer)) if encoded.examples else ()
    read_rows = len(data.train.rows) + (len(data.held_out.rows) if config.data.validation is None else 0)
    return _Sample(data, read_rows, findings, sample)


def _bounded(config: TrainConfig, rows: int) -> Any:
    """Return the data's settings for its first rows, with the same share held out."""
    data, total = config.data, count_records(config.data.files("train"))
    changes: dict[str, Any] = {"limit": min(rows, data.limit or rows)}
    if total is not None and isinstance(data.split, int) and data.split and total > rows:
        changes["split"] = min(0.9, data.split / total)
    if data.validation is not None and (count_records(data.files("validation")) or rows + 1) > rows:
        changes |= {"validation": None, "split": None}
    return data.model_copy(update=changes)


def preview_rows(
    config: TrainConfig,
    *,
    offset: int = 0,
    limit: int = 50,
    verdicts: Sequence[RowVerdict] = (),
    most: int = _MOST_ROWS,
) -> PreviewPage:
    """Return rows in file order, with a verdict on each.

    `verdicts`: only rows with one of these. `most`: maximum number of rows read. Raises DataError for files
    that cannot be read, ConfigError and BaseError for the base."""
    loaded = _table(*_key(config, most))
    positions = [i for i, verdict in enumerate(loaded.verdicts) if not verdicts or verdict[0] in verdicts]
    counts: dict[str, int] = {}
    for verdict, _ in loaded.verdicts:
        counts[verdict] = counts.get(verdict, 0) + 1
    base = _base(config.base.name)
    rows = tuple(loaded.row(i, base.tokenizer) for i in positions[offset : offset + limit])
    total = count_records(config.data.files("train"))
    return PreviewPage(rows, len(positions), counts, len(loaded.rows), total, loaded.metadata.format)


@dataclass(frozen=True)
class _Table:
    """The rows of a table.

    `verdicts`: of each row, with the reason. `owners`: encoded text -> row."""

    rows: Sequence[Row | UnusableRow]
    metadata: About
    verdicts: Sequence[tuple[RowVerdict, str]]
    encoded: EncodedRows
    owners: Sequence[int]
    examples: dict[int, list[int]] = field(default_factory=dict)

    def row(self, i: int, tokenizer: Any) -> PreviewRow:
        from veneer.train.text.preflight import marked_pieces
        from veneer.train.text.rows import UnusableRow

        row, (verdict, why) = self.rows[i], self.verdicts[i]
        if isinstance(row, UnusableRow):
            return PreviewRow(row.where, verdict, why, _beginning(str(dict(row.values))))
        examples = [self.encoded.examples[n] for n in self.examples.get(i, ())]
        pieces = [piece for example in examples for piece in marked_pieces(example, tokenizer)]
        text = row.text or " → ".join(str(message["content"]) for message in row.messages)
        return PreviewRow(
            row.where,
            verdict,
            why,
            _beginning(text),
            sum(e.tokens for e in examples),
            sum(e.trained_tokens for e in examples),
            tuple(pieces),
        )


def _beginning(text: str) -> str:
    text = " ".join(text[: 2 * _SAID].split())
    return text if len(text) <= _SAID else text[: _SAID - 1] + "…"


@functools.lru_cache(maxsize=4)
def _table(key: str, stamp: tuple[tuple[str, int, int], ...], most: int) -> _Table:
    from veneer.train.text.encode import encode_rows
    from veneer.train.text.preference import answer_rows
    from veneer.train.text.rows import Row, parse_rows, split_rows

    config = _config(TrainConfig, key)
    data, loss, draws = config.data, config.preference.loss, config.sampling is not None
    formats = PROMPT_FORMATS if draws else None if loss is None else preference_formats(loss)
    parsed, metadata = parse_rows(
        data.files("train"),
        format=data.format,
        columns=data.columns,
        limit=min(most, data.limit or most),
        formats=formats,
        values=draws,
    )
    usable = [(i, row) for i, row in enumerate(parsed) if isinstance(row, Row)]
    validation_rows = set[int]()
    if data.validation is None and usable:
        validation_rows = {
            id(row) for row in split_rows([row for _, row in usable], data.split, seed=config.split_seed)[1]
        }
    texts, owners = answer_rows([row for _, row in usable])
    settings = data.model_copy(update={"train_on": "all"}) if draws else data
    encoded = encode_rows(texts, _base(config.base.name).tokenizer, settings, refuse=False)
    positions = [usable[owner][0] for owner in owners]
    why = {positions[n]: reason for n, reason in encoded.left.items()}
    cut = {positions[n] for n in encoded.cut_rows}
    examples: dict[int, list[int]] = {}
    for n, example in enumerate(encoded.examples):
        examples.setdefault(positions[example.row], []).append(n)

    def verdict(i: int, row: Row | UnusableRow) -> tuple[RowVerdict, str]:
        if not isinstance(row, Row):
            return "unusable", row.why
        if i in why:
            return "left out", why[i]
        if id(row) in validation_rows:
            return "held out", "never trained on: the loss on it says whether the run has learned too much"
        if i in cut:
            return "cut", f"longer than data.max_length, {data.max_length:,} tokens"
        return "learned", ""

    return _Table(parsed, metadata, [verdict(i, row) for i, row in enumerate(parsed)], encoded, positions, examples)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _inspect_images(config: ImageTrainConfig, device: Device, rows: int) -> Report:
    plan = plan_of_config(config, device)
    report = Report(plan=plan, looked=0)
    if config.slider.enabled:
        return report
    report.rows = plan.job.rows
    if plan.job.rows > _MOST_PICTURES:
        unopened = f"{counted(plan.job.rows, 'picture')} were counted by their names, and none was opened"
        report.guesses.insert(0, unopened)
        return report
    loaded = _pictures(*_picture_key(config))
    report.add(*loaded.findings)
    report.rows = report.looked = len(loaded.pictures) + len(loaded.validation_rows)
    return report


@dataclass(frozen=True)
class _Pictures:
    pictures: Sequence[TrainingPicture]
    validation_rows: Sequence[TrainingPicture]
    rows: Sequence[PictureRow]
    findings: tuple[Finding, ...]


def _picture_key(config: ImageTrainConfig) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    folders = [*config.data.folders, *filter(None, [config.data.validation, config.data.class_folder])]
    files = sorted(path for folder in folders for path in Path(folder).expanduser().rglob("*") if path.is_file())
    stats = [(str(path), path.stat()) for path in files]
    values = config.model_dump_json(include={"base": {"name"}, "data": True, "seed": True}, exclude_unset=True)
    return values, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


@functools.lru_cache(maxsize=4)
def _pictures(key: str, stamp: tuple[tuple[str, int, int], ...]) -> _Pictures:
    from veneer.train.image.augmentation import plan_rows
    from veneer.train.image.batches import split_pictures
    from veneer.train.image.checks import check_held_out, check_pictures
    from veneer.train.image.pictures import read_pictures

    config = _config(ImageTrainConfig, key)
    settings = config.data
    pictures, summary = read_pictures(settings)
    validation_rows = read_pictures(settings, "validation")[0]
    if settings.validation is None:
        pictures, validation_rows = split_pictures(pictures, settings.split, config.seed)
    shape = base_fields(config.base.name)
    scale = int(shape.get("vae_scale", 8))
    unit = scale if "down_block_types" in shape else 2 * scale  # U-Nets take single latents, others 2 × 2
    plan = plan_rows(pictures, settings, size=int(shape.get("picture", 1024)), unit=unit)
    findings = check_pictures(pictures, summary, plan, settings)
    if validation_rows:
        findings += check_held_out(pictures, validation_rows)
    return _Pictures(pictures, validation_rows, plan.rows, tuple(findings))


def preview_pictures(config: ImageTrainConfig) -> tuple[PreviewPicture, ...]:
    """Return every picture with its learned crop and caption.

    Held out and left out ones come last. Raises DataError for a folder that cannot be learned from; opens at
    most `_MOST_PICTURES`."""
    from veneer.train.image.augmentation import sample_row
    from veneer.train.image.pictures import count_pictures

    if (count := count_pictures(config.data)[0]) > _MOST_PICTURES:
        problem = f"{count:,} pictures are more than a sheet shows"
        raise DataError(
            problem, where=", ".join(config.data.folders), fix=f"a folder of {_MOST_PICTURES} at most, to look"
        )
    loaded = _pictures(*_picture_key(config))
    first: dict[str, PictureRow] = {}
    for row in loaded.rows:
        first.setdefault(row.picture.key, row)
    out = []
    for picture in loaded.pictures:
        at = first.get(picture.key)
        if at is None:
            out.append(_preview(picture, "left out", "smaller than its bucket"))
            continue
        view, _ = sample_row(at, config.data, seed=config.seed, epoch=0)
        wide, high = view.resized
        crop = (view.left / wide, view.top / high, view.width / wide, view.height / high)
        cut = f"{view.cut:.0%} lies outside the crop" if view.cut >= 0.005 else ""
        out.append(_preview(picture, "cut" if cut else "learned", cut, crop, (view.width, view.height)))
    return (*out, *(_preview(picture, "held out", "never trained on") for picture in loaded.validation_rows))


def _preview(
    picture: TrainingPicture,
    verdict: RowVerdict,
    why: str,
    crop: tuple[float, float, float, float] | None = None,
    size: tuple[int, int] | None = None,
) -> PreviewPicture:
    digest = picture.digest.rpartition(":")[2][:24]
    return PreviewPicture(digest, picture.name, picture.path, picture.caption, *picture.size, verdict, why, crop, size)


def preview_picture(config: ImageTrainConfig, id: str) -> PreviewPicture:
    """Return one of `preview_pictures` by its id. Raises DataError for an unknown id."""
    for picture in preview_pictures(config):
        if picture.id == id:
            return picture
    raise DataError("there is no such picture in this run's folders", where="picture", fix="open the sheet again")


def inspection_text(report: Report) -> str:
    """Return the report as `veneer data preview` prints it."""
    from veneer.plan.render import plan_text

    lines = [report.text()] if report.findings or report.sample else []
    if report.plan is not None:
        lines.append(plan_text(report.plan).partition("\n\n")[0])
    return "\n\n".join([*lines, "\n".join(f"guessed: {guess}" for guess in report.guesses)]).rstrip()
