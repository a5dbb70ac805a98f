"""`veneer export`: write a base with adapters merged in, for llama.cpp or Ollama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import AdapterArguments, AllowOtherBase, AsJson, ChosenDevice, chosen_base
from veneer.cli.output import print_json, say
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.core.adapter import Card
    from veneer.train.config.text import DataSection
    from veneer.train.text.rows import Row

app = typer.Typer(add_completion=False)


@app.command("export", epilog="Example: veneer export runs/support --for gguf --type q4_k_m -o support.gguf")
def export_command(
    adapters: AdapterArguments,
    target: Annotated[str, typer.Option("--for", help="gguf (llama.cpp) or ollama.", show_default=False)],
    kind: Annotated[
        str, typer.Option("--type", help="Type of the weights: f16, q8_0, q6_k, q5_k_m or q4_k_m.")
    ] = "f16",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="File for gguf, folder for ollama. Default: named like the adapter."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model. Default: the first adapter's base.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Rows for the loss. Default: the rows held out from the first adapter's training."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of rows to use, from the first.", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    device: ChosenDevice = "auto",
    allow_other_base: AllowOtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into their base and write the model for another program.

    Before the output appears, the loss on held-out rows is shown for the base, the adapters and the export."""
    from veneer.adapters.export import export_path, exported
    from veneer.adapters.use import parse_spec
    from veneer.files.weights import stored_dtype, tensor_table
    from veneer.models.loading import errors_only
    from veneer.models.sources import find_base
    from veneer.models.text.base import load_text

    names = [parse_spec(spec)[0] for spec in adapters]
    path = export_path(names, output, target, kind, force)
    name = chosen_base(base, names)
    if not name:
        raise ConfigError("no base is named", fix="--base smollm2-135m, a folder, a .gguf file or a hub id")
    card = _card(names[0])
    rows, settings, why = _rows(card, data, limit)
    system = _constant_system(card, rows)
    dtype = "bfloat16" if stored_dtype(tensor_table(find_base(name, say=say))) == "BF16" else "float32"
    with errors_only():
        loaded = load_text(name, dtype=dtype, device=device, say=say)
        options: dict[str, Any] = {"system": system, "force": force, "allow_other_base": allow_other_base}
        losses: dict[str, float] = {}
        if rows:
            losses = _losses(loaded, rows, settings, {"base": [], "adapters": adapters}, allow_other_base)
        with exported(loaded, adapters, path, target=target, kind=kind, **options) as export:
            if rows:
                losses |= _losses(export.load(), rows, settings, {"export": []}, False)
                say(f"loss on {len(rows)} rows ({why}): " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
                if warning := loss_warning(losses, kind):
                    export.notes.append(warning)
            else:
                export.notes.append(f"the loss was not measured: {why}")
            for note in export.notes:
                say(f"note: {note}")
    if as_json:
        print_json(export.to_dict() | {"rows": len(rows), "loss": losses})
        return
    types = ", ".join(f"{count} {type_}" for type_, count in sorted(export.types.items()))
    print(f"wrote {export.path}: {export.bytes:,} bytes; tensors: {types}")
    if target == "ollama":
        print(f"next: cd {export.path} && ollama create {path.name.lower()} -f Modelfile")


def _losses(
    base: Any, rows: list[Row], data: DataSection | None, mixes: Any, allow_other_base: bool
) -> dict[str, float]:
    from veneer.train.text.evaluate import score_mixes

    scores = score_mixes(base, rows, mixes, data=data, generate=False, allow_other_base=allow_other_base)
    return {mix: each.loss for mix, each in scores.items() if each.loss is not None}


def loss_warning(losses: dict[str, float], kind: str) -> str:
    """Return a warning if the export loses more than the adapters gain, else ""."""
    gain, lost = losses["base"] - losses["adapters"], losses["export"] - losses["adapters"]
    if lost <= max(gain, 0) or lost < 1e-3:
        return ""
    return f"warning: {kind} raises the loss by {lost:.4f}, more than the {gain:.4f} that the adapters lower it by"


def _card(name: str) -> Card | None:
    from veneer.adapters.use import adapter_path
    from veneer.formats.card import CARD_FILE, read_card

    folder = adapter_path(name)
    return read_card(folder).card if (folder / CARD_FILE).is_file() else None


def _rows(card: Card | None, data: list[str] | None, limit: int | None) -> tuple[list[Row], DataSection | None, str]:
    """Return held-out rows, how to encode them, and where they are from or why there are none."""
    from veneer.jobs.post_training import HeldOut, held_out_rows
    from veneer.train.config.load import config_from
    from veneer.train.config.text import TrainConfig
    from veneer.train.text.rows import read_rows

    if data:
        return read_rows(data, limit=limit)[0], None, ", ".join(data)
    if card is None or not card.recipe:
        return [], None, "the adapter's card has no recipe; give rows with --data"
    try:
        config, _ = config_from({**card.recipe, "output": {"directory": "unused"}})
        if not isinstance(config, TrainConfig):
            return [], None, "the adapter is not for text"
        rows = held_out_rows(HeldOut(limit=limit), config)
    except (ConfigError, DataError) as error:
        return [], None, f"the rows held out from training are not available ({error.what}); give rows with --data"
    source = config.data.files("train" if config.data.validation is None else "validation")
    return rows, config.data, f"held out: {', '.join(map(str, source))}"


def _constant_system(card: Card | None, rows: list[Row]) -> str:
    """Return the system message of the card's sample, if all rows have the same one, else ""."""
    from veneer.formats.card import opening, sample_messages

    if card is None:
        return ""
    system, _ = opening(sample_messages(card.extra))
    own = {m["content"] if m["role"] == "system" else "" for row in rows for m in row.messages[:1]}
    return system if system and own <= {system} else ""
