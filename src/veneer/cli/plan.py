"""`veneer plan`: memory, time and money of a run before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AsJson
from veneer.cli.output import say
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.plan.plan import Plan
    from veneer.plan.traced import TracedStep

app = typer.Typer(add_completion=False)

_EXAMPLE = (
    "Example: veneer plan --base meta-llama/Llama-3.1-70B --gpu h100-80gb --rows 5000 --tokens-per-row 600 --epochs 3"
)
_OF_DATA = {"tokens_per_row", "longest", "trained"}
_OF_TEXT = _OF_DATA | {"micro_tokens"}
_OF_PICTURES = {"size", "micro_pictures", "targets"}
_OF_BOTH = {"epochs", "batch", "rank", "dtype", "quantise", "checkpointing"}
_SERVED = {"tenants", "prompt", "answer", "together"}


@app.command(epilog=_EXAMPLE)
def plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A training configuration to plan.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A base by its hub id, or a folder or config.json of one.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="A GPU of the table (--list), cpu for this machine's.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many of them.")] = 1,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows (of pictures: pictures).")] = None,
    tokens_per_row: Annotated[float | None, typer.Option("--tokens-per-row", min=2, help="Tokens of a row.")] = None,
    longest: Annotated[int | None, typer.Option("--longest", min=2, help="Tokens of the longest row.")] = None,
    trained: Annotated[float, typer.Option("--trained", min=0.001, max=1, help="Share of tokens learned.")] = 1.0,
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="Times over the data.")] = 3,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in a step.")] = 16,
    micro_tokens: Annotated[int, typer.Option("--micro-tokens", min=1, help="Tokens in memory at once.")] = 2048,
    size: Annotated[int | None, typer.Option("--size", min=64, help="Side of a picture, in pixels.")] = None,
    micro_pictures: Annotated[int, typer.Option("--micro-pictures", min=1, help="Pictures in memory at once.")] = 1,
    targets: Annotated[
        str, typer.Option("--targets", help="Of pictures: attention, attention+ff or attention+ff+conv.")
    ] = "attention",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of every pair.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the base: bfloat16 or float32.")] = "bfloat16",
    quantise: Annotated[str | None, typer.Option("--quantise", help="nf4, fp4 or int8.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activations are made again.")] = False,
    price: Annotated[float | None, typer.Option("--price", min=0, help="US dollars an hour of one GPU.")] = None,
    tenants: Annotated[int, typer.Option("--tenants", min=1, help="Adapters to serve.")] = 100,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Tokens a request reads.")] = None,
    answer: Annotated[int, typer.Option("--answer", min=1, help="Tokens a request writes.")] = 100,
    together: Annotated[int, typer.Option("--together", min=1, help="Requests served at once.")] = 32,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Take short real steps here first, and keep what they show.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Follow a whole step on a GPU that is not there: bytes, waits, float32.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="The bases and GPUs that are known, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a run needs before it runs: memory by part, whether it fits, what makes it fit, hours and dollars.

    Needs a base's configuration and never its weights."""
    from veneer.plan.calibration import cpu_device, rates_here
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
    if calibrate:
        _calibrate(base or "smollm2-135m", dtype)
        if config is None and base is None:
            return
    device = cpu_device() if gpu is None or gpu == "cpu" else device_named(gpu, count=gpus, price=price)
    made: Plan
    if config is not None:
        _refuse(context, {"base", *_OF_TEXT - _OF_DATA, *_OF_PICTURES, *_OF_BOTH}, "the configuration says it")
        from veneer.train.planning import plan_of_config

        made = plan_of_config(
            config, overrides or [], device, rows=rows, tokens_per_row=tokens_per_row, longest=longest, trained=trained,
            traffic=None if prompt is None else Traffic(prompt, answer, together, tenants),
        )  # fmt: skip
    elif base is not None:
        if rows is None:
            raise ConfigError("a plan needs --rows", fix=_EXAMPLE.removeprefix("Example: "))
        found = base_config(base)
        rates, process = rates_here(device, dtype)
        if is_denoiser(found):
            _refuse(context, _OF_TEXT | _SERVED, "the base is for pictures")
            side = size or int(found.get("picture", 1024))
            load: Any = ImageLoad(
                micro_pictures, side, side, -(-batch // micro_pictures), rank, dtype, quantise, checkpointing,
                targets=targets,
            )  # fmt: skip
            job = TrainingJob(rows, 1.0, epochs, batch)
            made = image_plan(base, found, load, device, rates, job, process=process)
        elif tokens_per_row is None:
            raise ConfigError("a plan of text needs --tokens-per-row", fix=_EXAMPLE.removeprefix("Example: "))
        else:
            _refuse(context, _OF_PICTURES, "the base is for text")
            load = Load.of(
                longest or round(tokens_per_row), micro_tokens, batch, rank=rank, dtype=dtype, quantise=quantise,
                checkpointing=checkpointing, trained=trained,
            )  # fmt: skip
            traffic = Traffic(prompt or round(tokens_per_row), answer, together, tenants)
            job = TrainingJob(rows, tokens_per_row, epochs, batch)
            shape = text_shape(found)
            made = text_plan(base, shape, load, device, rates, job, process=process, traffic=traffic)
    else:
        raise ConfigError("nothing to plan", fix=f"give a CONFIG.yaml, or {_EXAMPLE.removeprefix('Example: ')}")
    step: TracedStep | None = None
    if trace:
        from veneer.train.planning import base_fields
        from veneer.train.traced import traced_plan

        fields = base_config(base) if base is not None else base_fields(config, overrides or [])  # type: ignore[arg-type]
        step = traced_plan(made, fields)
    if as_json:
        print(json.dumps(made.to_dict() | ({} if step is None else {"trace": step.to_dict()})))
    else:
        print(plan_text(made) + ("" if step is None else "\n\n" + step.text()))


def _refuse(context: typer.Context, names: set[str], why: str) -> None:
    """ConfigError where one of these options was given, which would be without effect."""
    given = [n for n in sorted(names) if str(context.get_parameter_source(n)).endswith("COMMANDLINE")]
    if given:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{said}: {why}", fix="leave it out, or say it as section.key=value of a configuration")


def _calibrate(base: str, dtype: str) -> None:
    from veneer.models.loading import errors_only
    from veneer.ops.choice import settled
    from veneer.plan.calibration import calibrate, write_calibration

    with errors_only():
        record = calibrate(base, dtype=dtype, say=say)
    for op, found in settled().items():
        say(f"{op}: {found.line()}")
    file = write_calibration(record)
    say(f"{record.rates().source}; process {record.process / 1e9:.2f} GB: kept in {file}")


def _list(as_json: bool) -> None:
    from veneer.plan.tables import base_names, device_named, gpu_names

    if as_json:
        print(json.dumps({"bases": base_names(), "gpus": gpu_names()}))
        return
    for name in gpu_names():
        d = device_named(name)
        cost = "" if d.price is None else f"${d.price:g}/h"
        rates = f"{d.bandwidth / 1e9:>6,.0f} GB/s {d.flops / 1e12:>6,.0f} TFLOP/s"
        print(f"{name:<18} {d.memory / 1e9:>6.1f} GB {rates} {cost:>8}")
    print()
    for name in base_names():
        print(name)
