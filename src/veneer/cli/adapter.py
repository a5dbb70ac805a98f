"""`veneer adapter inspect|verify|merge`; convert is in adapter_convert.py, mix|resize|extract|diff|strength in
adapter_mix.py."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli import adapter_mix
from veneer.cli.adapter_convert import convert

if TYPE_CHECKING:
    from veneer.merging import Merged

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect, verify, convert, mix and merge adapters.")

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Name = Annotated[
    str, typer.Argument(help="An adapter's folder or file, or its name in the library.", show_default=False)
]


@app.command(epilog="Example: veneer adapter inspect style.safetensors")
def inspect(
    name: _Name,
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="Read a .bin or .pt too, through torch's weights-only loader.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """What is in an adapter of any format: what it is and why, ranks, scales, hashes, trigger words. Needs no base."""
    from veneer.inspecting import inspect as look

    found = look(name, from_pickle=from_pickle)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    card, hashes, coverage = found["card"], found["hashes"], found["coverage"]
    facts = {
        "adapter": found["adapter"],
        "format": found["format"],
        "because": "; ".join(found["reasons"]),
        "family": found["family"],
        "digest": found["digest"],
        "base": found["base"] or "not said",
        "fingerprint": found["base_fingerprint"],
        "holds": f"{found['pairs']} pairs, {found['parameters']:,} parameters, {found['bytes']:,} bytes",
        "components": _several(found["components"], skip=""),
        "dtypes": ", ".join(found["dtypes"]),
        "ranks": _several(found["ranks"]),
        "alphas": _several(found["alphas"]),
        "variant": ", ".join(v for v in ("rslora", "dora") if found[v]) or "LoRA",
        "dropout": f"{found['dropout']:g}" if found["dropout"] else "",
        "full copies": ", ".join(found["full_copies"]),
        "token rows": ", ".join(f"{n}: {len(ids)}" for n, ids in found["token_rows"].items()),
        "new tokens": ", ".join(w for words in found["new_tokens"].values() for w in words),
        "triggers": ", ".join(found["trigger_words"]),
        "sha256": hashes["sha256"],
        "AutoV1/2/3": f"{hashes['autov1']} / {hashes['autov2']} / {hashes['autov3'] or '-'}",
        "data": card["data_digest"],
        "licence": card["licence"],
        "created": card["created"],
        "tensors": f"{coverage['used']} used, {len(coverage['unused'])} unused, {len(coverage['unpaired'])} unpaired",
    }
    for key, value in facts.items():
        if value:
            print(f"{key:<12} {value}")
    for title in ("metrics", "recipe"):
        if card[title]:
            print(f"{title:<12} {json.dumps(card[title], sort_keys=True)}")
    for form, row in found["deltas"].items():
        dense = f"; each ΔW is made when it is used, {row['dense_bytes']:,} bytes in all" if row["dense_bytes"] else ""
        print(f"{form:<12} {row['count']} changes that are no pair, {row['bytes']:,} bytes{dense}")
    if found["targets"]:
        print()
        _table(
            ("target", "kind", "pairs", "rank", "scale", "A", "B", "‖ΔW‖"),
            [_row(leaf, group) for leaf, group in found["targets"].items()],
        )
    for what in ("unused", "unpaired"):
        for key in coverage[what]:
            print(f"{what}: {key}")
    if coverage["unused"] or coverage["unpaired"]:
        print("note: read for use, this file is refused for those tensors, unless with --allow-partial")
    for note in found["notes"]:
        print(f"note: {note}")


def _several(counts: dict[str, int], skip: str | None = None, most: int = 6) -> str:
    """ "16 (264), 32": how many have which value, without the number where all have the same."""
    shown = [(k, n) for k, n in counts.items() if k != skip]
    if len(shown) == 1:
        return shown[0][0]
    return ", ".join(f"{k} ({n})" for k, n in shown[:most]) + (", …" if len(shown) > most else "")


def _row(leaf: str, group: dict[str, Any]) -> tuple[str, ...]:
    def several(values: list[Any]) -> str:
        shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values[:3]]
        return ", ".join(shown) + (", …" if len(values) > 3 else "")

    shapes = ["×".join(map(str, s)) for s in group["A"]], ["×".join(map(str, s)) for s in group["B"]]
    values = (several(group["ranks"]), several(group["scales"]), several(shapes[0]), several(shapes[1]))
    return (leaf, group["kind"], str(group["count"]), *values, f"{group['delta_norm']:.4g}")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command(epilog="Example: veneer adapter verify runs/tickets --base smollm2-135m")
def verify(
    name: _Name,
    base: Annotated[
        str | None, typer.Option("--base", help="Also check that it fits this base and has an effect on it.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Check an adapter's files against its card, its configuration against its tensors, and both against a base.

    Exit code 0 if everything that could be checked holds, 2 if anything does not."""
    from veneer.inspecting import verify as check
    from veneer.using import adapter_path

    adapter_path(name)  # a name that does not exist should not wait for a base to load
    loaded = None
    if base is not None:
        from veneer.models.text import load_text

        loaded = load_text(base, say=_say)
    checks = check(name, loaded)
    good = all(c.ok is not False for c in checks)
    if as_json:
        rows = [{"check": c.name, "ok": c.ok, "detail": c.detail} for c in checks]
        print(json.dumps({"adapter": name, "ok": good, "checks": rows}, indent=2, ensure_ascii=False))
    else:
        for c in checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[c.ok]
            first, *more = c.detail.splitlines() or [""]
            print(f"{mark:<7} {c.name:<10} {first}")
            for line in more:
                print(f"{'':<18} {line}")
    if not good:
        raise typer.Exit(2)


@app.command(epilog="Example: veneer adapter merge runs/tickets:0.8 --base smollm2-135m -o merged")
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:STRENGTH]...", help="One or more adapters.", show_default=False)
    ],
    base: Annotated[str, typer.Option("--base", help="The base to fold them into; it is not changed.")],
    output: Annotated[str, typer.Option("-o", "--output", help="A new folder for the merged model.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as the base is stored.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Go on although a card names another base, if all fits.")
    ] = False,
    by_shard: Annotated[
        bool, typer.Option("--by-shard", help="BASE is a model folder, diffusers' too: one weight at a time, unloaded.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--stochastic", metavar="SEED", help="With --by-shard: round by chance, unbiased.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write a new full model with adapters folded in: summed in float32, rounded once."""
    if by_shard or seed is not None:
        _merge_shards(adapters, base, output, dtype, by_shard, seed, as_json)
        return
    from veneer.core.rounding import DTYPES
    from veneer.errors import ConfigError
    from veneer.merging import merge as fold
    from veneer.models.sources import find
    from veneer.models.text import load_text
    from veneer.models.weights import stored_dtype, tensor_table
    from veneer.using import adapter_path, parse_spec

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}", fix=", ".join(DTYPES))
    for spec in adapters:
        adapter_path(parse_spec(spec)[0])
    stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(
        stored_dtype(tensor_table(find(base, say=_say))), "float16"
    )
    want = dtype or stored
    # Loaded as stored if that is what is written, else in float32, which holds every stored weight exactly.
    loaded = load_text(base, dtype=want if want == stored else "float32", say=_say)
    _say_merged(fold(loaded, adapters, output, dtype=want, allow_other_base=allow_other_base), as_json)


def _merge_shards(
    adapters: list[str], base: str, output: str, dtype: str | None, by_shard: bool, seed: int | None, as_json: bool
) -> None:
    from veneer.errors import ConfigError
    from veneer.merging import merge_shards

    if dtype is not None or not by_shard:
        raise ConfigError(
            "--stochastic goes with --by-shard, which keeps the dtype that is stored", fix="--by-shard without --dtype"
        )
    _say_merged(merge_shards(base, adapters, output, seed=seed), as_json)


def _say_merged(report: Merged, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    print(f"wrote {report.folder}: {report.bytes:,} bytes of {report.dtype} weights, {report.tensors} of them changed")
    print(
        f"rounding to {report.dtype}: {report.changed:.1%} of {report.weights:,} weights moved, "
        f"the delta is {report.delta_error:.2%} off what was asked for, {report.delta_kept:.2%} of its size kept"
    )
    if report.untied:
        print("note: the head no longer shares the embedding's weight, so the model is larger than its base")


app.command(epilog="Example: veneer adapter convert style.safetensors --to diffusers -o style-diffusers.safetensors")(
    convert
)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


adapter_mix.register(app)
