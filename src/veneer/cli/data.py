"""`veneer data caption`: captions for a folder of pictures, by a vision-language model on this machine."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.options import AsJson, ChosenDevice, LoadedDtype
from veneer.cli.output import say
from veneer.errors import DataError, bullets, counted, one_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from veneer.models.vision import VisionModel

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Captions for pictures to train on.")


@app.callback()
def _data() -> None:
    """Captions for pictures to train on."""


@app.command(epilog="Example: veneer data caption drawings --model HuggingFaceTB/SmolVLM-500M-Instruct --trigger sks")
def caption(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A vision-language model: a directory or a hub id.")],
    trigger: Annotated[
        str | None, typer.Option("--trigger", help="A word that stands in front of each caption.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="What the model is asked. Default: one or two plain sentences.")
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="txt: NAME.txt beside each picture; jsonl: rows of the folder's metadata.jsonl.")
    ] = "txt",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=4096, help="Tokens of a caption, at most.")
    ] = 120,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="New captions for pictures that have one, too.")
    ] = False,
    dtype: LoadedDtype = "auto",
    device: ChosenDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a caption for each picture that has none, where `veneer train` reads it.

    Each is written when it is there: stop the command, and the next call goes on. The same model says the same."""
    from veneer.models.device import check_device_name, check_dtype_name
    from veneer.train.image.captions import WrittenCaption, write_captions

    one_of(to, ("txt", "jsonl"), "a form of captions", "--to")
    check_dtype_name(dtype, "--dtype")
    check_device_name(device, "--device")

    @functools.cache
    def seeing() -> VisionModel:  # loaded when the first picture needs it
        from veneer.models.vision import load_vision

        found = load_vision(model, dtype=dtype, device=device, say=say)
        say(f"{found.name} in {str(found.dtype).removeprefix('torch.')} on {found.device}: {found.dtype_reason}")
        return found

    def describe(picture: Image) -> tuple[str, bool]:
        said = seeing().describe(picture, instruction, max_tokens=max_tokens)
        return said.text, said.cut

    def told(one: WrittenCaption) -> None:
        say(f"{one.picture}: {one.caption}" + (" (cut: it would have gone on)" if one.cut else ""))

    report = write_captions(
        str(folder), describe, to="jsonl" if to == "jsonl" else "txt", trigger=trigger, overwrite=overwrite,
        on_caption=told,
    )  # fmt: skip
    if as_json:
        rows = [asdict(one) | {"file": str(one.file)} for one in report.written]
        print(json.dumps({"model": model, "written": rows, "had": report.had, "failed": report.failed}))
    else:
        print(f"{counted(len(report.written), 'caption')} written, {report.had} were there")
    if report.failed:
        what = f"no caption was written for {counted(len(report.failed), 'picture')}:\n{bullets(report.failed)}"
        raise DataError(what, where=str(folder), fix="write NAME.txt beside each, repair or remove them")
