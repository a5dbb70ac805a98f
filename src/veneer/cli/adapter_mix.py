"""`veneer adapter mix|resize|extract|diff|strength`; cli/adapter.py registers these commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AdapterArgument, AsJson
from veneer.cli.output import print_json

if TYPE_CHECKING:
    from veneer.adapters.mix import MixReport

_Output = Annotated[
    str, typer.Option("-o", "--output", help="New folder for the adapter, or a file such as NAME.safetensors.")
]
_To = Annotated[
    str | None,
    typer.Option("--to", help="peft, kohya, diffusers, comfyui, gguf or vllm; default: from the output's suffix."),
]
_Rank = Annotated[int | None, typer.Option("--rank", help="Keep at most this rank.")]
_Energy = Annotated[float | None, typer.Option("--energy", help="Keep this share of ‖ΔW‖², such as 0.95.")]
_Error = Annotated[float | None, typer.Option("--error", help="Maximum relative error, ‖difference‖/‖ΔW‖.")]
_Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of computed weights: float32, bfloat16 or float16.")]
_Base = Annotated[
    str | None, typer.Option("--base", help="The base's safetensors folder; needed for DoRA and full copies.")
]
_Blocks = Annotated[str, typer.Option("--blocks", help="down_blocks.0=0.5,mid_block=1.2,layers.3-7=0.")]


def register_commands(app: typer.Typer) -> None:
    """Register these commands in `veneer adapter`."""
    app.command(epilog="Example: veneer adapter mix runs/style:0.8 runs/product:0.5 -o mixed --rank 32")(mix)
    app.command(epilog="Example: veneer adapter resize runs/style -o small --error 0.05")(resize)
    app.command(epilog="Example: veneer adapter extract base-model tuned-model -o extracted --rank 32")(extract)
    app.command(epilog="Example: veneer adapter diff runs/first runs/second")(diff)
    app.command(epilog="Example: veneer adapter strength runs/style --blocks layers.0-3=0.5 -o softer")(strength)


def mix(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="Two or more adapters.", show_default=False)
    ],
    output: _Output,
    method: Annotated[str, typer.Option("--method", help="sum, svd, ties or orthogonal.")] = "sum",
    rank: _Rank = None,
    energy: _Energy = None,
    error: _Error = None,
    density: Annotated[float, typer.Option("--density", help="For ties: share of entries to keep.")] = 0.5,
    blocks: _Blocks = "",
    base: _Base = None,
    dtype: _Dtype = "float32",
    to: _To = None,
    as_json: AsJson = False,
) -> None:
    """Mix adapters into one adapter: the exact sum of strength·ΔW, or another method.

    Reports the relative distance between the result and the exact sum."""
    from veneer.adapters import mix as mixing

    report = mixing.mix_adapters(
        adapters,
        output,
        method=method,
        rank=rank,
        energy=energy,
        error=error,
        density=density,
        blocks=blocks,
        base=base,
        dtype=dtype,
        to=to,
    )
    _print_report(report, as_json)


def resize(
    name: AdapterArgument,
    output: _Output,
    rank: _Rank = None,
    energy: _Energy = None,
    error: _Error = None,
    base: _Base = None,
    dtype: _Dtype = "float32",
    to: _To = None,
    as_json: AsJson = False,
) -> None:
    """Write a low-rank approximation of an adapter, limited by rank, energy or error."""
    from veneer.adapters import mix as mixing

    report = mixing.resize(name, output, rank=rank, energy=energy, error=error, base=base, dtype=dtype, to=to)
    _print_report(report, as_json)


def extract(
    base: Annotated[str, typer.Argument(help="The base: a safetensors file or folder.", show_default=False)],
    tuned: Annotated[
        str, typer.Argument(help="The fine-tuned model: a safetensors file or folder.", show_default=False)
    ],
    output: _Output,
    rank: _Rank = None,
    energy: _Energy = None,
    error: _Error = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Regular expression to search for in module names.")
    ] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="Prefix of every module name, such as unet.")] = "",
    dtype: _Dtype = "float32",
    to: _To = None,
    as_json: AsJson = False,
) -> None:
    """Extract an adapter from the difference of two full models, weight by weight."""
    from veneer.adapters import mix as mixing

    report = mixing.extract(
        base, tuned, output, rank=rank, energy=energy, error=error, targets=targets, prefix=prefix, dtype=dtype, to=to
    )
    _print_report(report, as_json)


def diff(a: AdapterArgument, b: AdapterArgument, as_json: AsJson = False) -> None:
    """Show, for each module, the ‖ΔW‖ of two adapters and the cosine of their changes."""
    from veneer.adapters import mix as mixing

    difference = mixing.diff(a, b)
    if as_json:
        print_json(difference)
        return
    width = max((len(n) for n in difference["modules"]), default=3)
    print(f"{'module':<{width}}  {'‖a‖':>10}  {'‖b‖':>10}  {'cosine':>7}  {'‖a−b‖/‖a‖':>10}")
    for module, row in [*difference["modules"].items(), ("all", difference["all"])]:
        norms = f"{row['norm_a']:>10.4g}  {row['norm_b']:>10.4g}"
        print(f"{module:<{width}}  {norms}  {row['cosine']:>7.4f}  {row['difference']:>10.4g}")
    for side, names in difference["only"].items():
        if names:
            print(f"only in {side}: {len(names)} modules")
    _notes("not compared", difference["skipped"])


def strength(
    name: AdapterArgument,
    blocks: _Blocks = "",
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the adapter with the new strengths here.")
    ] = None,
    to: _To = None,
    as_json: AsJson = False,
) -> None:
    """Show ‖ΔW‖ per block, and optionally write the adapter with new strengths."""
    from veneer.adapters import mix as mixing

    report: dict[str, Any] = mixing.strength(name, output, blocks=blocks, to=to)
    if as_json:
        print_json(report)
        return
    width = max((len(n) for n in report["blocks"]), default=5)
    print(f"{'block':<{width}}  modules  {'strength':>8}  {'‖ΔW‖':>10}   share")
    for block, row in report["blocks"].items():
        strengths = ", ".join(f"{s:g}" for s in row["strengths"])
        print(f"{block:<{width}}  {row['modules']:>7}  {strengths:>8}  {row['norm']:>10.4g}  {row['share']:>6.1%}")
    _notes("without a norm", report["skipped"])
    if output is not None:
        print(f"wrote {report['written']['path']}: {report['written']['bytes']:,} bytes")


def _print_report(report: MixReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    ranks = ", ".join(f"{n} of rank {r}" for r, n in sorted(report.ranks.items(), key=lambda item: int(item[0])))
    print(f"wrote {report.path}: {report.bytes:,} bytes, pairs: {ranks or 'none'}")
    print(f"{report.method}: relative error {report.error:.3%} (‖ΔW‖ {report.norm:.4g})")
    for module, off in report.worst():
        print(f"  {module}: {off:.3%}")
    _notes("left out", report.left)
    for note in report.notes:
        print(f"note: {note}")


def _notes(title: str, lines: list[str]) -> None:
    if lines:
        print(f"{title}: {len(lines)}")
        for line in lines[:10]:
            print(f"  {line}")
        if len(lines) > 10:
            print(f"  … and {len(lines) - 10} more: see --json")
