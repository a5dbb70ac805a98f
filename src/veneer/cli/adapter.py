"""`veneer adapter inspect|verify`.

The other `veneer adapter` commands are in adapter_convert.py (`convert`), adapter_merge.py (`merge`) and
adapter_mix.py (`mix|resize|extract|diff|strength`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from veneer.cli import adapter_mix
from veneer.cli.adapter_convert import convert_command
from veneer.cli.adapter_merge import merge_command
from veneer.cli.options import AdapterArgument, Alpha, AsJson, FromPickle, ShowAll
from veneer.cli.output import cut_list, field, print_json, print_table, say, set_show_all
from veneer.errors import BaseError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect, verify, convert, mix and merge adapters.")


@app.command(epilog="Example: veneer adapter inspect style.safetensors")
def inspect(
    name: AdapterArgument,
    from_pickle: FromPickle = False,
    alpha: Alpha = None,
    show_all: ShowAll = False,
    as_json: AsJson = False,
) -> None:
    """Show an adapter's format, ranks, scales, hashes and trigger words.

    Reads every supported format, and shows whether veneer can use the adapter and why. No base is needed. The
    exit code is 0 if veneer can use the adapter, otherwise 2."""
    from veneer.adapters.inspect import inspect as inspected

    set_show_all(show_all)
    inspection = inspected(name, from_pickle=from_pickle, alpha=alpha)
    if as_json:
        print_json(inspection)
    else:
        _show(inspection)
    if not inspection["verdict"]["use"]:
        raise typer.Exit(2)


def _show(inspection: dict[str, Any]) -> None:
    verdict = inspection["verdict"]
    if verdict["use"]:
        print("usable")
    else:
        first, *lines = verdict["why"].splitlines()
        print(f"refused: {field(first)}")
        for line in cut_list(lines):
            print(line)
        if verdict["fix"]:
            print(f"  fix: {field(verdict['fix'])}")
        print("readable contents:")
    card, hashes, coverage = inspection["card"], inspection["hashes"], inspection["coverage"]
    fields = {
        "adapter": inspection["adapter"],
        "format": inspection["format"],
        "because": "; ".join(inspection["reasons"]),
        "family": inspection["family"],
        "digest": inspection["digest"],
        "base": inspection["base"] or "not stated",
        "fingerprint": inspection["base_fingerprint"],
        "holds": f"{inspection['pairs']} pairs, {inspection['parameters']:,} parameters, {inspection['bytes']:,} bytes",
        "components": _counts_text(inspection["components"], skip=""),
        "dtypes": ", ".join(inspection["dtypes"]),
        "ranks": _counts_text(inspection["ranks"]),
        "alphas": _counts_text(inspection["alphas"]),
        "variant": ", ".join(inspection["variants"]),
        "dropout": f"{inspection['dropout']:g}" if inspection["dropout"] else "",
        "full copies": ", ".join(cut_list(list(inspection["full_copies"]))),
        "token rows": ", ".join(cut_list([f"{n}: {len(ids)}" for n, ids in inspection["token_rows"].items()])),
        "triggers": ", ".join(cut_list(inspection["trigger_words"])),
        "sha256": hashes["sha256"],
        "AutoV2/3": f"{hashes['autov2']} / {hashes['autov3'] or '-'}",
        "data": card["data_digest"],
        "licence": card["licence"],
        "created": card["created"],
        "tensors": f"{coverage['used']} used, {len(coverage['unused'])} unused, {len(coverage['unpaired'])} unpaired",
    }
    for key, value in fields.items():
        if value:
            print(f"{key:<12} {field(value)}")
    for title in ("metrics", "recipe"):
        if card[title]:
            print(f"{title:<12} {json.dumps(card[title], sort_keys=True)}")
    for form, row in inspection["deltas"].items():
        dense = f"; each ΔW is computed during use, {row['dense_bytes']:,} bytes in all" if row["dense_bytes"] else ""
        print(f"{form:<12} {row['count']} other changes, {row['bytes']:,} bytes{dense}")
    if inspection["targets"]:
        print()
        head = ("target", "kind", "pairs", "rank", "scale", "A", "B", "‖ΔW‖")
        print_table(head, [_row(leaf, group) for leaf, group in inspection["targets"].items()])
    for problem in ("unused", "unpaired"):
        for key in cut_list(coverage[problem]):
            print(f"{problem}: {key}")
    explained = set(verdict["why"].splitlines())
    for note in cut_list([n for n in inspection["notes"] if f"  - {n}" not in explained]):
        print(f"note: {note}")


def _counts_text(counts: dict[str, int], skip: str | None = None, most: int = 6) -> str:
    """Return values and their counts as text: "16 (264), 32 (8)".

    A single value is shown without its count."""
    entries = [(k, n) for k, n in counts.items() if k != skip]
    if len(entries) == 1:
        return entries[0][0]
    return ", ".join(f"{k} ({n})" for k, n in entries[:most]) + (", …" if len(entries) > most else "")


def _row(target: str, group: dict[str, Any]) -> tuple[str, ...]:
    def several(values: list[Any]) -> str:
        texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values[:3]]
        return ", ".join(texts) + (", …" if len(values) > 3 else "")

    shapes = ["×".join(map(str, s)) for s in group["A"]], ["×".join(map(str, s)) for s in group["B"]]
    values = (several(group["ranks"]), several(group["scales"]), several(shapes[0]), several(shapes[1]))
    return (target, group["kind"], str(group["count"]), *values, f"{group['delta_norm']:.4g}")


@app.command(epilog="Example: veneer adapter verify runs/tickets --base smollm2-135m")
def verify(
    name: AdapterArgument,
    base: Annotated[
        str | None, typer.Option("--base", help="Also check that the adapter fits this base and changes its output.")
    ] = None,
    from_pickle: FromPickle = False,
    alpha: Alpha = None,
    show_all: ShowAll = False,
    as_json: AsJson = False,
) -> None:
    """Check an adapter's files, card, configuration, tensors and fit to a base.

    The exit code is 0 if no check fails, otherwise 2. A check that cannot run does not count as failed."""
    from veneer.adapters.inspect import verify_adapter as check
    from veneer.adapters.use import adapter_path

    set_show_all(show_all)
    adapter_path(name)  # report a wrong name before loading the base
    loaded = None
    if base is not None:
        from veneer.models.sources import find_base, is_image_base
        from veneer.models.text.base import load_text

        if is_image_base(folder := find_base(base, say=say)):
            fix = f"omit --base; `veneer image --base {base} --adapter {name}` checks the fit before it generates"
            raise BaseError("this is an image base; only text bases can be checked", where=str(folder), fix=fix)
        loaded = load_text(base, say=say)
    checks = check(name, loaded, from_pickle=from_pickle, alpha=alpha)
    good = all(c.ok is not False for c in checks)
    if as_json:
        rows = [{"check": c.name, "ok": c.ok, "detail": c.detail} for c in checks]
        print_json({"adapter": name, "ok": good, "checks": rows})
    else:
        for c in checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[c.ok]
            first, *more = c.detail.splitlines() or [""]
            print(f"{mark:<7} {c.name:<10} {field(first)}")
            for line in cut_list(more):
                print(f"{'':<18} {line}")
    if not good:
        raise typer.Exit(2)


_MERGE = "Example: veneer adapter merge runs/tickets:0.8 --base smollm2-135m -o merged"
_CONVERT = "Example: veneer adapter convert style.safetensors --to diffusers -o style-diffusers.safetensors"
app.command("merge", epilog=_MERGE)(merge_command)
app.command("convert", epilog=_CONVERT)(convert_command)


adapter_mix.register_commands(app)
