"""Read an adapter of any layout under canonical names, accounting for every tensor.

    keys --split_key--> module text, suffix    texts --names--> family, targets    tensors --read_module--> changes
    changes --rows and halves of the targets--> pairs, deltas and full tensors under canonical names

No tensor is dropped silently: unused, unpaired and duplicate tensors cause an error that lists all of them,
or, with `allow_partial`, are returned as lists. This module works on files and names, and on the shapes of a
base if one is given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError, bullets, counted
from veneer.formats import peft
from veneer.formats import peft_config as cfg
from veneer.formats.folder import CONFIG_FILE, CONFIG_KEY, tensor_file
from veneer.formats.fused import split, swap_halves
from veneer.formats.keys import check_one_adapter, detect_format, split_key
from veneer.formats.metadata import card_from_metadata, family_in_metadata, json_value, unpack_configs
from veneer.formats.module_tensors import ModuleChanges, changes_by_module, fitted, read_module, widened
from veneer.formats.names import FamilyChoice, choose_family, closest_name, has_image_names
from veneer.formats.reading import Reading
from veneer.formats.structure import Structure, structure_of
from veneer.formats.tensors import read_adapter_tensors
from veneer.formats.topology import DENOISERS, Family, ModuleTarget, families

if TYPE_CHECKING:
    from torch import Tensor

_SCALED = re.compile(r"lora[_.]|hada_|lokr_|down\.|up\.")
"""Pattern of the suffixes of tensors that alpha scales."""
_POINTWISE = re.compile(r".*\.(proj_in|proj_out|conv_shortcut)")


def _canonical_structure(base: Any, family: Family | None) -> Structure:
    """Return the structure of a base under canonical names.

    If the base is a denoiser without a pipeline, its names get the component as a prefix."""
    structure = structure_of(base) if base is not None else Structure({})
    if family is None or any(name.partition(".")[0] in family.components for name in structure.kinds):
        return structure
    kinds = {f"{family.denoiser}.{name}": kind for name, kind in structure.kinds.items()}
    shapes = {f"{family.denoiser}.{name}": shape for name, shape in structure.shapes.items()}
    return Structure(kinds, shapes)


@dataclass
class _ChangeCollector:
    """Collector of changes by canonical module.

    `used`: canonical module -> keys of the file."""

    family: Family | None
    base: Structure
    pairs: dict[str, Pair] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        return Adapter(self.pairs, self.modules, deltas=self.deltas)

    def misfits(self) -> list[str]:
        """Return a message for each change that does not fit the base; [] without a base."""
        if not self.base.kinds:
            return []
        names = {name for name in self.used if name not in self.base.kinds}
        missing = [f"{name}: no such module in the base" for name in sorted(names)]
        return missing or self.base.problems(self.adapter())

    def add(
        self, text: str, changes: ModuleChanges, targets: Sequence[ModuleTarget], keys: list[str], blocks: bool = False
    ) -> list[str]:
        """Add a module's changes to its targets, and return a list of problems.

        If there is any problem, nothing is added."""
        problems = [
            f"{text}: changes {p.module}, as does {self.owner[p.module]}" for p in targets if p.module in self.owner
        ]
        try:
            parts = _parts(changes, targets, blocks)
            parts = [self._fitted(part, target.module) for part, target in zip(parts, targets, strict=True)]
        except AdapterError as error:
            problems.append(f"{text}: {error.what}" + (f" ({error.where})" if error.where else ""))
        if problems:
            return problems
        for part, target in zip(parts, targets, strict=True):
            name = target.module
            self.owner[name], self.used[name] = text, keys
            if part.pair is not None:
                self.pairs[name] = part.pair
            self.deltas.update({f"{name}.{parameter}": delta for parameter, delta in part.deltas.items()})
            if part.full:
                self.modules[name] = part.full
        return []

    def _fitted(self, changes: ModuleChanges, name: str) -> ModuleChanges:
        """Return the changes reshaped to the base's weight.

        Without a base, the module's kind determines the shape."""
        kind = self.family.modules.get(name) if self.family else None
        pair = changes.pair
        if kind == "norm" and pair is not None:
            raise AdapterError(f"a pair on {name}, which is a norm")
        if kind in ("linear", "conv", "embedding") and "weight" in changes.full and changes.full["weight"].ndim == 1:
            raise AdapterError(f"a vector as the full replacement weight of {name}, a module of kind {kind}")
        if kind == "embedding" and pair is not None and pair.kind == "linear":
            # A file stores ΔW = B·A of a weight (rows, dim); an embedding's pair is the transpose.
            changes = replace(changes, pair=replace(pair, A=pair.B.t(), B=pair.A.t(), kind="embedding"))
        if (shape := self.base.shapes.get(f"{name}.weight")) is not None and len(shape) >= 2:
            return fitted(changes, shape, where=name)
        if pair is None or kind not in ("linear", "conv"):
            return changes
        out, into = pair.B.shape[0], pair.A.shape[1]
        if kind == "linear" and pair.kind == "conv":
            return fitted(changes, (out, into), where=name)
        if kind == "conv" and pair.kind == "linear" and self.family is not None and _POINTWISE.fullmatch(name):
            return fitted(changes, (out, into, 1, 1), where=name)
        return changes


def _parts(changes: ModuleChanges, targets: Sequence[ModuleTarget], blocks: bool) -> list[ModuleChanges]:
    """Split the changes into one part for each target."""
    if len(targets) == 1 and targets[0].part is None and not targets[0].swap:
        return [changes]
    out = [ModuleChanges() for _ in targets]
    rows = [target.part or (0, 1, 1) for target in targets]
    if changes.pair is not None:
        pairs = split(changes.pair, rows)
        for i, (part, pair) in enumerate(zip(out, pairs, strict=True)):
            part.pair = _block(pair, i, len(targets)) if blocks else pair
    for parameter, delta in changes.deltas.items():
        for part, part_delta in zip(out, split(delta, rows), strict=True):
            part.deltas[parameter] = part_delta
    for parameter, tensor in changes.full.items():
        for part, (begin, end, total) in zip(out, rows, strict=True):
            if len(tensor) % total:
                raise AdapterError(f"{len(tensor)} rows of {parameter} cannot be cut into {total} equal units")
            unit = len(tensor) // total
            part.full[parameter] = tensor[begin * unit : end * unit]
    return [_halves_swapped(part) if target.swap else part for part, target in zip(out, targets, strict=True)]


def _halves_swapped(changes: ModuleChanges) -> ModuleChanges:
    if any(len(t) % 2 for t in changes.full.values()):
        raise AdapterError("an odd number of rows cannot be split into halves")
    return ModuleChanges(
        changes.pair and swap_halves(changes.pair),
        {name: swap_halves(delta) for name, delta in changes.deltas.items()},
        {name: t.roll(len(t) // 2, 0) for name, t in changes.full.items()},
    )


def _block(pair: Pair, i: int, n: int) -> Pair:
    """Return A and B of part i of a block-diagonal pair, as views.

    The scale already refers to one part's rank."""
    rank = pair.rank // n
    block_rows = slice(i * rank, (i + 1) * rank)
    return replace(pair, A=pair.A[block_rows], B=pair.B[:, block_rows])


def _split_qkv_alphas(
    groups: Mapping[str, Mapping[str, Tensor]],
    targets: Mapping[str, Sequence[ModuleTarget] | None],
    metadata: Mapping[str, str],
    notes: list[str],
) -> dict[str, float]:
    """Return {module text: alpha relative to the stored rank} for a `split_qkv` file.

    Contains only fused modules."""
    split_setting = _split_setting(metadata)
    if split_setting is False:  # a file written by veneer, where alpha refers to the stored rank
        return {}
    plain = {
        (float(tensors["alpha"]), tensors["lora_down.weight"].shape[0])
        for text, tensors in groups.items()
        if {"alpha", "lora_down.weight"} <= set(tensors) and len(targets[text] or ()) == 1
        if tensors["alpha"].numel() == 1 and tensors["lora_down.weight"].ndim  # read_module reports other shapes
    }
    out: dict[str, float] = {}
    unclear: list[str] = []
    for text, tensors in groups.items():
        n = len(targets[text] or ())
        down, up, alpha = (tensors.get(s) for s in ("lora_down.weight", "lora_up.weight", "alpha"))
        if (
            n < 2
            or down is None
            or up is None
            or alpha is None
            or alpha.numel() != 1
            or not down.ndim
            or not _is_block_diagonal(up, [p.part for p in targets[text] or ()])
        ):
            continue
        value, rank = float(alpha), down.shape[0]
        network_alpha = _as_float(metadata.get("ss_network_alpha"))
        is_whole = value == rank or (value / n, rank // n) in plain  # alpha already refers to the stored rank
        if (value, rank // n) in plain or (
            split_setting and (network_alpha == value or (network_alpha is None and not is_whole))
        ):
            out[text] = value * n
        elif not split_setting and value != rank and not plain:
            unclear.append(text)
    if out:
        notes.append(f"{len(out)} fused modules hold split_qkv parts; their alpha is divided by the rank of one part")
    if unclear:
        notes.append(
            f"{len(unclear)} fused modules are block-diagonal; alpha may be for one part only, but it is used "
            f"for all: {', '.join(unclear[:5])}"
        )
    return out


def _split_setting(metadata: Mapping[str, str]) -> bool | None:
    """Return the split_qkv setting in ss_network_args, or None if missing."""
    arguments = json_value(metadata, "ss_network_args")
    setting = str(arguments.get("split_qkv", "")).lower() if isinstance(arguments, dict) else ""
    return {"true": True, "1": True, "false": False, "0": False}.get(setting)


def _as_float(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _is_block_diagonal(up: Tensor, parts: Sequence[tuple[int, int, int] | None]) -> bool:
    """Return whether B is block-diagonal: each part's rows use only the part's own ranks.

    False if all entries are zero."""
    rank, n = up.shape[1] if up.ndim == 2 else 0, len(parts)
    if rank == 0 or rank % n or any(p is None or up.shape[0] % p[2] for p in parts):
        return False
    rank //= n
    for i, part in enumerate(parts):
        assert part is not None
        unit = up.shape[0] // part[2]
        rows = up[part[0] * unit : part[1] * unit]
        if rows[:, : i * rank].any() or rows[:, (i + 1) * rank :].any():
            return False
    return bool(up.any())


class ReadOptions(TypedDict, total=False):
    """Options of `read`, for functions that pass them on to `read`."""

    from_pickle: bool
    alpha: float | None
    assume_scale: bool
    as_arrays: bool


def read(
    path: str | Path,
    *,
    allow_partial: bool = False,
    from_pickle: bool = False,
    base: peft.BaseLike = None,
    family: str | None = None,
    alpha: float | None = None,
    assume_scale: bool = False,
    as_arrays: bool = False,
) -> Reading:
    """Read the adapter in a file or folder of any tool.

    allow_partial: list tensors that cannot be read in the result instead of raising.
    from_pickle: allow pickles.
    base: a model, its structure, or module names. The adapter is checked against the base, and LoHa and LoKr
        that are stored flat get the shapes of the base's weights.
    family: the base's family, used if the names match several families.
    alpha: the alpha used in training, for modules whose alpha the file does not state.
    assume_scale: if neither the file nor `alpha` states the scale, use the rank as alpha and list the modules
        in `Reading.assumed_scale`. Only for reports; do not apply such an adapter.
    as_arrays: read safetensors files without torch, as formats.arrays.Array. Only for reports.

    A file with PEFT's names is read with the adapter_config.json next to it, if there is one.

    Raises one AdapterError listing every tensor that is unused, unpaired, not understood, or for the same
    module as another tensor; AdapterError for a scale that is neither in the file nor given; UnsafeFileError
    for pickles and invalid headers."""
    location = Path(path)
    opened: peft.PeftFolder | None = None
    path = location if location.is_dir() and (location / CONFIG_FILE).is_file() else tensor_file(location, from_pickle)
    if path.is_dir():
        opened = peft.open_folder(path, from_pickle=from_pickle, as_arrays=as_arrays)
    elif path.suffix.lower() == ".gguf":
        return _from_gguf(path, base, alpha)
    elif (path.parent / CONFIG_FILE).is_file():
        opened = peft.open_folder(path.parent, file=path, from_pickle=from_pickle, as_arrays=as_arrays)
        if opened.format == "peft" and not any(key.startswith("base_model.model.") for key in opened.tensors):
            opened = None
    if opened is None:
        tensors, metadata = read_adapter_tensors(path, from_pickle=from_pickle, as_arrays=as_arrays)
        if isinstance(config := json_value(metadata, CONFIG_KEY), dict):
            opened = peft.PeftFolder(config, dict(tensors), None, in_file=True)
    if opened is not None:
        return _from_peft(opened, path, base, family, alpha)
    check_one_adapter(tensors, where=str(path))
    reading = read_state_dict(
        tensors, metadata, where=str(path), allow_partial=allow_partial, base=base, family=family, alpha=alpha
    )
    if reading.assumed_scale and not assume_scale:
        raise scale_error(reading, location)
    return reading


def scale_error(reading: Reading, path: Path) -> AdapterError:
    """Return the error for an adapter whose file does not state its scale."""
    count = counted(len(reading.assumed_scale), "module")
    return AdapterError(
        f"the file does not state the scale (alpha) of {count}, and no {CONFIG_FILE} does",
        where=str(path),
        fix=f"put the adapter's {CONFIG_FILE} next to the file; or convert the file with the alpha used in training: "
        "veneer adapter convert FILE --alpha N --to peft -o FOLDER",
    )


def _refuse_alpha(alpha: float | None, where: str) -> None:
    """Raise AdapterError if alpha is given although the files contain an alpha."""
    if alpha is not None:
        raise AdapterError(
            f"alpha {alpha:g} is given, but the adapter's files contain an alpha", where=where, fix="leave out --alpha"
        )


def _from_gguf(path: Path, base: peft.BaseLike, alpha: float | None) -> Reading:
    from veneer.formats.gguf import read_gguf

    _refuse_alpha(alpha, str(path))
    adapter_file = read_gguf(path, head_dim=_head_dim(base))
    metadata = {key: str(value) for key, value in adapter_file.fields.items() if isinstance(value, str | int | float)}
    reasons = [f"a GGUF file of type adapter for {adapter_file.architecture}"]
    notes = [f"{name}: a norm, ignored as in llama.cpp" for name in adapter_file.unused]
    used: dict[str, list[str]] = {name: [] for name in adapter_file.adapter.pairs}
    return Reading(adapter_file.adapter, "gguf", reasons, None, used, adapter_file.unused, [], notes, metadata)


def _head_dim(base: peft.BaseLike) -> int | None:
    """Return a loaded base's head size, or None if unknown or if the layers differ."""
    sizes: set[int] = set()
    for layer in getattr(getattr(base, "config", None), "per_layer_config", ()):
        heads = getattr(layer, "num_attention_heads", None)
        sizes.add(int(getattr(layer, "head_dim", None) or (heads and layer.hidden_size // heads) or 0))
    return sizes.pop() or None if len(sizes) == 1 else None


def _from_peft(
    opened: peft.PeftFolder, path: Path, base: peft.BaseLike, requested: str | None, alpha: float | None
) -> Reading:
    """Return the adapter in a PEFT folder, read by PEFT's rules.

    The module names are canonical if they are those of an image family's denoiser."""
    where = str(path)
    _refuse_alpha(alpha, where)
    tensors = opened.tensors
    check_one_adapter(tensors, where=where)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for key in sorted(tensors):
        if parts := split_key(key):
            texts[parts[0]][parts[1]] = key
    shapes = {text: _shape(tensors, suffixes) for text, suffixes in texts.items()}
    of_text = requested is not None and requested not in families()  # the base is a language model
    choice = choose_family(shapes, target_family=requested) if texts and not of_text else FamilyChoice(None, 0)
    targets = {text: choice.lookup(text) for text in texts}
    placed = bool(texts) and all(target is not None for target in targets.values())
    own_base = None if placed else base
    loaded = peft.interpret(opened.config, tensors, own_base, where=where, card=opened.card)
    source = "a folder with" if path.is_dir() else "a file with PEFT's names next to"
    source = "a file written by veneer, which contains" if opened.in_file else source
    reasons = [f"{source} {CONFIG_FILE}", *([opened.reason] if opened.reason else [])]
    if not placed:
        used: dict[str, list[str]] = defaultdict(list)
        for key in sorted(tensors):
            used[(split_key(key) or (key, ""))[0].removeprefix("base_model.model.")].append(key)
        loaded.adapter.card.kind = loaded.adapter.card.kind or ("image" if has_image_names(texts) else "")
        return Reading(loaded.adapter, opened.format, [*reasons, *choice.reasons], None, dict(used), notes=loaded.notes)
    adapter = loaded.adapter
    collector = _ChangeCollector(choice.family, _canonical_structure(base, choice.family))
    by_module = changes_by_module(adapter)
    suffixes = {name: [k for k in tensors if k.startswith(f"base_model.model.{name}.")] for name in by_module}
    problems = []
    for name, changes in by_module.items():
        target = choice.lookup(name)
        assert target is not None  # every module is in the family's tables
        problems += collector.add(name, changes, target, suffixes[name])
    problems += collector.misfits()
    adapter.card.kind = adapter.card.kind or "image"
    out = replace(collector.adapter(), card=adapter.card, rslora=adapter.rslora, dropout=adapter.dropout)
    if problems:
        raise _refusal(problems, where)
    family = choice.family.name if choice.family else None
    return Reading(out, "peft", [*reasons, *choice.reasons], family, collector.used, notes=loaded.notes)


def _refusal(problems: list[str], where: str, some: bool = True) -> AdapterError:
    """Return one error that lists all problems.

    some: whether to mention that a partial read is possible."""
    if not problems:
        return AdapterError("the file contains no adapter tensors", where=where)
    partial = "`veneer adapter convert --allow-partial` (allow_partial=True) converts the rest and lists the problems"
    problem = f"the adapter cannot be read completely ({len(problems)} problem(s)):\n{bullets(problems, None)}"
    return AdapterError(problem, where=where, fix=partial if some else None)


def read_state_dict(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    where: str = "",
    allow_partial: bool = False,
    base: peft.BaseLike = None,
    family: str | None = None,
    alpha: float | None = None,
) -> Reading:
    """Return an adapter read from named tensors and metadata.

    Supports every layout except PEFT folders and GGUF.

    alpha: used for modules whose alpha the file does not state.

    Raises the errors of `read`."""
    fmt, reasons = detect_format(tensors, metadata)
    tensors, notes = widened(tensors)
    if unreal := sorted(key for key, t in tensors.items() if t.is_complex()):
        raise AdapterError(f"{len(unreal)} tensors hold complex numbers, {unreal[0]} among them", where=where)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    unused: list[str] = []
    problems: list[str] = []
    for key in sorted(tensors):
        parts = split_key(key)
        if parts is not None and parts[1] in groups[parts[0]]:
            problems.append(f"{key}: a duplicate of {groups[parts[0]][parts[1]]}")
        elif parts is not None:
            groups[parts[0]][parts[1]] = key
        else:
            unused.append(key)
    if any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in tensors):
        raise AdapterError(
            "torchtune's own checkpoint of an adapter: it does not hold alpha, and its query and key rows are in "
            "a different order, which depends on the base's heads",
            where=where,
            fix="give the PEFT folder that torchtune wrote next to it: adapter_config.json, adapter_model.safetensors",
        )
    if tensors and all(suffix in ("weight", "scale") for by_suffix in groups.values() for suffix in by_suffix):
        problem = f"none of the {len(tensors):,} tensors is an adapter tensor: " + (
            "full weights: a checkpoint or a part of one" if groups else "unknown layout"
        )
        fix = "pass the adapter's file; its tensors have names such as …lora_A.weight, …lora_up.weight, …lokr_w1"
        raise AdapterError(problem, where=where, fix=fix)
    shapes = {text: _shape(tensors, by_suffix) for text, by_suffix in groups.items()}
    choice = choose_family(shapes, family_in_metadata(metadata), family)
    targets = {text: choice.lookup(text) for text in groups}
    if fmt in ("peft", "diffusers") and _is_unknown_model(targets):
        choice = _without_family(choice, targets)
    if choice.family is None and not choice.fitting and fmt in ("peft", "diffusers"):
        targets = {text: (ModuleTarget(text.removeprefix("base_model.model.")),) for text in groups}
    collector = _ChangeCollector(choice.family, _canonical_structure(base, choice.family))
    unknown = {text for text, target in targets.items() if target is None}
    unused += [key for text in sorted(unknown) for key in groups[text].values()]
    problems += [_unknown(key, tensors[key], choice) for key in sorted(unused)]
    configs = _configs(metadata, problems)
    known_groups = {
        text: {s: tensors[k] for s, k in by_suffix.items()} for text, by_suffix in groups.items() if text not in unknown
    }
    blocks = _split_qkv_alphas(known_groups, targets, metadata, notes)
    unpaired: list[str] = []
    unstated: list[str] = []
    for text, suffixes in known_groups.items():
        target, keys = targets[text], sorted(groups[text].values())
        assert target is not None
        try:
            own_alpha, rslora = _settings(configs, target[0].module, suffixes, blocks.get(text))
            if own_alpha is None and "alpha" not in suffixes and any(_SCALED.match(s) for s in suffixes):
                own_alpha = alpha
                unstated.append(text)
            changes = read_module(suffixes, alpha=own_alpha, rslora=rslora, where=text)
            wrong = collector.add(text, changes, target, keys, blocks=text in blocks)
        except AdapterError as error:
            wrong = [f"{text}: {error.what}"]
        if wrong:
            unpaired += keys
            problems += wrong
    if misfits := collector.misfits():
        raise _refusal(misfits, where)
    if problems and not allow_partial:
        raise _refusal(problems, where, some=bool(collector.used))
    adapter = replace(collector.adapter(), card=card_from_metadata(metadata))
    if not collector.used:
        raise _refusal(problems, where, some=False)
    _fill_card(adapter, text=choice.family is None and not has_image_names(groups))
    reasons = [*reasons, *choice.reasons]
    name = choice.family.name if choice.family else None
    if not unstated:
        _refuse_alpha(alpha, where)
    image = choice.family is not None or bool(choice.fitting) or has_image_names(groups)
    peft_names = any(text.startswith(peft.PREFIX) for text in groups) or (fmt == "diffusers" and not image)
    assumed = unstated if peft_names and alpha is None else []
    if assumed:
        notes.append(
            f"the file does not state the scale of {counted(len(assumed), 'module')}: the rank is used as alpha"
        )
    notes += problems
    return Reading(
        adapter, fmt, reasons, name, collector.used, sorted(unused), unpaired, notes, dict(metadata), assumed
    )


def _is_unknown_model(targets: Mapping[str, Sequence[ModuleTarget] | None]) -> bool:
    """Return whether the file is for an unknown model with diffusers' class names.

    True if some modules have the names of diffusers' classes, but the best family does not have all modules
    of the file.
    """
    names = {text: text.removeprefix("base_model.model.") for text in targets}
    dotted = all(name.partition(".")[0] in DENOISERS for name in names.values())
    unchanged = any(
        target is not None and tuple(target) == (ModuleTarget(names[text]),) for text, target in targets.items()
    )
    return dotted and unchanged and None in targets.values()


def _without_family(choice: FamilyChoice, targets: Mapping[str, Sequence[ModuleTarget] | None]) -> FamilyChoice:
    lacking = sorted(text for text, target in targets.items() if target is None)
    label = choice.family.label if choice.family else " or ".join(choice.nearest) or "any known family"
    message = f"{len(lacking)} module names are unknown in {label} ({lacking[0]}): the file's own names are used"
    return FamilyChoice(None, choice.covered, (*choice.reasons, message))


def _fill_card(adapter: Adapter, *, text: bool) -> None:
    """Set the card's rank and kind from the tensors, which take precedence over the metadata."""
    ranks = {pair.rank for pair in adapter.pairs.values()}
    if adapter.card.rank not in ranks:
        adapter.card.rank = ranks.pop() if len(ranks) == 1 else 0
    if text:
        adapter.card.kind = "text"


def _unknown(key: str, tensor: Tensor, choice: FamilyChoice) -> str:
    parts, family = split_key(key), choice.family
    hint = closest_name(family, parts[0]) if parts else None
    if parts is None:
        return f"{key} {tuple(tensor.shape)}: the name does not have the suffix of an adapter tensor"
    if choice.nearest:
        differ = "differ in this name" if choice.fitting else "have other names, other widths or fewer blocks"
        return f"{key} {tuple(tensor.shape)}: unknown family; near: {', '.join(choice.nearest)}, which {differ}"
    label = family.label if family else "any known family"
    return f"{key} {tuple(tensor.shape)}: no module of {label}" + (f"; nearest: {hint}" if hint else "")


def _shape(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> tuple[int, int] | None:
    """Return a weight's (out, in), derived from a pair, LoHa or LoKr; None if unknown."""
    matrices = {suffix: tensors[key] for suffix, key in suffixes.items() if tensors[key].ndim >= 2}
    for suffix, down in matrices.items():
        if re.fullmatch(r".*down\.weight|lora_A(\..*)?\.weight", suffix):
            up = matrices.get(suffix.replace("down", "up").replace("lora_A", "lora_B"))
            return None if up is None else (up.shape[0], down.shape[1])
    if {"hada_w1_a", "hada_w1_b"} <= set(matrices) and "hada_t1" not in matrices:
        return matrices["hada_w1_a"].shape[0], matrices["hada_w1_b"].shape[1]
    sizes = []
    for n in "12":
        a, b = (
            matrices.get(f"lokr_w{n}", matrices.get(f"lokr_w{n}_a")),
            matrices.get(f"lokr_w{n}", matrices.get(f"lokr_w{n}_b")),
        )
        if a is None or b is None or "lokr_t2" in matrices:
            return None
        sizes.append((a.shape[0], b.shape[1]))
    return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]


def _configs(metadata: Mapping[str, str], problems: list[str]) -> dict[str, cfg.PeftConfig]:
    """Return PEFT's configuration per component, from diffusers' lora_adapter_metadata."""
    out = {}
    for component, raw in unpack_configs(metadata).items():
        values: dict[str, Any] = {"peft_type": "LORA", "target_modules": cfg.ALL_LINEAR, **raw}
        config, wrong = cfg.parse_config({k: v for k, v in values.items() if v is not None or k != "target_modules"})
        problems += [f"lora_adapter_metadata, {component}: {w}" for w in wrong]
        out[component] = config
    return out


def _settings(
    configs: Mapping[str, cfg.PeftConfig], module: str, suffixes: Mapping[str, Tensor], block: float | None
) -> tuple[float | None, bool]:
    """Return (alpha, rslora) of a module from the metadata.

    Raises AdapterError if tensors and metadata contradict each other."""
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
        raise AdapterError(f"{source} of lora_adapter_metadata says rank {rank}, but A is {tuple(A.shape)}")
    if config.dora and not any(s.startswith(("lora_magnitude", "dora_scale")) for s in suffixes):
        raise AdapterError("use_dora is set in lora_adapter_metadata, but there is no magnitude")
    return alpha, config.rslora
