"""`veneer image`: generate images; `veneer image grid`: labelled image grids."""

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
    from veneer.imaging.adapters import ImagePipeline
    from veneer.imaging.generate import ImageRequest, Options, RecordedPicture
    from veneer.models.image.base import ImageBase

_FALLBACK = "catalogue-sdxl"
_MOST_SEEDS = 1000


class _Group(TyperGroup):
    """Typer group that generates images unless the first word is `grid`.

    `veneer image -- grid` uses "grid" as the prompt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] == "grid" else ["make", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == "make" else name, command, rest


app = typer.Typer(cls=_Group, add_completion=False)

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        "-b",
        help="Image base: built-in name, hub id, folder or checkpoint. Default: the adapter's, else catalogue-sdxl.",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="NAME_OR_PATH[:strength][@block=strength,steps=FROM-TO], such as brand:0.8@down=0.5,steps=0-0.6; or a "
        "role in a stack: lock@campaign=product (brand, lens).",
    ),
]
ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        "-c",
        help="canny=IMAGE:weight detects edges; edges= takes an edge image, depth= a depth map; pose@MODEL= names any "
        "ControlNet.",
    ),
]
NegativeOption = Annotated[str | None, typer.Option("--negative", "-n", help="Negative prompt.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps. Default: 30, or the model family's.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", "-g", help="Guidance scale. Default: the model family's."),
]
TrueOption = Annotated[
    float | None, typer.Option("--true-guidance", help="FLUX: scale of classifier-free guidance, for negative prompts.")
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", "-s", help="euler, euler-a, dpm++2m-karras, ddim, unipc, flow-euler, …")
]
SizeOption = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels. Default: the base's.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Images per batch; adapter mixes can differ. Default: 4.")
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
        float | None,
        typer.Option("--denoise", help="Strength of image-to-image: share of the steps that run. Default: 0.6."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Inpainting mask for --image: white is repainted, black is kept.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            "--reference",
            "-r",
            help="Source image to edit, on an editing base; repeatable on FLUX.2 and Qwen-Image-Edit-Plus.",
        ),
    ] = None,
    batch_size: BatchOption = None,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", help='JSONL file with one image per line: {"prompt", "adapters", "seed", …}.'),
    ] = None,
    remade: Annotated[
        Path | None, typer.Option("--from", help="Reproduce this PNG; other options override its settings.")
    ] = None,
    dtype: DtypeOption = None,
    device: ChosenDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate images with a base, adapters and ControlNets.

    Each PNG stores its settings; `--from` reproduces the image. For image grids, see `veneer image grid`."""
    from veneer.imaging.adapters import parse_use
    from veneer.imaging.controls import parse_control

    uses = tuple(parse_use(spec) for spec in adapter or [])
    width, height = _size(size)
    asked: dict[str, Any] = {
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "true_guidance": true_guidance,
        "scheduler": scheduler,
        "denoise": denoise,
        "image": image and str(image),
        "mask": mask and str(mask),
        "batch_size": batch_size,
        "controls": tuple(parse_control(spec) for spec in control or []) or None,
        "references": [str(path) for path in reference or []] or None,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    loading = {"device": device, "dtype": dtype or "auto"}
    if remade is not None:
        if len(prompts or []) > 1 or count != 1 or batch_size is not None or batch is not None:
            fix = "leave --count, --batch, --batch-size and further prompts out"
            raise ConfigError("--from makes one picture", fix=fix)
        changes = {"prompt": prompts[0] if prompts else None, "negative": negative, "seed": seed, "uses": uses or None}
        _remake(remade, out, base, {k: v for k, v in changes.items() if v is not None}, asked, loading, as_json, dtype)
        return
    if batch is not None and prompts:
        raise ConfigError(f"--batch has its own prompts, and {prompts[0]!r} is one more", fix="give it a line there")
    if batch is None and not prompts:
        fix = 'veneer image "a fox" -o fox.png, --batch FILE, or --from PICTURE'
        raise ConfigError("there is no prompt", fix=fix)
    if prompts and prompts[0] == "grid" and prompts[1:2] in ([sheet] for sheet in ("strength", "adapters", "compare")):
        raise ConfigError("grid is not the first word", fix=f"veneer image grid {prompts[1]} …, then the options")

    from veneer.imaging.batch import read_batch
    from veneer.imaging.generate import MOST_COUNT, ImageRequest, Options

    if not 1 <= count <= MOST_COUNT:
        raise ConfigError(f"--count {count}", fix=f"at least 1, at most {MOST_COUNT:,}")
    shared = ImageRequest("", negative or "", seed or 0, uses)
    wanted = read_batch(batch, shared) if batch else [replace(shared, prompt=prompt) for prompt in prompts or []]
    asks = [replace(ask, seed=ask.seed + i) for ask in wanted for i in range(count)]
    files = _files(out or Path("out.png"), len(asks))
    options = Options(**asked)
    every = tuple(dict.fromkeys(use for ask in asks for use in ask.uses))
    _find(every, options)
    with _mixer(chosen_base(base, [name for name, _ in every], _FALLBACK), loading) as mixer:
        _write(mixer, asks, options, files, as_json)


@app.command("grid", epilog='Example: veneer image grid strength "a fox" -a brand --strengths 0,0.5,1 --seeds 1,2,3')
def grid(
    sheet: Annotated[str, typer.Argument(help="strength (× seeds), adapters (× prompts), or compare (base, mix).")],
    prompts: Annotated[list[str], typer.Argument(help="One prompt for strength; one or more for other grids.")],
    base: BaseOption = None,
    adapter: AdapterOption = None,
    control: ControlOption = None,
    out: OutOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds: 1,2,3 or FROM-TO.")] = "0",
    strengths: Annotated[
        str | None,
        typer.Option(
            "--strengths", help="For strength grids: factors on the mix's strengths. Default: 0,0.25,0.5,0.75,1."
        ),
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
    """Generate a labelled grid: strength × seed, adapter × prompt, or base and mix.

    Cells with the same seed start from the same noise."""
    from veneer.imaging.adapters import parse_use
    from veneer.imaging.controls import parse_control
    from veneer.imaging.generate import Options
    from veneer.imaging.grid import STRENGTHS, draw_grid, layout

    uses = [parse_use(spec) for spec in adapter or []]
    if strengths is not None and sheet != "strength":
        raise ConfigError(f"--strengths is for a strength sheet, this is {sheet!r}", fix="leave it out")
    plan = layout(
        sheet,
        prompts,
        uses,
        seeds=_whole_numbers(seeds),
        strengths=STRENGTHS if strengths is None else _numbers(strengths, "--strengths"),
        negative=negative or "",
    )
    width, height = _size(size)
    batch: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    options = Options(
        width,
        height,
        steps,
        guidance,
        1.0 if true_guidance is None else true_guidance,
        scheduler,
        controls=tuple(parse_control(spec) for spec in control or []),
        **batch,
    )
    file = _files(out or Path("grid.png"), 1)[0]
    _find(tuple(uses), options)
    start = time.perf_counter()
    with _mixer(
        chosen_base(base, [name for name, _ in uses], _FALLBACK), {"device": device, "dtype": dtype or "auto"}
    ) as mixer:
        drawn = draw_grid(mixer, plan, options, on_step=_progress())
        from veneer.files.atomic import atomic_write
        from veneer.imaging.infotext import png_bytes

        record = {"version": 1, "sheet": sheet, "pictures": [m.record for m in drawn.made]}
        atomic_write(file, [png_bytes(drawn.image, f"{sheet} sheet of {len(drawn.made)} pictures", {"grid": record})])
        say(f"{file}: {len(plan.rows)} × {len(plan.columns)} pictures")
        if as_json:
            told: dict[str, Any] = {"file": str(file), "sheet": sheet, "rows": plan.rows, "columns": plan.columns}
            print_json(
                told | {"seconds": round(time.perf_counter() - start, 3), "infotexts": [m.text for m in drawn.made]}
            )


# -- inside ------------------------------------------------------------------------------------------------------------


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, times, height = text.lower().partition("x")
    if not times:
        height = width
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size {text}", fix="WIDTHxHEIGHT, as in 1024x768, or one number for both")
    return int(width), int(height)


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"{option} {text!r} is not a list of numbers", fix=f"{option} 0,0.5,1")
    return found


def _whole_numbers(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        if int(last) - int(first) >= _MOST_SEEDS:
            raise ConfigError(f"--seeds {text} are {int(last) - int(first) + 1} rows", fix=f"at most {_MOST_SEEDS}")
        return list(range(int(first), int(last) + 1))
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"--seeds {text!r} is not a list of seeds", fix="--seeds 1,2,3 or --seeds 1-8")
    return [int(part) for part in text.split(",")]


def _files(out: Path, number: int) -> list[Path]:
    """Return `out`, or `number` numbered files next to `out`.

    Raises ConfigError for an invalid path, before a base loads."""
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out} is not a .png file", fix="PNG keeps how a picture was made")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", fix="write elsewhere, or move it away")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}", fix="make it, or write elsewhere")
    if number == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:0{len(str(number))}d}{out.suffix}") for i in range(1, number + 1)]


def _find(uses: tuple[Any, ...], options: Options) -> None:
    """Check that adapters and input images exist, before a base loads.

    Raises AdapterError or DataError."""
    from veneer.adapters.use import adapter_path
    from veneer.imaging.controls import hashed_picture

    for picture in (options.image, options.mask, *(control.path for control in options.controls), *options.references):
        if isinstance(picture, str | Path):
            hashed_picture(picture)
    for name, strength in uses:
        adapter_path(name)
        say(f"adapter {name} at strength {strength}")


def _mixer(name: str, loading: dict[str, Any]) -> ImagePipeline:
    from veneer.imaging.adapters import ImagePipeline
    from veneer.models.image.base import load_image

    base: ImageBase = load_image(name, say=say, **loading)
    say_loaded(base)
    return ImagePipeline(base, say=say)


def _progress() -> Callable[[int, int], None] | None:
    """Return a callback that prints a step counter, or None if stderr is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, of: int) -> None:
        print(f"\rstep {done}/{of}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return show


def _write(mixer: ImagePipeline, asks: list[ImageRequest], options: Options, files: list[Path], as_json: bool) -> None:
    from veneer.imaging.generate import make

    start = time.perf_counter()
    made = make(mixer, asks, options, on_step=_progress(), on_made=lambda i, one: _save(one, files[i]))
    if as_json:
        _print_made(made, files, time.perf_counter() - start)


def _save(made: RecordedPicture, file: Path) -> None:
    made.save(file)
    say(f"{file}: seed {made.infotext.fields['Seed']}")


def _print_made(made: list[RecordedPicture], files: list[Path], seconds: float) -> None:
    results = [
        {"file": str(f), "seed": int(m.infotext.fields["Seed"]), "infotext": m.text, "cut": m.cut, "record": m.record}
        for m, f in zip(made, files, strict=True)
    ]
    print_json({"pictures": results, "seconds": round(seconds, 3)})


def _remake(
    picture: Path,
    out: Path | None,
    base: str | None,
    ask: dict[str, Any],
    options: dict[str, Any],
    loading: dict[str, Any],
    as_json: bool,
    dtype: str | None,
) -> None:
    from veneer.imaging.reproduce import read_recipe, remake

    wanted = read_recipe(picture)
    _find((), replace(wanted.options, **options))
    name = base or wanted.base
    if not name:
        raise ConfigError("the picture does not name a base that can be loaded", fix="add --base NAME")
    file = _files(out or picture.with_name(f"{picture.stem}-again.png"), 1)[0]
    start = time.perf_counter()
    with _mixer(name, loading | {"dtype": dtype or wanted.dtype}) as mixer:

        def changed(old: ImageRequest, before: Options) -> tuple[ImageRequest, Options]:
            return replace(old, **ask), replace(before, **options)

        made = remake(mixer, wanted, changes=changed if ask or options else None, on_step=_progress())
        _save(made, file)
        if as_json:
            _print_made([made], [file], time.perf_counter() - start)
