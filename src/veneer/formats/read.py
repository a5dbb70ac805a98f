"""An adapter file or folder of any layout -> an adapter under canonical names, with what became of every tensor.

    keys --split_key--> module text, suffix      texts --names--> family and places      tensors --read_leaf--> leaf
    leaf --rows and halves of its places--> pairs, deltas and whole tensors under canonical names

Nothing is dropped in silence: what is unused, unpaired, or lands where something else has landed is an error that lists
all of it, or, with `allow_partial`, a list. Knows files and names; no bases, but for the shapes of one that is given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError
from veneer.files.safetensors import PICKLE_SUFFIXES
from veneer.formats import peft
from veneer.formats import peft_config as cfg
from veneer.formats.adapter_names import one_adapter
from veneer.formats.detect import format_of
from veneer.formats.leaves import Leaf, read_leaf, split_key, widened
from veneer.formats.metadata import card_of, family_of, unpack_configs
from veneer.formats.names import Choice, choose_family, is_image, near
from veneer.formats.placing import Placer, alphas_of_blocks, leaves_of, outline
from veneer.formats.read_lists import TOKEN_EMBEDDING, is_list, list_modules, list_words
from veneer.formats.tensors import read_adapter_tensors
from veneer.formats.topology import Place, families

__all__ = ["How", "Reading", "read", "read_state", "tensor_file"]

_PREFERRED = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


class How(TypedDict, total=False):
    """What a caller may say of a file that the file does not: see `read`."""

    from_pickle: bool
    moe_layout: str
    adapter_name: str


@dataclass
class Reading:
    """`used`: canonical module -> the keys of the file it came from. `unused`: keys whose module no family knows, or
    that no layout has. `unpaired`: keys of modules that could not be read, each with why in `notes`."""

    adapter: Adapter
    format: str
    reasons: list[str]
    family: str | None
    used: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def read(
    path: str | Path,
    *,
    allow_partial: bool = False,
    from_pickle: bool = False,
    base: peft.Base = None,
    family: str | None = None,
    moe_layout: str = "",
    adapter_name: str = "",
) -> Reading:
    """The adapter in a file or folder, whatever wrote it.

    `base` (a model, its outline, or module names) is checked against, and gives flat LoHa and LoKr their shapes.
    `family`: the base's, taken where the names are those of several families alike. `moe_layout`: how expert pairs' B
    is laid out, where a file does not say (formats/peft_experts.py). `adapter_name`: the one to take of several in one
    file. A file in PEFT's names with an adapter_config.json beside it is read by that.
    Pickles are read only with `from_pickle`. Raises one AdapterError listing every tensor that is unused, unpaired, not
    understood, or lands where another has; UnsafeFileError for pickles and headers that lie."""
    path = Path(path)
    if path.is_dir() and (path / peft.CONFIG_FILE).is_file():
        opened = peft.open_folder(path, from_pickle=from_pickle)
        return _from_peft(opened, path, base, family, moe_layout, adapter_name)
    path = tensor_file(path, from_pickle)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, base)
    if (path.parent / peft.CONFIG_FILE).is_file():
        opened = peft.open_folder(path.parent, file=path, from_pickle=from_pickle)
        if any(key.startswith("base_model.model.") for key in opened.tensors):
            return _from_peft(opened, path, base, family, moe_layout, adapter_name)
    tensors, metadata = read_adapter_tensors(path, from_pickle=from_pickle)
    tensors = one_adapter(tensors, adapter_name, where=str(path))
    return read_state(tensors, metadata, where=str(path), allow_partial=allow_partial, base=base, family=family)


def tensor_file(folder: Path, from_pickle: bool = False) -> Path:
    """The file of tensors in a folder without PEFT's config; a file is itself. Raises AdapterError where there is none,
    or several of which none has a name that diffusers or PEFT gives."""
    if not folder.is_dir():
        return folder
    files = [p for p in sorted(folder.iterdir()) if p.is_file()]
    found = [p for p in files if p.suffix.lower() in (".safetensors", ".gguf")]
    found = found or [p for p in files if from_pickle and p.suffix.lower() in PICKLE_SUFFIXES]
    found = [p for p in found if p.name in _PREFERRED][:1] or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found)
    raise AdapterError(
        f"the folder has {len(found)} adapter files: {names}" if found else "no adapter file in the folder",
        where=str(folder),
        fix="give the file" if found else "a folder that training wrote, or a .safetensors file",
    )


def _from_gguf(path: Path, base: peft.Base) -> Reading:
    from veneer.formats.gguf import read_gguf

    config = getattr(base, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)  # type: ignore[union-attr]
    found = read_gguf(path, head_dim=head_dim)
    metadata = {key: str(value) for key, value in found.fields.items() if isinstance(value, str | int | float)}
    reasons = [f"a GGUF file of type adapter for {found.architecture}"]
    notes = [f"{name}: a norm, which llama.cpp leaves aside too" for name in found.unused]
    used: dict[str, list[str]] = {name: [] for name in found.adapter.pairs}
    return Reading(found.adapter, "gguf", reasons, None, used, found.unused, [], notes, metadata)


def _from_peft(
    opened: peft.Opened, path: Path, base: peft.Base, wanted: str | None, moe_layout: str, adapter_name: str
) -> Reading:
    """A PEFT folder: by PEFT's rules; and, where its names are those of an image family's denoiser, under canonical
    names."""
    where = str(path)
    tensors = one_adapter(opened.tensors, adapter_name, where=where)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(tensors):
        if parts := split_key(key):
            texts[parts[0]][parts[1]] = key
    shapes = {text: _shape(tensors, own) for text, own in texts.items()}
    of_text = wanted is not None and wanted not in families()  # the base is a language model
    choice = choose_family(shapes, wanted=wanted) if texts and not of_text else Choice(None, 0)
    places = {text: choice.lookup(text) for text in texts}
    placed = bool(texts) and all(found is not None for found in places.values())
    own_base = None if placed else base
    loaded = peft.interpret(opened.config, tensors, own_base, where=where, card=opened.card, moe_layout=moe_layout)
    beside = "a folder with" if path.is_dir() else "a file in PEFT's names beside"
    reasons = [f"{beside} {peft.CONFIG_FILE}"]
    if not placed:
        used: dict[str, list[str]] = defaultdict(list)
        for key in sorted(tensors):
            used[(split_key(key) or (key, ""))[0].removeprefix("base_model.model.")].append(key)
        loaded.adapter.card.kind = loaded.adapter.card.kind or ("image" if is_image(texts) else "")
        return Reading(loaded.adapter, "peft", [*reasons, *choice.reasons], None, dict(used), notes=loaded.notes)
    adapter = loaded.adapter
    placer = Placer(choice.family, outline(base, choice.family))
    leaves = leaves_of(adapter)
    own = {name: [k for k in tensors if k.startswith(f"base_model.model.{name}.")] for name in leaves}
    problems = []
    for name, leaf in leaves.items():
        found = choice.lookup(name)
        assert found is not None  # every module was covered
        problems += placer.place(name, leaf, found, own[name])
    problems += placer.misfits()
    adapter.card.kind = adapter.card.kind or "image"
    out = replace(placer.adapter(), card=adapter.card, rslora=adapter.rslora, dropout=adapter.dropout)
    if problems:
        raise _refusal(problems, where)
    family = choice.family.name if choice.family else None
    return Reading(out, "peft", [*reasons, *choice.reasons], family, placer.used, notes=loaded.notes)


def _refusal(problems: list[str], where: str, some: bool = True) -> AdapterError:
    """One error with all of it. `some`: there is a rest to go on with."""
    if not problems:
        return AdapterError("no tensor of the file is an adapter's", where=where)
    partial = "`veneer adapter convert --allow-partial` (allow_partial=True) goes on with the rest and lists the others"
    return AdapterError(
        f"the adapter cannot be read whole ({len(problems)} problem(s)):\n" + "\n".join(f"    {p}" for p in problems),
        where=where,
        fix=partial if some else None,
    )


def read_state(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    where: str = "",
    allow_partial: bool = False,
    base: peft.Base = None,
    family: str | None = None,
) -> Reading:
    """The adapter that tensors by name and metadata are, of any layout but a PEFT folder and GGUF. Raises as `read`."""
    fmt, reasons = format_of(tensors, metadata)
    tensors, notes = widened(tensors)
    if unreal := sorted(key for key, t in tensors.items() if t.is_complex()):
        raise AdapterError(f"{len(unreal)} tensors hold complex numbers, {unreal[0]} among them", where=where)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    unused: list[str] = []
    problems: list[str] = []
    words = list_words(tensors, metadata) if is_list(tensors) else {}
    for key in sorted(tensors):
        parts = split_key(key)
        if parts is not None and parts[1] in groups[parts[0]]:
            problems.append(f"{key}: the same as {groups[parts[0]][parts[1]]}")
        elif parts is not None:
            groups[parts[0]][parts[1]] = key
        elif key not in words:
            unused.append(key)
    if any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in tensors):
        raise AdapterError(
            "torchtune's own checkpoint of an adapter: it does not hold alpha, and its query and key rows are in "
            "another order, by the base's heads",
            where=where,
            fix="give the PEFT folder that torchtune wrote beside it: adapter_config.json, adapter_model.safetensors",
        )
    if tensors and not words and all(suffix in ("weight", "scale") for own in groups.values() for suffix in own):
        raise AdapterError(
            f"none of the {len(tensors):,} tensors is an adapter's: "
            + ("whole weights, a checkpoint or a part of one" if groups else "no layout known here"),
            where=where,
            fix="give the adapter's file; its tensors are called …lora_A.weight, …lora_up.weight, …lokr_w1 or the like",
        )
    numbered = list_modules(tensors, metadata, where=where) if is_list(tensors) else {}
    places: dict[str, tuple[Place, ...] | None]
    shapes = {text: _shape(tensors, own) for text, own in groups.items()}
    if numbered:
        choice = choose_family({numbered.get(t, t): shape for t, shape in shapes.items()}, family_of(metadata), family)
        places = {text: (Place(numbered[text]),) if text in numbered else None for text in groups}
    else:
        choice = choose_family(shapes, family_of(metadata), family)
        places = {text: choice.lookup(text) for text in groups}
        if choice.family is None and not choice.near and fmt in ("peft", "diffusers"):
            places = {text: (Place(text.removeprefix("base_model.model.")),) for text in groups}
            notes.append("no adapter_config.json: alpha is taken for the rank, as nothing says another")
    placer = Placer(choice.family, outline(base, choice.family))
    unknown = {text for text, found in places.items() if found is None}
    unused += [key for text in sorted(unknown) for key in groups[text].values()]
    problems += [_unknown(key, tensors[key], choice) for key in sorted(unused)]
    configs = _configs(metadata, problems)
    known = {text: {s: tensors[k] for s, k in own.items()} for text, own in groups.items() if text not in unknown}
    blocks = alphas_of_blocks(known, places, metadata, notes)
    unpaired: list[str] = []
    for text, suffixes in known.items():
        found, keys = places[text], sorted(groups[text].values())
        assert found is not None
        try:
            alpha, rslora = _settings(configs, found[0].module, suffixes, blocks.get(text))
            leaf = read_leaf(suffixes, alpha=alpha, rslora=rslora, where=text)
            if base is None and not configs and (swapped := _swapped(leaf, metadata)):
                raise AdapterError(swapped)
            wrong = placer.place(text, leaf, found, keys, blocks=text in blocks)
        except AdapterError as error:
            wrong = [f"{text}: {error.what}"]
        if wrong:
            unpaired += keys
            problems += wrong
    if misfits := placer.misfits():
        raise _refusal(misfits, where)
    if problems and not allow_partial:
        raise _refusal(problems, where, some=bool(placer.used or words))
    adapter = replace(placer.adapter(), card=card_of(metadata))
    if words:
        adapter = replace(adapter, new_tokens={TOKEN_EMBEDDING: words})
        placer.used[TOKEN_EMBEDDING] = sorted(words)
    if not placer.used:
        raise _refusal(problems, where, some=False)
    _fill_card(adapter, text=choice.family is None and not is_image(groups))
    reasons = [*reasons, *choice.reasons]
    name = choice.family.name if choice.family else None
    notes += problems
    return Reading(adapter, fmt, reasons, name, placer.used, sorted(unused), unpaired, notes, dict(metadata))


def _swapped(leaf: Leaf, metadata: Mapping[str, str]) -> str | None:
    """What is wrong with a pair of more ranks than its weight has rows and columns, both the same: that is what A and B
    that have changed places look like. Where the file names its rank, or is ours, it is taken at its word."""
    pair = leaf.pair
    if pair is None or pair.kind != "linear" or "veneer.card" in metadata:
        return None
    (rank, into), out = pair.A.shape, pair.B.shape[0]
    if into != out or rank <= out or metadata.get("ss_network_dim") == str(rank):
        return None
    return (
        f"A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}: rank {rank} on a weight of {out} × {into}: A and B have "
        "changed places, or the file does not say its rank (ss_network_dim)"
    )


def _fill_card(adapter: Adapter, *, text: bool) -> None:
    """What the tensors say of themselves goes before what the metadata claims."""
    ranks = {pair.rank for pair in adapter.pairs.values()}
    if adapter.card.rank not in ranks:
        adapter.card.rank = ranks.pop() if len(ranks) == 1 else 0
    if text:
        adapter.card.kind = "text"


def _unknown(key: str, tensor: Tensor, choice: Choice) -> str:
    parts, family = split_key(key), choice.family
    hint = near(family, parts[0]) if parts else None
    if parts is None:
        return f"{key} {tuple(tensor.shape)}: its ending is no adapter's"
    if choice.near:
        return (
            f"{key} {tuple(tensor.shape)}: unknown family; {', '.join(choice.near)} are near, and differ in this name"
        )
    label = family.label if family else "any family known here"
    return f"{key} {tuple(tensor.shape)}: no module of {label}" + (f"; nearest: {hint}" if hint else "")


def _shape(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> tuple[int, int] | None:
    """(out, in) of a module's weight, from the factors of a pair, a LoHa or a LoKr; None where it cannot be told."""
    own = {suffix: tensors[key] for suffix, key in suffixes.items() if tensors[key].ndim >= 2}
    for suffix, down in own.items():
        if re.fullmatch(r".*down\.weight|lora_A(\..*)?\.weight|down", suffix):
            up = own.get(suffix.replace("down", "up").replace("lora_A", "lora_B"))
            return None if up is None else (up.shape[0], down.shape[1])
    if {"hada_w1_a", "hada_w1_b"} <= set(own) and "hada_t1" not in own:
        return own["hada_w1_a"].shape[0], own["hada_w1_b"].shape[1]
    factors = []
    for n in "12":
        a, b = own.get(f"lokr_w{n}", own.get(f"lokr_w{n}_a")), own.get(f"lokr_w{n}", own.get(f"lokr_w{n}_b"))
        if a is None or b is None or "lokr_t2" in own:
            return None
        factors.append((a.shape[0], b.shape[1]))
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]


def _configs(metadata: Mapping[str, str], problems: list[str]) -> dict[str, cfg.Config]:
    """diffusers' lora_adapter_metadata: a PEFT configuration for each component."""
    out = {}
    for component, raw in unpack_configs(metadata).items():
        given: dict[str, Any] = {"peft_type": "LORA", "target_modules": cfg.ALL_LINEAR, **raw}
        config, wrong = cfg.parse({k: v for k, v in given.items() if v is not None or k != "target_modules"})
        problems += [f"lora_adapter_metadata, {component}: {w}" for w in wrong]
        out[component] = config
    return out


def _settings(
    configs: Mapping[str, cfg.Config], module: str, suffixes: Mapping[str, Tensor], block: float | None
) -> tuple[float | None, bool]:
    """(alpha, rslora) of a module that its own tensors do not say. AdapterError where the two contradict."""
    component, _, name = module.partition(".")
    config = configs.get(component)
    if block is not None or config is None:
        return block, False
    alpha = cfg.alpha_of_module(config, name)
    if (stored := suffixes.get("alpha")) is not None and stored.numel() != 1:
        raise AdapterError(f"alpha {tuple(stored.shape)}: one number is expected")
    if stored is not None and float(stored) != alpha:
        raise AdapterError(f"alpha is {float(stored):g} in the tensors and {alpha:g} in lora_adapter_metadata")
    rank, source = cfg.rank_of_module(config, name)
    A = next((t for s, t in suffixes.items() if s.startswith("lora_A") or s.endswith("down.weight")), None)
    if A is not None and A.shape[:1] != (rank,):
        raise AdapterError(f"{source} of lora_adapter_metadata says rank {rank}, A is {tuple(A.shape)}")
    if config.dora and not any(s.startswith(("lora_magnitude", "dora_scale")) for s in suffixes):
        raise AdapterError("use_dora is set in lora_adapter_metadata, and there is no magnitude")
    return alpha, config.rslora
