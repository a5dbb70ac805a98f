"""`veneer image` generates images; `veneer image grid` generates labeled grids."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from veneer.cli.options import AsJson, ChosenDevice, chosen_base, say_loaded
from veneer.cli.output import print_json, say
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.imaging.adapters import ImagePipeline, Use
    from veneer.imaging.generate import ImageRequest, Options, RecordedPicture

_FALLBACK = "catalogue-sdxl"
_MOST_SEEDS = 1000


class _Group(TyperGroup):
    """Typer group that treats `grid` as a subcommand only if it is the first word.

    All other words are arguments of image generation. `veneer image -- grid` uses "grid" as the prompt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] == "grid" else ["make", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == "make" else name, command, rest


app = typer.Typer(cls=_Group, add_completion=False)

BaseOption = Annotated[
    str | None,
    typer.Option("--base", "-b", help="Image base: built-in name, hub id, folder or file. Default: the adapter's."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="NAME_OR_PATH[:strength][@block=strength,steps=FROM-TO], such as brand:0.8@down=0.5,steps=0-0.6; or a "
        "role in a stack (product, brand or lens): lock@campaign=product.",
    ),
]
ControlOption = Annotated[
    list[str] | None,
    typer.Option("--control", "-c", help="canny=IMAGE:weight, edges=, depth=, or pose@MODEL= for any ControlNet."),
]
NegativeOption = Annotated[str | None, typer.Option("--negative", "-n", help="Negative prompt.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps. Default: family-specific.")]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", "-g", help="Guidance. Default: family-specific.")]
TrueOption = Annotated[
    float | None, typer.Option("--true-guidance", help="FLUX: classifier-free guidance, for negative prompts.")
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", "-s", help="euler, euler-a, dpm++2m-karras, ddim, unipc, flow-euler, …")
]
SizeOption = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels. Default: the base's own size.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Images per batch, even with different mixes. Default: 4.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="PNG file to write; several images get numbered names.")
]


@app.command(
    "make",
    epilog="Example: veneer image --base catalogue-sdxl --adapter brand:0.8 --control canny=sketch.png:0.7 "
    '"a red mug" -o mug.png. One mix per image: --batch FILE.jsonl. Grids: veneer image grid --help',
)
def make_pictures(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    control: ControlOption = None,
    out: OutOption = None,
    negative: NegativeOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the first image; later images count up.")] = None,
    count: Annotated[int, typer.Option("--count", help="Images per prompt.")] = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    true_guidance: TrueOption = None,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Input image for image-to-image.")] = None,
    denoise: Annotated[
        float | None, typer.Option("--denoise", help="Image-to-image: share of the steps that run. Default: 0.6.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Inpainting mask for --image: white is repainted, black is kept.")
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option("--reference", "-r", help="Source image to edit; needs an editing base.")
    ] = None,
    batch_size: BatchOption = None,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", help='JSONL file with one image per line: {"prompt", "adapters", "seed", …}.'),
    ] = None,
    from_picture: Annotated[
        Path | None, typer.Option("--from", help="Reproduce this PNG; other options override its settings.")
    ] = None,
    dtype: DtypeOption = None,
    device: ChosenDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate images with a base, adapters and ControlNets.

    Each PNG stores its settings; `--from` uses these settings to generate the same image again. For labeled
    grids, see `veneer image grid`."""
    from veneer.imaging.adapters import parse_use
    from veneer.imaging.batch import read_batch
    from veneer.imaging.generate import MOST_COUNT, ImageRequest, Options, generate

    uses = tuple(parse_use(spec) for spec in adapter or [])
    option_values = _option_values(size, steps, guidance, true_guidance, scheduler, control, batch_size)
    if image is not None:
        option_values["image"] = str(image)
    if mask is not None:
        option_values["mask"] = str(mask)
    if denoise is not None:
        option_values["denoise"] = denoise
    if reference:
        option_values["references"] = [str(path) for path in reference]
    began = time.perf_counter()
    if from_picture is not None:
        if len(prompts or []) > 1 or count != 1 or batch_size is not None or batch is not None:
            fix = "omit --count, --batch, --batch-size and further prompts"
            raise ConfigError("--from makes one picture", fix=fix)
        changes = {"prompt": prompts[0] if prompts else None, "negative": negative, "seed": seed, "uses": uses or None}
        changes = {key: value for key, value in changes.items() if value is not None}
        picture, file = _reproduce(from_picture, out, base, changes, option_values, dtype, device)
        _report([picture], [file], began, as_json)
        return
    if batch is not None and prompts:
        raise ConfigError(
            f"--batch and a prompt cannot be combined: {prompts[0]!r}", fix="add the prompt to the batch file"
        )
    if batch is None and not prompts:
        fix = 'veneer image "a fox" -o fox.png, --batch FILE, or --from PICTURE'
        raise ConfigError("there is no prompt", fix=fix)
    if prompts and prompts[0] == "grid" and prompts[1:2] in (["strength"], ["adapters"]):
        raise ConfigError("`grid` must be the first word", fix=f"veneer image grid {prompts[1]} …, then the options")
    if not 1 <= count <= MOST_COUNT:
        raise ConfigError(f"--count {count}", fix=f"at least 1, at most {MOST_COUNT:,}")
    shared = ImageRequest("", negative or "", seed or 0, uses)
    base_requests = read_batch(batch, shared) if batch else [replace(shared, prompt=prompt) for prompt in prompts or []]
    requests = [replace(request, seed=request.seed + i) for request in base_requests for i in range(count)]
    files = _files(out or Path("out.png"), len(requests))
    options = Options(**option_values)
    all_uses = tuple(dict.fromkeys(use for request in requests for use in request.uses))
    _check_files(all_uses, options)
    with _pipeline(base, all_uses, dtype, device) as pipeline:
        pictures = generate(
            pipeline, requests, options, on_step=_progress(), on_picture=lambda i, picture: _save(picture, files[i])
        )
    _report(pictures, files, began, as_json)


@app.command("grid", epilog='Example: veneer image grid strength "a fox" -a brand --strengths 0,0.5,1 --seeds 1,2,3')
def grid(
    sheet: Annotated[str, typer.Argument(help="Columns: strength (strengths of the mix), or adapters.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts: a row for each prompt and seed.")],
    base: BaseOption = None,
    adapter: AdapterOption = None,
    control: ControlOption = None,
    out: OutOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds: 1,2,3 or FROM-TO.")] = "0",
    strengths: Annotated[
        str | None, typer.Option("--strengths", help="Factors that multiply the strengths. Default: 0,0.25,0.5,0.75,1.")
    ] = None,
    negative: NegativeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    true_guidance: TrueOption = None,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    batch_size: BatchOption = None,
    dtype: DtypeOption = None,
    device: ChosenDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate a labeled grid with one row for each prompt and seed.

    The columns are strengths or adapters. Images with the same seed start from the same noise."""
    from veneer.files.atomic import atomic_write
    from veneer.imaging.adapters import parse_use
    from veneer.imaging.generate import Options
    from veneer.imaging.grid import STRENGTHS, draw_grid, layout
    from veneer.imaging.infotext import png_bytes

    uses = tuple(parse_use(spec) for spec in adapter or [])
    if strengths is not None and sheet != "strength":
        raise ConfigError(f"--strengths is only for a strength sheet, but this is {sheet!r}", fix="leave it out")
    strength_values = STRENGTHS if strengths is None else _numbers(strengths)
    plan = layout(sheet, prompts, uses, seeds=_whole_numbers(seeds), strengths=strength_values, negative=negative or "")
    options = Options(**_option_values(size, steps, guidance, true_guidance, scheduler, control, batch_size))
    file = _files(out or Path("grid.png"), 1)[0]
    _check_files(uses, options)
    began = time.perf_counter()
    with _pipeline(base, uses, dtype, device) as pipeline:
        image, pictures = draw_grid(pipeline, plan, options, on_step=_progress())
    record = {"version": 1, "sheet": sheet, "pictures": [picture.record for picture in pictures]}
    atomic_write(file, [png_bytes(image, f"{sheet} sheet of {len(pictures)} pictures", {"grid": record})])
    say(f"{file}: {len(plan.rows)} × {len(plan.columns)} pictures")
    if as_json:
        result: dict[str, Any] = {"file": str(file), "sheet": sheet, "rows": plan.rows, "columns": plan.columns}
        result |= {"seconds": round(time.perf_counter() - began, 3), "infotexts": [p.text for p in pictures]}
        print_json(result)


def _option_values(
    size: str | None,
    steps: int | None,
    guidance: float | None,
    true_guidance: float | None,
    scheduler: str | None,
    control: list[str] | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """Return the keyword arguments for `Options`, for the given options only."""
    from veneer.imaging.controls import parse_control

    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "true_guidance": true_guidance}
    options |= {"scheduler": scheduler, "batch_size": batch_size}
    if control:
        options["controls"] = tuple(parse_control(spec) for spec in control)
    if size is not None:
        width, times, height = size.lower().partition("x")
        height = height if times else width
        if not (width.isdecimal() and height.isdecimal()):
            raise ConfigError(f"--size {size}", fix="WIDTHxHEIGHT, as in 1024x768, or one number for both")
        options |= {"width": int(width), "height": int(height)}
    return {key: value for key, value in options.items() if value is not None}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--strengths {text!r} is not a list of numbers", fix="--strengths 0,0.5,1") from None


def _whole_numbers(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        if int(last) - int(first) >= _MOST_SEEDS:
            raise ConfigError(f"--seeds {text} makes {int(last) - int(first) + 1} rows", fix=f"at most {_MOST_SEEDS}")
        return list(range(int(first), int(last) + 1))
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"--seeds {text!r} is not a list of seeds", fix="--seeds 1,2,3 or --seeds 1-8")
    return [int(part) for part in text.split(",")]


def _files(out: Path, number: int) -> list[Path]:
    """Return the paths to write: `out`, or `number` numbered paths in the same folder.

    Called before a base is loaded. Raises ConfigError for an invalid path."""
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out} is not a .png file", fix="use a .png file, which can store the settings")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", fix="choose another file name, or move the folder")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}", fix="create the folder, or choose another path")
    if number == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:0{len(str(number))}d}{out.suffix}") for i in range(1, number + 1)]


def _check_files(uses: tuple[Use, ...], options: Options) -> None:
    """Check that all adapters and input images exist.

    Called before a base is loaded. Raises AdapterError or DataError."""
    from veneer.adapters.use import adapter_path
    from veneer.imaging.controls import hashed_picture

    for picture in (options.image, options.mask, *(control.path for control in options.controls), *options.references):
        if isinstance(picture, str | Path):
            hashed_picture(picture)
    for name, strength in uses:
        adapter_path(name)
        say(f"adapter {name} at strength {strength}")


def _pipeline(base: str | None, uses: tuple[Use, ...], dtype: str | None, device: str) -> ImagePipeline:
    from veneer.imaging.adapters import ImagePipeline
    from veneer.models.image.base import load_image

    name = chosen_base(base, [name for name, _ in uses], _FALLBACK)
    loaded = load_image(name, say=say, dtype=dtype or "auto", device=device)
    say_loaded(loaded)
    return ImagePipeline(loaded, say=say)


def _progress() -> Callable[[int, int], None] | None:
    """Return a callback that prints a step counter; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rstep {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _save(picture: RecordedPicture, file: Path) -> None:
    picture.save(file)
    say(f"{file}: seed {picture.infotext.fields['Seed']}")


def _report(pictures: list[RecordedPicture], files: list[Path], began: float, as_json: bool) -> None:
    if as_json:
        results = [
            {"file": str(file), "seed": int(p.infotext.fields["Seed"]), "infotext": p.text}
            | {"cut": p.cut, "record": p.record}
            for p, file in zip(pictures, files, strict=True)
        ]
        print_json({"pictures": results, "seconds": round(time.perf_counter() - began, 3)})


def _reproduce(
    source: Path,
    out: Path | None,
    base: str | None,
    changes: dict[str, Any],
    option_changes: dict[str, Any],
    dtype: str | None,
    device: str,
) -> tuple[RecordedPicture, Path]:
    """Reproduce the image in `source`, with changes to its request and options."""
    from veneer.imaging.reproduce import read_recipe, reproduce

    recipe = read_recipe(source)
    _check_files((), replace(recipe.options, **option_changes))
    file = _files(out or source.with_name(f"{source.stem}-again.png"), 1)[0]

    def changed(request: ImageRequest, options: Options) -> tuple[ImageRequest, Options]:
        return replace(request, **changes), replace(options, **option_changes)

    with _pipeline(base or recipe.base, (), dtype or recipe.dtype, device) as pipeline:
        picture = reproduce(
            pipeline, recipe, changes=changed if changes or option_changes else None, on_step=_progress()
        )
    _save(picture, file)
    return picture, file
