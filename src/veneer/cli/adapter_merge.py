"""`veneer adapter merge`: merge adapters into a base's weights as a new model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AdapterArguments, AsJson
from veneer.cli.output import print_json, say
from veneer.errors import BaseError, ConfigError

if TYPE_CHECKING:
    from veneer.adapters.merge import MergeReport


def merge_command(
    adapters: AdapterArguments,
    base: Annotated[str, typer.Option("--base", help="Base to merge into; the base itself is not changed.")],
    output: Annotated[str, typer.Option("-o", "--output", help="New folder for the merged model.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the base's stored dtype.")
    ] = None,
    into: Annotated[
        str,
        typer.Option(
            "--into",
            help="For adapters trained on a quantized base: `seen` merges into the dequantized weights from training, "
            "`original` into the weights before quantization.",
        ),
    ] = "seen",
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Write the merge even if rounding loses half of the change or more.")
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Ignore a card that names another base, if every shape matches."),
    ] = False,
    by_shard: Annotated[
        bool,
        typer.Option(
            "--by-shard", help="Merge a transformers/diffusers folder one weight at a time, without loading the model."
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--stochastic", metavar="SEED", help="Round stochastically (unbiased), with this seed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into a base and write a new full model.

    The weights are summed in float32 and rounded once."""
    if into not in ("seen", "original"):
        raise ConfigError(f"--into {into!r} is not a valid value", fix="seen or original")
    from veneer.adapters.merge import merge, merge_shards

    seen = _trained_precision(adapters) if into == "seen" else ""
    if by_shard:
        if dtype is not None:
            fix = "leave out --dtype, or leave out --by-shard"
            raise ConfigError("--by-shard keeps each weight's stored dtype", fix=fix)
        report = merge_shards(base, adapters, output, seed=seed, seen=seen, accept_loss=accept_loss)
        fix = "--stochastic 0 keeps the change on average; --dtype float32 without --by-shard keeps it exactly"
        _print_report(report, as_json, fix)
        return
    from veneer.adapters.use import adapter_path, parse_spec
    from veneer.core.merge import dtype_of
    from veneer.files.weights import stored_dtype, tensor_table
    from veneer.models.sources import find_base, is_image_base
    from veneer.models.text.base import load_text

    if dtype is not None:
        dtype_of(dtype)
    for spec in adapters:
        adapter_path(parse_spec(spec)[0])
    folder = find_base(base, say=say)
    if is_image_base(folder):
        fix = "--by-shard merges adapters into the base's folder, one weight at a time"
        raise BaseError("image bases need --by-shard", where=str(folder), fix=fix)
    stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(stored_dtype(tensor_table(folder)), "float16")
    want = dtype or stored
    # load in the stored dtype if the output has the same dtype; otherwise in float32, which is exact
    exact = want if want == stored else "float32"
    loaded = load_text(base, dtype=exact, quantize=seen or None, say=say)
    how: dict[str, Any] = {"dtype": want, "allow_other_base": allow_other_base, "seed": seed}
    _print_report(merge(loaded, adapters, output, accept_loss=accept_loss, **how), as_json)


def _trained_precision(adapters: list[str]) -> str:
    """Return the quantization of the base during training; "" for none.

    Each adapter's card records the quantization. Raises ConfigError if the cards differ."""
    from veneer.adapters.use import adapter_path, parse_spec
    from veneer.formats.card import CARD_FILE, read_card

    kinds: dict[str, list[str]] = {}
    for spec in adapters:
        folder = adapter_path(parse_spec(spec)[0])
        recipe: Any = read_card(folder).card.recipe if (folder / CARD_FILE).is_file() else {}
        base = recipe.get("base") if isinstance(recipe, dict) else None
        kind = (
            base.get("quantize", base.get("quantise")) if isinstance(base, dict) else None
        )  # old cards use `quantise`
        kinds.setdefault(str(kind or ""), []).append(spec)
    if len(kinds) > 1:
        summary = "; ".join(f"{', '.join(names)}: {kind or '16 bits'}" for kind, names in kinds.items())
        problem = f"these adapters were trained on one base in different precisions ({summary})"
        raise ConfigError(problem, fix="merge adapters of one precision together, or all adapters with --into original")
    return next(iter(kinds))


def _print_report(report: MergeReport, as_json: bool, fix: str = "") -> None:
    if report.warning:
        say(f"warning: {report.warning}; {fix or '--dtype float32 is exact; --stochastic 0 keeps it on average'}")
    if as_json:
        print_json(report.to_dict())
        return
    print(f"wrote {report.folder}: {report.bytes:,} bytes of {report.dtype} weights; {report.tensors} tensors changed")
    print(
        f"rounding to {report.dtype}: {report.changed:.1%} of {report.weights:,} weights changed, "
        f"the change has a relative error of {report.delta_error:.2%} and keeps {report.delta_kept:.2%} of its size"
    )
    if report.seen:
        print(f"merged into the dequantized {report.seen} weights used in training")
    if report.untied:
        print("note: the head no longer shares the embedding's weight, so the model is larger than its base")
