"""`veneer data`: preview training data, caption images and write training rows."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AsJson, ChosenDevice, LoadedDtype
from veneer.cli.output import print_json, print_table, say
from veneer.errors import ConfigError, DataError, bullets, counted, one_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.vision import VisionModel
    from veneer.train.config.load import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prepare training rows and captions.")


@app.callback()
def _data() -> None:
    """Prepare training rows and captions."""


@app.command(epilog="Example: veneer data caption drawings --model HuggingFaceTB/SmolVLM-500M-Instruct --trigger sks")
def caption(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER|PICTURE", help="A folder of images, or one image.", show_default=False)
    ],
    text: Annotated[
        str | None, typer.Argument(help="New caption, if the first argument is one image.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A vision-language model: a directory or a hub id.")
    ] = None,
    trigger: Annotated[str | None, typer.Option("--trigger", help="Trigger word to put before each caption.")] = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", help="Instruction to the model. Default: asks for one or two plain sentences."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=4096, help="Maximum tokens per caption.")] = 120,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace existing captions.")] = False,
    dtype: LoadedDtype = "auto",
    device: ChosenDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Write captions for images that have none, as files that `veneer train` reads.

    Each caption is saved immediately. If the command is interrupted, run it again to continue where it
    stopped. The same model always writes the same captions. To set one caption:
    veneer data caption drawings/cat.png "sks, a cat on a wall"."""
    from veneer.models.device import check_device_name, check_dtype_name
    from veneer.train.image.captions import WrittenCaption, write_caption, write_captions

    if text is not None:
        if folder.is_dir() or model is not None:
            problem = "give one image and its caption, without --model"
            raise ConfigError(problem, where=str(folder), fix="veneer data caption drawings/cat.png 'a cat on a wall'")
        done = write_caption(folder, text)
        print(json.dumps(asdict(done) | {"file": str(done.file)}) if as_json else f"{done.file}: {done.caption}")
        return
    if model is None:
        fix = "give --model (such as HuggingFaceTB/SmolVLM-500M-Instruct), or one image and its caption"
        raise ConfigError("no captioning model selected", where="--model", fix=fix)
    model_name = model

    check_dtype_name(dtype, "--dtype")
    check_device_name(device, "--device")

    @functools.cache
    def vision_model() -> VisionModel:  # loads the model when the first image needs it
        from veneer.models.vision import load_vision

        model = load_vision(model_name, dtype=dtype, device=device, say=say)
        say(f"{model.name} in {str(model.dtype).removeprefix('torch.')} on {model.device}: {model.dtype_reason}")
        return model

    def describe(picture: Image) -> tuple[str, bool]:
        result = vision_model().describe(picture, instruction, max_tokens=max_tokens)
        return result.text, result.cut

    def report_caption(item: WrittenCaption) -> None:
        say(f"{item.picture}: {item.caption}" + (" (cut at a token limit)" if item.cut else ""))

    report = write_captions(str(folder), describe, trigger=trigger, overwrite=overwrite, on_caption=report_caption)
    if as_json:
        rows = [asdict(item) | {"file": str(item.file)} for item in report.written]
        print(json.dumps({"model": model, "written": rows, "had": report.had, "failed": report.failed}))
    else:
        print(f"{counted(len(report.written), 'caption')} written, {report.had} already existed")
    if report.failed:
        problem = f"no caption was written for {counted(len(report.failed), 'picture')}:\n{bullets(report.failed)}"
        raise DataError(
            problem, where=str(folder), fix="add NAME.txt next to each picture, or repair or remove the pictures"
        )


@app.command(epilog="Example: veneer data add votes.jsonl 'Where is my parcel?' --chosen 'By noon.' --rejected 'Soon.'")
def add(
    rows: Annotated[Path, typer.Argument(help="A JSON Lines file; created if missing.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="The user's prompt.", show_default=False)],
    chosen: Annotated[str, typer.Option("--chosen", help="The better of two answers.")] = "",
    rejected: Annotated[str, typer.Option("--rejected", help="The worse of two answers.")] = "",
    answer: Annotated[str, typer.Option("--answer", help="The correct answer.")] = "",
    system: Annotated[str, typer.Option("--system", help="The system message before the prompt.")] = "",
    as_json: AsJson = False,
) -> None:
    """Append a training row: a correct answer, or a preferred and a rejected answer."""
    from veneer.train.text.feedback_rows import add_row, corrected_row, preference_row

    if bool(answer) == bool(chosen or rejected) or bool(chosen) != bool(rejected):
        problem = "a row needs either --answer, or both --chosen and --rejected"
        raise ConfigError(problem, where="--answer, --chosen, --rejected", fix="one of the two")
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    row = corrected_row(messages, answer) if answer else preference_row(messages, chosen, rejected)
    count = add_row(rows, row)
    print(json.dumps({"file": str(rows), "rows": count})) if as_json else print(f"{rows}: {counted(count, 'row')}")


_Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A configuration file or setting (section.key=value); with --base, a file of rows or a folder.",
        show_default=False,
    ),
]
_OfBase = Annotated[
    str | None, typer.Option("--base", help="Base model; needed for rows or a folder without a configuration.")
]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override those of the file.")
]


def _configured(data: str, base: str | None, overrides: list[str] | None) -> RunConfig:
    from veneer.train.config.load import common_settings, load_config

    settings = overrides or []
    if data.endswith((".yaml", ".yml")):
        return load_config(data, settings)[0]
    if "=" in data and not Path(data).exists():
        return load_config(None, [*common_settings(base=base), data, *settings])[0]
    if base is None:
        raise ConfigError("no base given", where="--base", fix=f"veneer data show {data} --base NAME")
    return load_config(None, [*common_settings(base=base, data=data), *settings])[0]


@app.command(epilog="Example: veneer data show tickets.jsonl --base smollm2-135m --only 'left out'")
def show(
    data: _Data,
    overrides: _Overrides = None,
    base: _OfBase = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only learned, cut, 'held out', 'left out' or unusable rows; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Maximum rows to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how a run would use each row or image: in full, cut, held out or left out."""
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.inspect import VERDICTS, preview_pictures, preview_rows

    for word in only or []:
        one_of(word, VERDICTS, "a row status", "--only")
    verdicts: Any = only or ()
    config = _configured(data, base, overrides)
    if isinstance(config, ImageTrainConfig):
        every = [entry for entry in preview_pictures(config) if not verdicts or entry.verdict in verdicts]
        pictures = every[:limit]
        if as_json:
            listed = [asdict(entry) | {"path": str(entry.path)} for entry in pictures]
            print_json({"pictures": listed, "matching": len(every)})
            return
        cells = []
        for entry in pictures:
            learned = f"{entry.size[0]} x {entry.size[1]}" if entry.size else ""
            size = f"{entry.width} x {entry.height}"
            cells.append((entry.name, entry.verdict, size, learned, entry.why, entry.caption[:80]))
        print_table(("picture", "is", "size", "learned at", "why", "caption"), cells)
        return
    page = preview_rows(config, limit=limit, verdicts=verdicts)
    if as_json:
        print_json({**asdict(page)})
        return
    rows = [
        (entry.where, entry.verdict, str(entry.tokens), str(entry.learned), entry.why, entry.said[:80])
        for entry in page.rows
    ]
    print_table(("row", "is", "tokens", "learned", "why", "begins"), rows)
    total = "" if page.total in (None, page.looked) else f" of {page.total:,}"
    parts = ", ".join(f"{count:,} {verdict}" for verdict, count in page.counts.items())
    say(f"{counted(page.looked, 'row')}{total} examined, in {page.format} format: {parts}")


@app.command(epilog="Example: veneer data preview tickets.jsonl --base smollm2-135m adapter.rank=16")
def preview(
    data: _Data,
    overrides: _Overrides = None,
    base: _OfBase = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Number of rows to read, from the first.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Estimate whether a run fits into memory, how long it takes and what it learns.

    Takes about a second: reads only the first rows, and marks estimates as such. `veneer train --dry-run`
    reads all data and runs the longest batch. The exit code is 2 if the run would fail."""
    from veneer.jobs.validate import this_device
    from veneer.train.inspect import inspect_run, inspection_text

    report = inspect_run(_configured(data, base, overrides), rows=rows, device=this_device())
    print_json(report.to_dict()) if as_json else print(inspection_text(report))
    if not report.starts:
        raise SystemExit(2)


@app.command(epilog="Example: veneer data draw distill.yaml rows.jsonl distillation.group=4")
def draw(
    config: Annotated[Path, typer.Argument(help="A configuration with distillation.teacher.", show_default=False)],
    rows: Annotated[Path, typer.Argument(help="JSONL file to write.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override the file's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write training rows with a teacher's answers to the prompts of a configuration.

    The rows can train any base. The rows do not contain the teacher's system prompt (distillation.system),
    and truncated answers are left out."""
    from veneer.adapters.use import load_adapter
    from veneer.core.attach import attach
    from veneer.files.atomic import atomic_write
    from veneer.models.text.base import load_text
    from veneer.serve.engine.live import live_sampler
    from veneer.serve.forward.runner import PACK_BYTES
    from veneer.train.config.load import load_config
    from veneer.train.config.reinforcement import PROMPT_FORMATS
    from veneer.train.config.section import BASE_MODEL
    from veneer.train.config.text import TrainConfig
    from veneer.train.text.distill import teacher_rows
    from veneer.train.text.rollouts import SamplerSettings
    from veneer.train.text.rows import read_rows

    loaded, _ = load_config(config, overrides or [])
    if not isinstance(loaded, TrainConfig) or loaded.distillation.teacher is None:
        problem = "this configuration names no teacher"
        raise ConfigError(problem, where=str(config), fix="give distillation.teacher: an adapter, or base")
    distillation, data = loaded.distillation, loaded.data
    prompts, _ = read_rows(
        data.files("train"), limit=data.limit, format=data.format, columns=data.columns, formats=PROMPT_FORMATS
    )
    base = load_text(
        distillation.base or loaded.base.name,
        dtype=loaded.base.dtype,
        device=loaded.base.device,
        quantize=None if distillation.base else loaded.base.quantize,
        say=say,
    )
    name = "" if distillation.teacher == BASE_MODEL else str(distillation.teacher)
    with attach(base.model) as attachment:
        if name:
            attachment.add(name, load_adapter(base, name))
        settings = SamplerSettings(rows=distillation.rows, pack_bytes=PACK_BYTES, exact=False)
        with live_sampler(base, attachment, settings) as sampler:
            answer_rows, left = teacher_rows(prompts, loaded, base, sampler, name)
    atomic_write(rows, ["".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answer_rows).encode()])
    if left:
        say(f"left out: {counted(len(left), 'answer')}\n{bullets(left)}")
    if as_json:
        print(json.dumps({"rows": str(rows), "written": len(answer_rows), "left": left}))
    else:
        print(f"{counted(len(answer_rows), 'row')} written to {rows}")
