"""Predict a run's memory, duration and trained data, without changing anything.

    report = inspect_run(config)                 without a loaded base: reads 200 rows; see report.guesses
    report = inspect_run(config, base, data)     with the loaded base and the run's data: uses all rows
    report.starts, report.plan, report.findings, report.sample

    page = preview_rows(config, limit=50)        each row with a verdict (learned, cut, held out or left out)
                                                 and the reason for it
    images = preview_pictures(config)            each picture with its crop and caption, or the reason why it
                                                 is left out

Without a base, only the base's tokenizer and config are read. Previews are cached until their files change.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from veneer.errors import DataError, counted
from veneer.plan.tables import Device, cpu_device
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import RunConfig
from veneer.train.config.text import DataSection, TrainConfig
from veneer.train.planning import base_fields, plan_of_config, planned_rows
from veneer.train.preflight import Finding, Report, RunSubject, learning_rate
from veneer.train.records import count_records, data_stamp

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase
    from veneer.train.image.augmentation import PictureRow
    from veneer.train.image.pictures import TrainingPicture
    from veneer.train.text.data import TextData
    from veneer.train.text.encode import Example
    from veneer.train.text.rows import Row, UnusableRow

_C = TypeVar("_C", TrainConfig, ImageTrainConfig)
_MOST_ROWS = 5000
"""Maximum number of rows in a preview, from the start of the data."""
_MOST_PICTURES = 400
"""Maximum number of images in a preview. If there are more, no image is opened."""
_SAID = 400
"""Maximum number of characters of a row that a preview shows."""

RowVerdict = Literal["learned", "cut", "held out", "left out", "unusable"]
VERDICTS: tuple[RowVerdict, ...] = get_args(RowVerdict)
"""The possible verdicts on a row or on an image."""


@dataclass(frozen=True)
class PreviewRow:
    """A row of a preview.

    where: file and line. said: the beginning of the row. pieces: the whole text as (text, learned) parts.
    why: the reason for the verdict, unless the row is learned."""

    where: str
    verdict: RowVerdict
    why: str = ""
    said: str = ""
    tokens: int = 0
    learned: int = 0
    pieces: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class PreviewPage:
    """The first rows that match a preview's filter.

    `matching`: number of all rows that match. `looked`: number of rows that were read. `counts`: verdict ->
    number of read rows with this verdict. `total`: number of rows in the data, None if unknown."""

    rows: tuple[PreviewRow, ...]
    matching: int
    counts: dict[str, int]
    looked: int
    total: int | None
    format: str


@dataclass(frozen=True)
class PreviewPicture:
    """An image of a preview.

    id: identifies the image's content in requests
    crop: (left, top, width, height) of the trained part, as fractions of the image's size; None if the image
        is left out
    size: (width, height) in pixels at which the image is trained"""

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
    config: RunConfig,
    base: Any = None,
    data: Any = None,
    *,
    device: Device | None = None,
    rows: int = 200,
    **options: Any,
) -> Report:
    """Predict what a run will do, and report problems.

    Without `base`, reads the first `rows` rows and plans for `device` (by default this machine's CPU). Raises
    ConfigError and BaseError if the base cannot be found. Problems with the data are reported as findings.

    With `base`, `data` is the TextData or ImageData that the run has read, and `options` are the options of
    `RunSubject`. Nothing is raised for findings; see `Report.raise_if_stopped`."""
    if base is None:
        inspect: Any = _inspect_images if isinstance(config, ImageTrainConfig) else _inspect_text
        try:
            return inspect(config, device or cpu_device(), rows)  # type: ignore[no-any-return]
        except DataError as error:
            where = f"{error.where}: " if error.where else ""
            return Report([Finding("stop", "data", f"{where}{error.what}", error.fix or "")], looked=0)
    if isinstance(config, ImageTrainConfig):
        from veneer.train.image.preflight import image_preflight

        return image_preflight(base, config, data, **options)
    from veneer.train.text.preflight import text_preflight

    return text_preflight(base, config, data, **options)


def _inspect_text(config: TrainConfig, device: Device, rows: int) -> Report:
    from veneer.train.text.preflight import TextSubject, data_findings, marked_pieces

    base = _base(config.base.name)
    data, total = _first_rows(*_key(config), rows)
    looked = len(data.train.rows) + (len(data.held_out.rows) if config.data.validation is None else 0)
    examples = data.train.encoded.examples
    report = Report(rows=total, looked=looked, sample=marked_pieces(examples[0], base.tokenizer) if examples else [])
    wanted = None if total is None else min(total, config.data.limit or total)
    complete = wanted is not None and wanted <= looked
    first = "" if complete else f"of the first {counted(looked, 'row')}: "
    findings = data_findings(TextSubject(base=base, config=config, data=data))
    report.add(*(replace(finding, text=first + finding.text) for finding in findings))
    if not data.train.items:
        return report
    read = planned_rows(config, data.train.items)
    if not complete:
        read["rows"] = max(1, round((wanted or looked) * read["rows"] / looked))
        total_text = "an unknown number" if total is None else f"{total:,}"
        text = f"only the first {counted(looked, 'row')} of {total_text} were read, "
        report.guesses.append(text + "and the rest are assumed to be similar")
    report.plan = plan = plan_of_config(config, device, **read)
    steps = math.ceil(plan.job.rows / plan.job.batch)
    subject = RunSubject(base=None, config=config, steps_per_epoch=steps)
    report.add(*(finding for finding in learning_rate(subject) if finding.level != "ok"))
    if config.adapter.start is not None:
        report.guesses.append(f"the adapter is assumed to have the size of {config.adapter.start}")
    if config.sampling is not None:
        report.guesses.append("completions are assumed to have their maximum length")
    return report


@functools.lru_cache(maxsize=8)
def _first_rows(key: str, stamp: object, rows: int) -> tuple[TextData, int | None]:
    """Return (the data of the first rows, number of rows in the files if known). Raises DataError, BaseError."""
    from veneer.train.text.data import read_data

    config = _config(TrainConfig, key)
    total = count_records(config.data.files("train"))
    bounded = config.model_copy(update={"data": _bounded(config, rows, total)})
    return read_data(bounded, _base(config.base.name)), total


def _bounded(config: TrainConfig, rows: int, total: int | None) -> DataSection:
    """Return the data settings for reading only the first rows, with the same share held out.

    total: number of rows in the files, if known."""
    data = config.data
    changes: dict[str, Any] = {"limit": min(rows, data.limit or rows)}
    if total is not None and isinstance(data.split, int) and data.split and total > rows:
        changes["split"] = min(0.9, data.split / total)
    if data.validation is not None and (count_records(data.files("validation")) or rows + 1) > rows:
        changes |= {"validation": None, "split": None}
    return data.model_copy(update=changes)


@functools.lru_cache(maxsize=4)
def _base(name: str) -> TextBase:
    from veneer.models.text.base import text_without_weights

    return text_without_weights(name)


# -- rows --------------------------------------------------------------------------------------------------------------


_SECTIONS: Any = {"base": {"name"}}
_SECTIONS |= dict.fromkeys(["data", "preference", "reinforcement", "distillation", "seed"], True)


def _key(config: TrainConfig) -> tuple[str, object]:
    """Return (the settings that determine how rows are read, the state of the files), as a cache key."""
    values = config.model_dump_json(include=_SECTIONS, exclude_unset=True)
    return values, data_stamp([*config.data.files("train"), *config.data.files("validation")])


def _config(kind: type[_C], key: str) -> _C:
    """Return the configuration that a cache key contains."""
    return kind.model_validate_json(json.dumps({**json.loads(key), "output": {"directory": "."}}))


def preview_rows(config: TrainConfig, *, limit: int = 50, verdicts: Sequence[RowVerdict] = ()) -> PreviewPage:
    """Return the first rows in file order, with a verdict on each.

    `verdicts`: return only rows with one of these verdicts. Raises DataError for files that cannot be read;
    ConfigError and BaseError if the base cannot be found."""
    from veneer.train.text.preflight import marked_pieces

    rows, examples, format = _table(*_key(config))
    tokenizer = _base(config.base.name).tokenizer
    chosen = [(i, row) for i, row in enumerate(rows) if not verdicts or row.verdict in verdicts]
    page = []
    for i, row in chosen[:limit]:
        pieces = [piece for example in examples.get(i, ()) for piece in marked_pieces(example, tokenizer)]
        page.append(replace(row, pieces=tuple(pieces)))
    counts = Counter[str](row.verdict for row in rows)
    total = count_records(config.data.files("train"))
    return PreviewPage(tuple(page), len(chosen), dict(counts), len(rows), total, format)


def _beginning(text: str) -> str:
    text = " ".join(text[: 2 * _SAID].split())
    return text if len(text) <= _SAID else text[: _SAID - 1] + "…"


@functools.lru_cache(maxsize=4)
def _table(key: str, stamp: object) -> tuple[list[PreviewRow], dict[int, list[Example]], str]:
    """Return (the first rows without their pieces, index of a row -> its examples, data format)."""
    from veneer.train.text.data import row_options
    from veneer.train.text.encode import encode_rows
    from veneer.train.text.preference import answer_rows
    from veneer.train.text.rows import Row, parse_rows, split_rows

    config = _config(TrainConfig, key)
    data, limit = config.data, min(_MOST_ROWS, config.data.limit or _MOST_ROWS)
    parsed, metadata = parse_rows(data.files("train"), limit=limit, **row_options(config))
    usable = [(i, row) for i, row in enumerate(parsed) if isinstance(row, Row)]
    held_out = set[int]()
    if data.validation is None and usable:
        held_out = {id(row) for row in split_rows([row for _, row in usable], data.split, seed=config.split_seed)[1]}
    texts, owners = answer_rows([row for _, row in usable])
    settings = data if config.sampling is None else data.model_copy(update={"train_on": "all"})
    encoded = encode_rows(texts, _base(config.base.name).tokenizer, settings, refuse=False)
    positions = [usable[owner][0] for owner in owners]
    why = {positions[n]: reason for n, reason in encoded.left.items()}
    cut = {positions[n] for n in encoded.cut_rows}
    examples: dict[int, list[Example]] = {}
    for example in encoded.examples:
        examples.setdefault(positions[example.row], []).append(example)

    def preview(i: int, row: Row | UnusableRow) -> PreviewRow:
        if not isinstance(row, Row):
            return PreviewRow(row.where, "unusable", row.why, _beginning(str(dict(row.values))))
        verdict: RowVerdict
        verdict, reason = "learned", ""
        if i in why:
            verdict, reason = "left out", why[i]
        elif id(row) in held_out:
            verdict, reason = "held out", "never trained on: its loss shows whether the run overfits"
        elif i in cut:
            verdict, reason = "cut", f"longer than data.max_length, {data.max_length:,} tokens"
        text = row.text or " → ".join(str(message["content"]) for message in row.messages)
        found = examples.get(i, ())
        tokens, learned = sum(e.tokens for e in found), sum(e.trained_tokens for e in found)
        return PreviewRow(row.where, verdict, reason, _beginning(text), tokens, learned)

    return [preview(i, row) for i, row in enumerate(parsed)], examples, metadata.format


# -- pictures ----------------------------------------------------------------------------------------------------------


def _inspect_images(config: ImageTrainConfig, device: Device, rows: int) -> Report:
    plan = plan_of_config(config, device)
    report = Report(plan=plan, looked=0)
    if config.slider.enabled:
        return report
    report.rows = plan.job.rows
    if plan.job.rows > _MOST_PICTURES:
        unopened = f"{counted(plan.job.rows, 'picture')} were counted by file name, and no picture was opened"
        report.guesses.append(unopened)
        return report
    pictures, held_out, _, findings = _pictures(*_picture_key(config))
    report.add(*findings)
    report.rows = report.looked = len(pictures) + len(held_out)
    return report


def _picture_key(config: ImageTrainConfig) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    folders = [*config.data.folders, *filter(None, [config.data.validation, config.data.class_folder])]
    files = sorted(path for folder in folders for path in Path(folder).expanduser().rglob("*") if path.is_file())
    stats = [(str(path), path.stat()) for path in files]
    values = config.model_dump_json(include={"base": {"name"}, "data": True, "seed": True}, exclude_unset=True)
    return values, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


@functools.lru_cache(maxsize=4)
def _pictures(
    key: str, stamp: object
) -> tuple[Sequence[TrainingPicture], Sequence[TrainingPicture], Sequence[PictureRow], list[Finding]]:
    """Return images, held-out images, the rows of an epoch, and findings."""
    from veneer.train.image.augmentation import plan_rows
    from veneer.train.image.checks import check_held_out, check_pictures
    from veneer.train.image.pictures import read_split_pictures

    config = _config(ImageTrainConfig, key)
    settings = config.data
    pictures, held_out, summary = read_split_pictures(settings, config.seed)
    shape = base_fields(config.base.name)
    scale = int(shape.get("vae_scale", 8))
    # the smallest unit is one latent for U-Nets, and a patch of 2 × 2 latents for other denoisers
    unit = scale if "down_block_types" in shape else 2 * scale
    plan = plan_rows(pictures, settings, size=int(shape.get("picture", 1024)), unit=unit)
    findings = check_pictures(pictures, summary, plan, settings)
    if held_out:
        findings += check_held_out(pictures, held_out)
    return pictures, held_out, plan.rows, findings


def preview_pictures(config: ImageTrainConfig) -> tuple[PreviewPicture, ...]:
    """Return every image with its crop and caption; held-out images are last.

    Raises DataError for a folder without usable images, and if there are more than `_MOST_PICTURES` images."""
    from veneer.train.image.augmentation import sample_row
    from veneer.train.image.pictures import count_pictures

    if (count := count_pictures(config.data)[0]) > _MOST_PICTURES:
        problem, where = f"{count:,} pictures are more than a preview can show", ", ".join(config.data.folders)
        raise DataError(problem, where=where, fix=f"use a folder of at most {_MOST_PICTURES} pictures for the preview")
    pictures, held_out, rows, _ = _pictures(*_picture_key(config))
    first: dict[str, PictureRow] = {}
    for row in rows:
        first.setdefault(row.picture.key, row)

    def preview(picture: TrainingPicture, verdict: RowVerdict, why: str, **learned: Any) -> PreviewPicture:
        id = picture.digest.rpartition(":")[2][:24]
        return PreviewPicture(id, picture.name, picture.path, picture.caption, *picture.size, verdict, why, **learned)

    out = []
    for picture in pictures:
        at = first.get(picture.key)
        if at is None:
            out.append(preview(picture, "left out", "smaller than its bucket"))
            continue
        view, _ = sample_row(at, config.data, seed=config.seed, epoch=0)
        wide, high = view.resized
        crop = (view.left / wide, view.top / high, view.width / wide, view.height / high)
        cut = f"{view.cut:.0%} lies outside the crop" if view.cut >= 0.005 else ""
        out.append(preview(picture, "cut" if cut else "learned", cut, crop=crop, size=(view.width, view.height)))
    return (*out, *(preview(picture, "held out", "never trained on") for picture in held_out))


def preview_picture(config: ImageTrainConfig, id: str) -> PreviewPicture:
    """Return the image of `preview_pictures` with this id. Raise DataError for an unknown id."""
    for picture in preview_pictures(config):
        if picture.id == id:
            return picture
    raise DataError("there is no such picture in this run's folders", where="picture", fix="reload the preview")


def inspection_text(report: Report) -> str:
    """Return the report as `veneer data preview` prints it."""
    from veneer.plan.render import plan_text

    lines = [report.text()] if report.findings or report.sample else []
    if report.plan is not None:
        lines.append(plan_text(report.plan).partition("\n\n")[0])
    return "\n\n".join([*lines, "\n".join(f"guessed: {guess}" for guess in report.guesses)]).rstrip()
