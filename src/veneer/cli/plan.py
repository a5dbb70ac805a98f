"""`veneer plan`: estimate a run's memory, time and cost."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AsJson, is_config
from veneer.cli.output import say
from veneer.errors import ConfigError, gigabytes, one_of

if TYPE_CHECKING:
    from veneer.plan.plan import Plan

app = typer.Typer(add_completion=False)

_EXAMPLE = (
    "Example: veneer plan --base meta-llama/Llama-3.1-70B --gpu h100-80gb --rows 5000 --tokens-per-row 600 --epochs 3"
)
_OF_DATA = {"tokens_per_row", "longest", "trained"}
_OF_TEXT = _OF_DATA | {"micro_tokens"}
_OF_PICTURES = {"size", "micro_pictures", "before", "targets"}
_OF_BOTH = {"epochs", "batch", "rank", "dtype", "quantize", "checkpointing"}
_OF_SMALLEST = {"smallest", "base", "size", "rank", "targets", "before", "as_json"}
_SERVED = {"tenants", "prompt", "answer", "together"}
_OF_CARDS = {"gpus", "price"}
_ROWS, _TOKENS, _MANY = 10**12, 1 << 20, 1 << 16
"""Upper bounds of options: larger values are typing errors and take hours to plan."""


@app.command(epilog=_EXAMPLE)
def plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="One or more training configurations.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override the file's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base: hub id (see --list), folder, config.json or GGUF file.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="GPU model from --list. Default: cpu, this machine's processor.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=_MANY, help="Number of GPUs.")] = 1,
    rows: Annotated[int | None, typer.Option("--rows", min=1, max=_ROWS, help="Rows or images in the dataset.")] = None,
    tokens_per_row: Annotated[
        float | None, typer.Option("--tokens-per-row", min=2, max=_TOKENS, help="Average tokens per row.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option("--longest", min=2, max=_TOKENS, help="Tokens in the longest row.")
    ] = None,
    trained: Annotated[
        float, typer.Option("--trained", min=0.001, max=1, help="Fraction of tokens that count in the loss.")
    ] = 1.0,
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="Passes over the data.")] = 3,
    batch: Annotated[int, typer.Option("--batch", min=1, max=_MANY, help="Rows per optimizer step.")] = 16,
    micro_tokens: Annotated[
        int | None,
        typer.Option(
            "--micro-tokens", min=1, max=_TOKENS, help="Tokens per micro-batch; default: what fits the device."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=64, max=1 << 14, help="Side of an image, in pixels.")
    ] = None,
    micro_pictures: Annotated[
        int, typer.Option("--micro-pictures", min=1, max=_MANY, help="Images per micro-batch.")
    ] = 1,
    before: Annotated[
        int, typer.Option("--before", min=0, max=16, help="Editing pairs: source images per target image.")
    ] = 0,
    targets: Annotated[
        str,
        typer.Option(
            "--targets", help="LoRA targets of an image base: attention, attention+ff, attention+ff+conv or all-linear."
        ),
    ] = "attention",
    rank: Annotated[int, typer.Option("--rank", min=1, max=_MANY, help="LoRA rank.")] = 16,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the base: bfloat16, float16 or float32.")
    ] = "bfloat16",
    quantize: Annotated[str | None, typer.Option("--quantize", help="Quantize the base: nf4, fp4 or int8.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activation checkpointing: less memory, more time.")
    ] = False,
    price: Annotated[float | None, typer.Option("--price", min=0, help="US dollars per GPU-hour.")] = None,
    tenants: Annotated[int, typer.Option("--tenants", min=1, help="Serving: number of adapters.")] = 100,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Serving: prompt tokens per request.")] = None,
    answer: Annotated[int, typer.Option("--answer", min=1, help="Serving: completion tokens per request.")] = 100,
    together: Annotated[int, typer.Option("--together", min=1, help="Serving: concurrent requests.")] = 32,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="First measure this machine with short training steps, and store the rates."),
    ] = False,
    smallest: Annotated[
        bool,
        typer.Option(
            "--smallest-card",
            help="Show the smallest GPU that trains an image base (default: all), and with which settings.",
        ),
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List known GPUs and bases, and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate a run's memory, time and cost, and whether the run fits.

    Suggests settings that make the run fit. Reads only the base's configuration, never its weights."""
    from veneer.plan.calibration import cpu_device, rates_here
    from veneer.plan.fit import fitting_micro_tokens, left_beside_base
    from veneer.plan.image import ImageLoad, is_denoiser
    from veneer.plan.memory import Load
    from veneer.plan.plan import TrainingJob, image_plan, text_plan
    from veneer.plan.render import plan_text
    from veneer.plan.serving import Traffic
    from veneer.plan.shape import text_shape
    from veneer.plan.tables import base_config, device_named

    if list_:
        _list(as_json)
        return
    if smallest:
        others = {name for name in context.params if name not in _OF_SMALLEST}
        _refuse(context, others, "--smallest-card looks for the card and its settings", "leave it out")
        _smallest(base, size, rank, targets, before, as_json)
        return
    if calibrate:
        _calibrate(base or "smollm2-135m", dtype)
        if config is None and base is None:
            return
    if quantize is not None:
        one_of(quantize, ("nf4", "fp4", "int8"), "a quantization that can be planned", "--quantize")
    one_of(dtype, ("bfloat16", "float32", "float16"), "a precision that can be planned", "--dtype")
    if gpu is None or gpu == "cpu":
        _refuse(context, _OF_CARDS, "the plan is for this machine's processor", "name a card with --gpu")
        device = cpu_device()
    else:
        device = device_named(gpu, count=gpus, price=price)
    if longest is not None and tokens_per_row is not None and longest < tokens_per_row:
        what = f"the longest row has {longest} tokens, and rows have {tokens_per_row:g} on average"
        raise ConfigError(what, where="--longest, --tokens-per-row", fix="leave --longest out, or give the greatest")
    made: Plan
    if config is not None and base is not None and "=" in config.name and not config.exists():
        what = f"{config} changes a configuration, and there is none"
        raise ConfigError(what, fix="with --base say it by an option, as --dtype or --rank; see --help")
    more = [word for word in overrides or [] if is_config(word)]
    if config is not None and more:
        _refuse(context, {"base", *_SERVED, *_OF_TEXT - _OF_DATA, *_OF_PICTURES, *_OF_BOTH}, "of several runs")
        from veneer.plan.render import group_text
        from veneer.train.config.load import load_config
        from veneer.train.planning import plan_of_texts

        files, changes = [str(config), *more], [word for word in overrides or [] if word not in more]
        given = {"rows": rows, "tokens_per_row": tokens_per_row, "longest": longest, "trained": trained}
        group = plan_of_texts([load_config(file, changes)[0] for file in files], files, device, [given] * len(files))
        print(json.dumps(group.to_dict()) if as_json else group_text(group, files))
        return
    if config is not None:
        _refuse(context, {"base", *_OF_TEXT - _OF_DATA, *_OF_PICTURES, *_OF_BOTH}, "the configuration says it")
        from veneer.train.config.load import load_config
        from veneer.train.planning import plan_of_config

        run, _ = load_config(config, overrides or [])
        made = plan_of_config(
            run,
            device,
            rows=rows,
            tokens_per_row=tokens_per_row,
            longest=longest,
            trained=trained,
            traffic=None if prompt is None else Traffic(prompt, answer, together, tenants),
        )
    elif base is not None:
        if rows is None:
            raise ConfigError("a plan needs --rows", fix=_EXAMPLE.removeprefix("Example: "))
        found = base_config(base)
        rates = rates_here(device, dtype)
        if is_denoiser(found):
            _refuse(context, _OF_TEXT | _SERVED, "the base is for pictures", "leave it out")
            side = size or int(found.get("picture", 1024))
            load: Any = ImageLoad(
                micro_pictures,
                side,
                side,
                micros=-(-batch // micro_pictures),
                rank=rank,
                dtype=dtype,
                quantize=quantize,
                checkpointing=checkpointing,
                targets=targets,
                before=before,
            )
            job = TrainingJob(rows, 1.0, epochs, batch)
            made = image_plan(base, found, load, device, rates, job)
        else:
            shape = text_shape(found, base)
            if tokens_per_row is None:
                raise ConfigError("a plan of text needs --tokens-per-row", fix=_EXAMPLE.removeprefix("Example: "))
            _refuse(context, _OF_PICTURES, "the base is for text", "leave it out")
            of = functools.partial(
                Load.of,
                longest or round(tokens_per_row),
                batch=batch,
                rank=rank,
                dtype=dtype,
                quantize=quantize,
                checkpointing=checkpointing,
                trained=trained,
            )
            room = left_beside_base(shape, device, dtype, quantize)
            load = of(micro_tokens or fitting_micro_tokens(shape, device, quantize, room, of))
            traffic = Traffic(prompt or round(tokens_per_row), answer, together, tenants)
            job = TrainingJob(rows, tokens_per_row, epochs, batch)
            made = text_plan(base, shape, load, device, rates, job, traffic=traffic)
    else:
        raise ConfigError("nothing to plan", fix=f"give a CONFIG.yaml, or {_EXAMPLE.removeprefix('Example: ')}")
    if as_json:
        print(json.dumps(made.to_dict()))
        return
    print(plan_text(made))
    if device.kind == "cpu":
        import torch

        from veneer.train.preflight import free_memory

        print(f"free now  {gigabytes(free_memory(torch.device('cpu')))} of memory on this machine")


_SAID_THERE = "leave it out, or say it as section.key=value of a configuration"


def _refuse(context: typer.Context, names: set[str], why: str, fix: str = _SAID_THERE) -> None:
    """Raise ConfigError if the command line has an option in `names`."""
    given = [n for n in sorted(names) if str(context.get_parameter_source(n)).endswith("COMMANDLINE")]
    if given:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{said}: {why}", fix=fix)


def _calibrate(base: str, dtype: str) -> None:
    from veneer.models.loading import errors_only
    from veneer.plan.calibration import calibrate, write_calibration

    with errors_only():
        record = calibrate(base, dtype=dtype, say=say)
    file = write_calibration(record)
    say(f"{record.rates().source}: kept in {file}")


def _smallest(base: str | None, size: int | None, rank: int, targets: str, before: int, as_json: bool) -> None:
    """Print the table of `--smallest-card`: a row for each base and size.

    With `before` > 0, lists only bases that take `before` source images."""
    from veneer.plan.cards import CardFit, smallest_card
    from veneer.plan.image import is_denoiser, most_before
    from veneer.plan.tables import base_config, base_names

    configs = {name: base_config(name) for name in ([base] if base else base_names())}
    if base is not None and not is_denoiser(configs[base]):
        raise ConfigError(f"{base} is no image base that can be planned", fix="veneer plan --base … --gpu … for text")
    configs = {
        name: found
        for name, found in configs.items()
        if is_denoiser(found) and (base is not None or before <= most_before(found))
    }
    if not configs:
        most = max(map(most_before, map(base_config, base_names())))
        raise ConfigError(f"no base takes {before} pictures before each", where="--before", fix=f"at most {most}")
    rows: list[tuple[str, int, CardFit | None]] = []
    for name, config in configs.items():
        own = int(config.get("picture", 1024))
        for side in [size] if size else sorted({own // 2, own}) if own >= 512 else [own]:
            rows.append((name, side, smallest_card(config, side=side, rank=rank, targets=targets, before=before)))
    if as_json:
        print(json.dumps({"cards": [{"base": n, "size": s, **({} if f is None else f.to_dict())} for n, s, f in rows]}))
        return
    each = f" with {before} before it" if before else ""
    print(
        f"one picture{each} at a time, rank {rank} on {targets}; GB while it trains, and while it is loaded and encodes"
    )
    for name, side, fit in rows:
        head = f"{name.rpartition('/')[2]:<30} {side:>5}"
        if fit is None:
            print(f"{head}   no card of the table")
            continue
        used = f"{fit.training / 1e9:>6.1f} {fit.loading / 1e9:>6.1f} of {fit.room / 1e9:<5.1f}"
        print(f"{head} {fit.card:>4} GB  {used}  {' '.join(fit.settings) or 'as it is'}")


def _list(as_json: bool) -> None:
    from veneer.plan.tables import base_names, device_named, gpu_names

    if as_json:
        print(json.dumps({"bases": base_names(), "gpus": gpu_names()}))
        return
    print("for --gpu: memory, bandwidth, products in bfloat16, price as assumed (--price replaces it)")
    for name in gpu_names():
        d = device_named(name)
        cost = "" if d.price is None else f"${d.price:.2f}/h"
        rates = f"{d.bandwidth / 1e9:>6,.0f} GB/s {d.flops / 1e12:>6,.0f} TFLOP/s"
        print(f"{name:<18} {d.memory / 1e9:>6.1f} GB {rates} {cost:>8}")
    print("\nfor --base; others by their folder or config.json")
    for name in base_names():
        print(name)
