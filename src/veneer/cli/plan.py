"""`veneer plan`: estimate a run's memory, time and cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import AsJson, is_config
from veneer.errors import ConfigError, gigabytes

app = typer.Typer(add_completion=False)

_EXAMPLE = (
    "Example: veneer plan --base meta-llama/Llama-3.1-70B --gpu h100-80gb --rows 5000 --tokens-per-row 600 --epochs 3"
)
_KEYS = {
    "base": "base.name",
    "dtype": "base.dtype",
    "quantize": "base.quantize",
    "rank": "adapter.rank",
    "targets": "adapter.targets",
    "epochs": "schedule.epochs",
    "batch": "batching.rows",
    "micro_pictures": "batching.micro_rows",
    "size": "data.resolution",
}
"""Option -> the configuration key that the option sets."""
_ROWS, _TOKENS, _MANY = 10**12, 1 << 20, 1 << 16
"""Upper bounds of options. Larger values are typing errors, and planning for them would take hours."""


@app.command(epilog=_EXAMPLE)
def plan(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A training configuration.")] = None,
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
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 3,
    batch: Annotated[int, typer.Option("--batch", min=1, max=_MANY, help="Rows per optimizer step.")] = 16,
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
    list_: Annotated[bool, typer.Option("--list", help="List known GPUs and bases, and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate a run's memory, time and cost, and whether the run fits.

    If the run does not fit, suggests settings that make it fit. Reads only the base's configuration, never
    its weights. Options override the settings of the configuration file."""
    if list_:
        _list(as_json)
        return
    from veneer.plan.render import plan_text
    from veneer.plan.serving import Traffic
    from veneer.plan.tables import cpu_device, device_named
    from veneer.train.config.image import ImageTrainConfig
    from veneer.train.config.load import load_config
    from veneer.train.planning import plan_of_config

    if gpu is None or gpu == "cpu":
        if flags := [f"--{name}" for name in ("gpus", "price") if _is_given(context, name)]:
            raise ConfigError(
                f"{', '.join(flags)}: the plan is for this machine's processor", fix="select a GPU with --gpu"
            )
        device = cpu_device()
    else:
        device = device_named(gpu, count=gpus, price=price)
    settings = list(overrides or [])
    if config is not None and not is_config(str(config)):
        config, settings = None, [str(config), *settings]
    settings += [f"{key}={context.params[name]}" for name, key in _KEYS.items() if _is_given(context, name)]
    settings += ["memory.activation_checkpointing=on"] * checkpointing
    if config is None:
        settings = [*_assumed_settings(base, rows, tokens_per_row), *settings]
    traffic = Traffic(round(tokens_per_row)) if config is None and tokens_per_row is not None else None
    run = load_config(config, settings)[0]
    of_images = isinstance(run, ImageTrainConfig)
    unused = [*(["tokens_per_row"] if of_images else []), *([] if of_images and rows is not None else ["before"])]
    if flags := [f"--{name.replace('_', '-')}" for name in unused if _is_given(context, name)]:
        message = f"{', '.join(flags)}: no effect on {'an image' if of_images else 'a text'} plan"
        counted = of_images and flags == ["--before"]  # --before has an effect only with --rows
        raise ConfigError(message, fix="give --rows too" if counted else "leave the options out")
    result = plan_of_config(
        run, device, rows=rows, tokens_per_row=tokens_per_row, source_images=before, traffic=traffic
    )
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    print(plan_text(result))
    if device.kind == "cpu":
        import torch

        from veneer.train.preflight import free_memory

        print(f"free now  {gigabytes(free_memory(torch.device('cpu')))} of memory on this machine")


def _is_given(context: typer.Context, name: str) -> bool:
    return str(context.get_parameter_source(name)).endswith("COMMANDLINE")


def _assumed_settings(base: str | None, rows: int | None, tokens: float | None) -> list[str]:
    """Return the default settings of a plan without a configuration file."""
    from veneer.plan.image import is_denoiser
    from veneer.train.planning import base_fields

    example = _EXAMPLE.removeprefix("Example: ")
    if base is None:
        raise ConfigError("nothing to plan", fix=f"give a CONFIG.yaml, or {example}")
    fields = base_fields(base)
    if rows is None:
        raise ConfigError("a plan needs --rows", fix=example)
    if is_denoiser(fields):
        batching = ["batching.rows=16", "batching.micro_rows=1"]
        return ["data.pictures=pictures", "adapter.targets=attention", *batching, "schedule.epochs=3"]
    if tokens is None:
        raise ConfigError("a plan for a text base needs --tokens-per-row", fix=example)
    return ["data.train=rows.jsonl", f"data.max_length={round(tokens)}"]


def _list(as_json: bool) -> None:
    from veneer.plan.tables import base_names, device_named, gpu_names

    if as_json:
        print(json.dumps({"bases": base_names(), "gpus": gpu_names()}))
        return
    print("for --gpu: memory, bandwidth, speed of bfloat16 matrix products, assumed price (--price overrides it)")
    for name in gpu_names():
        d = device_named(name)
        cost = "" if d.price is None else f"${d.price:.2f}/h"
        rates = f"{d.bandwidth / 1e9:>6,.0f} GB/s {d.flops / 1e12:>6,.0f} TFLOP/s"
        print(f"{name:<18} {d.memory / 1e9:>6.1f} GB {rates} {cost:>8}")
    print("\nfor --base; for other bases, give the folder or config.json")
    for name in base_names():
        print(name)
