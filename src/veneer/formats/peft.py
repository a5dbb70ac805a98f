r"""Read and write PEFT's adapter folders strictly.

`adapter_config.json` and `adapter_model.safetensors`:

    key = "base_model.model." + module + suffix                              the adapter's name is not in the key

| on a module       | suffix and shape                                                                                |
| linear            | .lora_A.weight (r, in)   .lora_B.weight (out, r)                                                |
| convolution       | .lora_A.weight (r, in, k…)   .lora_B.weight (out, r, 1…)                                        |
| embedding         | .lora_embedding_A (r, rows)   .lora_embedding_B (dim, r)                                        |
| DoRA, each        | .lora_magnitude_vector (out,), for a convolution (1, out, 1…)                                   |
| expert parameters | .lora_A.weight (E·r, in)   .lora_B.weight (out, r·E); A counts experts first, B ranks first.    |
|                   | If several parameters of a module have pairs, the last declared one has the plain key; each     |
|                   | earlier one has one more `.base_layer` before the suffix                                        |
| modules_to_save   | .PARAMETER: full copies                                                                         |
| token indices     | .token_adapter.trainable_tokens_delta (tokens, dim): whole rows, whose indices are in the config|
| targeted embedding| .base_layer.weight: PEFT's copy of the base's own rows, not part of the adapter                 |

    scale = alpha/r, or alpha/√r with rsLoRA;  r and alpha from rank_pattern and alpha_pattern if a key
    matches; the first KEY for which `(.*\.)?(KEY)$` matches counts

formats/peft_lycoris.py handles LOHA and LOKR folders. The numbered specification is in docs/formats/peft.md.
A folder that cannot be read with the same effect is refused; one AdapterError lists all problems of the
folder. This module works on files and names, and does not need the base's code.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from veneer.core.adapter import Adapter, Card, Pair, PairKind, TokenRows, hub_id, scale_of
from veneer.core.forms import Delta
from veneer.errors import AdapterError, bullets, nearest
from veneer.files.atomic import put_folder
from veneer.files.safetensors import encode_tensors
from veneer.formats import card as cards
from veneer.formats import moe
from veneer.formats import peft_config as cfg
from veneer.formats.card import CARD_FILE, read_card
from veneer.formats.folder import CONFIG_FILE, CONFIG_KEY, TENSOR_FILE, tensor_file
from veneer.formats.peft_config import DUMMY_TARGETS, RANK_MAJOR, PeftConfig, read_config, unsloth_marks
from veneer.formats.peft_lycoris import can_be_lycoris, is_lycoris, read_lycoris, write_lycoris
from veneer.formats.structure import Structure, structure_of
from veneer.formats.tensors import check_finite, read_adapter_tensors
from veneer.formats.translated import translated
from veneer.formats.vision_wrappers import Renaming, renaming

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")
_FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")

SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias", ".lora_embedding_A": "rows A",
    ".lora_embedding_B": "rows B", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens", ".base_layer.weight": "copy", ".base_layer.bias": "copy",
}  # fmt: skip

BaseLike: TypeAlias = "nn.Module | Structure | Iterable[str] | Callable[[], Any] | None"
"""A base as an argument: a model, its structure, its module names, or a function that returns any of
these."""


# -- a folder ---------------------------------------------------------------------------------------------------------


def read_folder(folder: str | Path, base: BaseLike = None) -> Adapter:
    """Return the adapter in a PEFT folder.

    Plain pairs can be read without a base. With a base (the model, its structure, or its module names) every
    name, kind and shape is checked, and old layouts of expert weights are recognized. Raises one AdapterError
    listing everything that is missing, unexpected, misshapen or unknown; UnsafeFileError for pickles and
    invalid headers.
    """
    return load_folder(folder, base).adapter


def load_folder(folder: str | Path, base: BaseLike = None) -> PeftAdapter:
    """Return the adapter in a PEFT folder with its configuration and notes; see `read_folder`."""
    opened = open_folder(folder)
    return interpret(opened.config, opened.tensors, base, where=str(folder), card=opened.card)


@dataclass(frozen=True)
class PeftFolder:
    """The contents of a PEFT folder, not yet interpreted.

    `format`: "mlx" or "tinker" if another tool wrote the folder (config and tensors are already translated).
    `reason`: how the format was detected. `in_file`: the configuration was in the tensor file's metadata."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: Card | None
    format: str = "peft"
    reason: str = ""
    in_file: bool = False


def open_folder(
    folder: str | Path, *, file: Path | None = None, from_pickle: bool = False, as_arrays: bool = False
) -> PeftFolder:
    """Return the configuration, the tensors and the card of a folder.

    file: the tensor file, if its name is not adapter_model.
    from_pickle: allow a pickle.
    as_arrays: see `read_adapter_tensors`.

    Raises the errors of `read_folder`."""
    folder = Path(folder)
    config = read_config(folder)
    file = file or tensor_file(folder, from_pickle)
    tensors, _ = read_adapter_tensors(file, from_pickle=from_pickle, as_arrays=as_arrays)
    card = read_card(folder).card if (folder / CARD_FILE).is_file() else None
    if (translation := translated(config, tensors)) is not None:
        return PeftFolder(translation.config, translation.tensors, card, translation.format, translation.reason)
    return PeftFolder(config, tensors, card)


# -- interpretation ----------------------------------------------------------------------------------------------------


@dataclass
class PeftAdapter:
    """An adapter as read from PEFT's layout.

    `config`: the parsed configuration. `notes`: what was ignored, and why."""

    adapter: Adapter
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def interpret(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLike = None,
    *,
    where: str | None = None,
    card: Card | None = None,
) -> PeftAdapter:
    """Return the adapter that a PEFT configuration and tensors describe.

    Raises the errors of `read_folder`."""
    if is_lycoris(config):
        return _lycoris(config, tensors, structure_of(base) if base is not None else Structure({}), where, card)
    parsed, problems = cfg.parse_config(config)
    outline = structure_of(base) if base is not None else Structure({})
    wrapper_renaming = renaming((key.removeprefix(PREFIX) for key in tensors), outline.kinds)
    visible = outline.under(wrapper_renaming.to_file, wrapper_renaming.to_base) if wrapper_renaming else outline
    reader = _Reader(parsed, visible, problems, wrapper_renaming)
    if parsed.usable:
        try:
            reader.run(tensors)
        except cfg.PatternError as error:
            problems.append(str(error))
    _refuse(problems, where)
    card = card or cfg.card_from_config(parsed)
    adapter = Adapter(reader.pairs, reader.modules, reader.token_rows, card, deltas=reader.deltas)
    adapter.rslora, adapter.dropout = parsed.rslora, parsed.dropout
    if wrapper_renaming:
        adapter = adapter.renamed(wrapper_renaming.to_base)
        reader.notes.append(wrapper_renaming.describe())
    adapter.card = cfg.with_task(adapter.card, parsed)
    if parsed.stamps:
        adapter.card.extra = {**adapter.card.extra, "adapter_config": parsed.stamps}
        reader.notes += [
            f"{key} = {str(value)[:60]}: metadata, stored unchanged" for key, value in parsed.stamps.items()
        ]
    return PeftAdapter(adapter, dict(config), reader.notes)


def _lycoris(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Structure, where: str | None, card: Card | None
) -> PeftAdapter:
    """Return the adapter of a LOHA or LOKR folder.

    With a base, each delta gets the shape of its weight, which flat factors alone do not determine."""
    adapter, parsed, remaining, problems = read_lycoris(config, tensors)
    reader = _Reader(parsed, base, problems)
    if not problems:
        reader.read_full_modules(remaining)
        adapter = replace(adapter, modules=reader.modules)
    for name, delta in adapter.deltas.items():
        shape, is_transposed = (
            base.shapes.get(name),
            name.removesuffix(".weight") in base.fan_in_fan_out,
        )  # fan_in_fan_out weights are stored as (in, out)
        if shape is not None and math.prod(shape) == math.prod(delta.shape) and not is_transposed:
            adapter.deltas[name] = replace(delta, shape=tuple(shape))
    problems += base.problems(adapter) if base.detailed and not problems else []
    _refuse(problems, where)
    return PeftAdapter(replace(adapter, card=cfg.with_task(card or adapter.card, parsed)), dict(config), reader.notes)


def _refuse(problems: list[str], where: str | None) -> None:
    if problems:
        raise AdapterError(
            f"the adapter cannot be used as it is ({len(problems)} problem(s)):\n{bullets(problems, None)}", where=where
        )


@dataclass
class _Reader:
    """Reader that sorts tensors into pairs, full copies and token rows.

    `problems` and `notes` collect messages."""

    config: cfg.PeftConfig
    base: Structure
    problems: list[str]
    renaming: Renaming | None = None
    """Renaming of the file's modules, if file and base use the names of different model classes."""
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)
    """Modules that were unpacked from 3-d expert tensors; target_modules need not contain these modules."""

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        original_keys = set(tensors)
        tensors, notes, wrong = moe.unpacked(tensors)
        self.packed = {k.removeprefix(PREFIX).rpartition(".lora_")[0] for k in set(tensors) - original_keys}
        self.notes += notes
        self.problems += wrong
        sites, remaining, tokens, copies = self._sort(tensors)
        modules: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(dict)
        for site, parts in sites.items():
            name = site.replace(".base_layer", "")
            modules[name][site.count(".base_layer")] = parts
        experts = ExpertReader(self.config, self.base, self.problems)
        for name in sorted(modules):
            depths = modules[name]
            parameters = [] if self._is_plain(name, depths) else experts.parameters(name, len(depths))
            if parameters or len(depths) > 1 or 0 not in depths:
                self.pairs |= experts.read(name, parameters, depths)
            else:
                self._pair(name, depths[0])
        experts.report_unclear()
        biases = _trained_biases(self.config, copies, remaining, self.pairs, self.problems, self.notes)
        self.problems += [f"{n}: lora_bias and a trained bias at once" for n in sorted(set(biases) & set(self.deltas))]
        self.deltas |= biases
        self.read_full_modules(remaining)
        self._tokens(tokens)
        self._copies(copies)
        self._check_targets()
        self.notes += [
            f"{key} {pattern!r} matches no module of the adapter: it has no effect"
            for key, pattern in cfg.unmatched_patterns(self.config, [self._key(name) for name in self.pairs])
        ]
        self.pairs, notes, wrong = moe.fuse(self.pairs, self.base)
        self.notes += notes
        self.problems += wrong
        self._check_base()

    def _sort(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors as (pairs by module, full copies, token rows, copies of embeddings)."""
        sites: dict[str, dict[str, Tensor]] = defaultdict(dict)
        remaining: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        if not tensors:
            self.problems.append("there are no tensors in the file")
        stray = sorted(key for key in tensors if not key.startswith(PREFIX) or key == PREFIX)
        if stray:
            first = ", ".join(f"{k} {tuple(tensors[k].shape)}" for k in stray[:5])
            self.problems.append(
                f"{len(stray)} of {len(tensors)} tensors have the wrong prefix: their names do not start with "
                f"{PREFIX!r}: {first}{', …' if len(stray) > 5 else ''}"
            )
        for key in sorted(set(tensors) - set(stray)):
            tensor, path = tensors[key], key.removeprefix(PREFIX)
            if str(tensor.dtype) not in _FLOATS:
                self.problems.append(f"{key} {tuple(tensor.shape)}: dtype {tensor.dtype} cannot hold weights")
                continue
            suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.endswith(s)), None)
            if suffix is None:
                self._sort_other(key, path, tensor, remaining)
                continue
            name, part = path.removesuffix(suffix), SUFFIXES[suffix]
            if part in ("tokens", "copy"):
                (tokens if part == "tokens" else copies)[name if part == "tokens" else path] = tensor
            elif part in sites[name]:
                self.problems.append(f"{key}: a second magnitude for {name}")
            else:
                sites[name][part] = tensor
        return sites, remaining, tokens, copies

    def _sort_other(self, key: str, path: str, tensor: Tensor, remaining: dict[str, Tensor]) -> None:
        shape = tuple(tensor.shape)
        if path.endswith(".lora_velora_embed"):
            if not any(note.startswith("VeLoRA") for note in self.notes):
                self.notes.append("VeLoRA's lora_velora_embed, which only the backward pass reads, is ignored")
        elif ".lora_" in path:
            after = path.rpartition(".lora_")[2].split(".")
            why = "not a tensor of plain LoRA or DoRA"
            if len(after) > 1 and after[1] not in ("weight", "bias"):
                why = f"the adapter's name ({after[1]!r}) is still in the key; save it with `save_pretrained`"
            self.problems.append(f"{key} {shape}: {why}")
        else:
            remaining[path] = tensor

    # -- pairs -------------------------------------------------------------------------------------------------------

    def _pair(self, name: str, parts: dict[str, Tensor]) -> None:
        """Read the pair of a linear layer, a convolution or an embedding."""
        rows = "rows A" in parts or "rows B" in parts
        a, b = ("rows A", "rows B") if rows else ("A", "B")
        shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in sorted(parts.items()))
        if rows and ("A" in parts or "B" in parts):
            self.problems.append(f"{name}: a linear pair and an embedding pair at once ({shapes})")
            return
        if missing := [part for part in (a, b) if part not in parts]:
            self.problems.append(f"{name}: {' and '.join(missing)} missing, only {shapes}")
            return
        A, B, magnitude = parts[a], parts[b], parts.get("magnitude")
        kind: PairKind = "embedding" if rows else "linear" if A.ndim == 2 else "conv"
        rank, source = cfg.rank_of_module(self.config, name)
        sound = A.ndim >= 2 and B.ndim == A.ndim and A.shape[0] == B.shape[1] and all(n == 1 for n in B.shape[2:])
        if not sound or A.ndim > 5 or (rows and A.ndim != 2) or 0 in A.shape or 0 in B.shape:
            self.problems.append(f"{name}: A and B do not fit together ({shapes})")
            return
        if A.shape[0] != rank:
            self.problems.append(
                f"{name}: the config's {source} says rank {rank}, the tensors have {A.shape[0]} ({shapes})"
                + (": A and B are swapped" if (A.shape[1], B.shape[0]) == (rank, rank) else "")
            )
            return
        scale = scale_of(cfg.alpha_of_module(self.config, name), rank, self.config.rslora)
        self.pairs[name] = Pair(
            A, B, scale, kind, self._magnitude(name, magnitude, B.shape[0], A.ndim if not rows else 2)
        )
        self._bias(name, parts.get("bias"), B.shape[0], scale)

    def _key(self, name: str) -> str:
        """Return the name that PEFT's patterns are matched against."""
        parameter = f"{name}.weight"
        return parameter if cfg.names_parameter(self.config, parameter) else name

    def _bias(self, name: str, bias: Tensor | None, out: int, scale: float) -> None:
        """Read the bias b of B (lora_bias), which adds s·b to the output."""
        if (bias is not None) != self.config.lora_bias:
            message = "is set, but there is no" if bias is None else "is not set, but there is a"
            self.problems.append(f"{name}: lora_bias {message} lora_B.bias")
        elif bias is not None and tuple(bias.shape) != (out,):
            self.problems.append(f"{name}: lora_B.bias is {tuple(bias.shape)}, expected ({out},)")
        elif bias is not None:
            self.deltas[f"{name}.bias"] = Delta("dense", {"value": bias}, (out,), scale)

    def _magnitude(self, name: str, magnitude: Tensor | None, out: int, ndim: int) -> Tensor | None:
        if (magnitude is not None) != self.config.dora:
            reason = "use_dora is set, but there is no" if magnitude is None else "use_dora is not set, but there is a"
            self.problems.append(f"{name}: {reason} lora_magnitude_vector")
            return None
        if magnitude is None:
            return None
        want = (out,) if ndim == 2 else (1, out) + (1,) * (ndim - 2)
        if tuple(magnitude.shape) != want:
            self.problems.append(f"{name}: lora_magnitude_vector is {tuple(magnitude.shape)}, expected {want}")
        return magnitude.reshape(-1)

    def _is_plain(self, name: str, depths: dict[int, dict[str, Tensor]]) -> bool:
        """Return whether the tensors are a pair on the module itself, not on its parameters.

        Without a base, a short target_parameters entry such as `down_proj` could be a parameter of any
        module. In this case, a match in target_modules decides, because PEFT never adapts both a module and
        the module's parameters."""
        A = depths.get(0, {}).get("A")
        ranked = A is None or A.shape[:1] == (cfg.rank_of_module(self.config, name)[0],)
        return list(depths) == [0] and not self.base.detailed and ranked and cfg.selects(self.config, name)

    # -- biases, full copies, token rows, copies of embeddings ---------------------------------------------------------

    def read_full_modules(self, remaining: dict[str, Tensor]) -> None:
        entries = self.config.modules_to_save
        used: set[str] = set()
        for path, tensor in remaining.items():
            parts = path.split(".")
            owners = [".".join(parts[:n]) for n in range(1, len(parts))]
            owner = next((o for o in owners if any(o.endswith(e) for e in entries)), None)
            if owner is not None:
                used |= {e for e in entries if owner.endswith(e)}
            elif owners and (
                parts[-2] in _EMBEDDINGS or owners[-1] in (self.base.input_embedding, self.base.output_embedding)
            ):
                owner = owners[-1]
                self.notes.append(
                    f"{path} {tuple(tensor.shape)}: a full embedding saved with the pairs, read as a full copy"
                )
            if owner is not None:
                self.modules.setdefault(owner, {})[path.removeprefix(f"{owner}.")] = tensor
            else:
                self.problems.append(
                    f"{PREFIX}{path} {tuple(tensor.shape)}: nothing in the config accounts for this tensor"
                )
        for entry in sorted(set(entries) - used - set(self.config.heads)):
            if not self.base.detailed or any(name.endswith(entry) for name in self.base.kinds):
                self.problems.append(f"modules_to_save names {entry!r}, but the file has no tensors for it")
            else:
                self.notes.append(f"modules_to_save names {entry!r}, which this base does not have: it has no effect")
        for name in sorted(set(self.modules) & set(self.pairs)):
            self.problems.append(f"{name}: a pair and a full copy at once")

    def _tokens(self, tokens: dict[str, Tensor]) -> None:
        indices = self.config.token_indices
        ids_by_name: dict[str, list[int]] = indices if isinstance(indices, dict) else {}
        if isinstance(indices, list):
            if len(tokens) == 1:
                ids_by_name = {next(iter(tokens)): indices}
            else:
                self.problems.append(
                    f"trainable_token_indices is a list, but the file has rows for {len(tokens)} modules"
                )
                return
        for key, ids in ids_by_name.items():
            matches = [name for name in tokens if name.endswith(key)]
            if len(matches) != 1 and not (not matches and self._is_tied(key)):
                self.problems.append(f"trainable_token_indices names {key!r}: {len(matches)} modules have rows for it")
            for name in matches:
                rows = tokens.pop(name)
                if rows.ndim != 2 or len(rows) != len(ids):
                    self.problems.append(f"{name}: {len(ids)} token indices, rows of shape {tuple(rows.shape)}")
                else:
                    self.token_rows[name] = TokenRows(tuple(ids), rows)
        for name, rows in tokens.items():
            self.problems.append(f"{name}: token rows {tuple(rows.shape)} that trainable_token_indices does not name")

    def _is_tied(self, key: str) -> bool:
        """Return whether `key` names a tied head, which has no separate token rows."""
        return key == "lm_head" if not self.base.detailed else any(n.endswith(key) for n in self.base.tied)

    def _copies(self, copies: dict[str, Tensor]) -> None:
        """Compare PEFT's copies of the base's embeddings with the base.

        For a pair on an embedding, PEFT also stores the base's embedding, and overwrites the base's embedding
        when loading. An equal copy is redundant. A different copy means that the adapter belongs to a base
        with a changed embedding."""
        for path, tensor in copies.items():
            name = path.rpartition(".base_layer.")[0]
            weight = self.base.weight(name) if path.endswith(".weight") else None
            shape = tuple(tensor.shape)
            if name not in self.pairs or self.pairs[name].kind not in ("embedding", "linear"):
                self.problems.append(f"{PREFIX}{path} {shape}: a copy of a base module for which the file has no pair")
            elif weight is None:
                self.notes.append(f"{path} {shape}: a copy of the base's weight, ignored; no base to compare it with")
            elif tuple(weight.shape) != shape:
                self.problems.append(
                    f"{path} {shape}: the base has {tuple(weight.shape)}; the adapter was trained on a resized "
                    "embedding; resize the base's embedding first"
                )
            elif not tensor.to(weight).equal(weight):
                changed = int((tensor.to(weight) != weight).any(dim=-1).sum())
                self.problems.append(
                    f"{path} {shape}: {changed} rows differ from the base's; the adapter was trained on a base with "
                    "another embedding. Use that base, or train the embedding through modules_to_save"
                )
            else:
                self.notes.append(f"{path} {shape}: an exact copy of the base's weight, ignored")

    # -- checks of the configuration against the tensors -------------------------------------------------------------

    def _check_targets(self) -> None:
        config = self.config
        plain = {n: p for n, p in self.pairs.items() if p.kind != "experts"}
        parameters = {
            n for n in self.pairs if cfg.names_parameter(config, n) or cfg.names_parameter(config, f"{n}.weight")
        }
        extra = set(plain) - self.packed - set(parameters)
        omitted = [n for n in extra if not cfg.selects(config, n) and not self._is_tied_pair(n)]
        for name in sorted(omitted):
            pair = plain[name]
            self.problems.append(
                f"{name}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)} are in the file, but target_modules "
                "omits this module, so PEFT would silently ignore them"
            )
        idle, all_of_them = cfg.unmatched_targets(config, plain)
        all_of_them = (
            all_of_them and not parameters
        )  # with target_parameters, PEFT accepts target_modules that match nothing
        if idle and all_of_them:
            self.problems.append(f"target_modules names {', '.join(map(repr, idle))}, but there are no tensors for any")
        for entry in () if all_of_them else idle:
            # PEFT ignores entries without a match if another entry matches. `_check_expected` checks that the
            # file has tensors for everything that an entry selects in a given base.
            self.notes.append(f"target_modules names {entry!r}, but the file has no tensors for it: it has no effect")
        for entry in config.target_parameters:
            if any(cfg.is_or_ends(name, [entry]) for name in [*self.pairs, *(f"{p}.weight" for p in plain)]):
                continue
            # PEFT ignores an entry that matches no parameter if the adapter has another target.
            has_adapters = bool(self.pairs) if self.base.detailed else bool(parameters)
            without = has_adapters and not any(cfg.is_or_ends(name, [entry]) for name in self.base.shapes)
            message = f"target_parameters names {entry!r}, but the file has no tensors for it"
            self.notes.append(f"{message}: it has no effect") if without else self.problems.append(message)
        if self.base.detailed:
            self._check_expected()

    def _is_tied_pair(self, name: str) -> bool:
        """Return whether ensure_weight_tying created this pair for the tied head.

        Such a pair is the transpose of the embedding's pair, and the configuration does not name it."""
        if not self.config.tie or self.pairs[name].kind != "linear":
            return False
        twins = [p for p in self.pairs.values() if p.kind == "embedding"]
        mine = self.pairs[name]
        return any(mine.A.equal(p.B.T) and mine.B.equal(p.A.T) for p in twins)

    def _check_expected(self) -> None:
        """Check that the file has tensors for everything that the configuration selects."""
        everything = self.config.target_modules == cfg.ALL_LINEAR
        guessed = self.config.target_modules is None and not self.config.target_parameters
        for name, kind in self.base.kinds.items():
            if guessed or kind == "other" or name in self.pairs or name in self.modules:
                continue
            if self.renaming and not self.renaming.concerns(name):
                continue
            if everything and (kind != "linear" or name == self.base.output_embedding):
                continue
            if cfg.selects(self.config, name):
                self.problems.append(
                    f"{name}: target_modules selects this {kind} module, but the file has no tensors for it"
                )
        for full in self.base.shapes if self.config.target_parameters else ():
            is_adapted = full in self.pairs or full.removesuffix(".weight") in self.pairs
            if not is_adapted and cfg.names_parameter(self.config, full):
                self.problems.append(
                    f"{full}: target_parameters selects this parameter, but the file has no tensors for it"
                )
        for entry in set(self.config.modules_to_save) - set(self.config.heads):
            for name in self.base.kinds:
                inside = any(name == m or name.startswith(f"{m}.") for m in self.modules)
                if name.endswith(entry) and not inside and any(k.startswith(f"{name}.") for k in self.base.shapes):
                    self.problems.append(
                        f"{name}: modules_to_save selects this module, but the file has no tensors for it"
                    )

    def _check_base(self) -> None:
        """Check the adapter's names, and if known also kinds and shapes, against the base."""
        if self.base.detailed:
            adapter = Adapter(self.pairs, self.modules, self.token_rows, deltas=self.deltas)
            self.problems += self.base.problems(adapter)
        elif self.base.kinds:
            owners = {p.module(n) for n, p in self.pairs.items()}
            for name in sorted((owners | set(self.modules) | set(self.token_rows)) - set(self.base.kinds)):
                similar = nearest(name, self.base.kinds, 1)
                self.problems.append(
                    f"{name}: no such module in the base" + (f"; nearest: {similar[0]}" if similar else "")
                )


# -- biases ------------------------------------------------------------------------------------------------------------
# Biases of the base that PEFT trains: with `bias = "lora_only"` those of the target modules, with `"all"` those
# of every module.
#
#     model.layers.0.self_attn.q_proj.base_layer.bias (out,)      a module that has a pair
#     model.layers.0.self_attn.k_proj.bias (out,)                 another module, only with "all"
#
# The file contains the new values. A trained bias is read as a `replacement` (core/forms.py): Δb = s·(value −
# b), so the base's b is needed only when the adapter is applied.
#
# For a module in modules_to_save, "all" writes the bias three times: in the full copy, and under PEFT's names
# for the copy and for the base (`….modules_to_save.bias`, `….original_module.bias`). Only the bias in the full
# copy is read.

_WITHIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.((?:.+\.)?bias)")


def _trained_biases(
    config: PeftConfig,
    copies: dict[str, Tensor],
    remaining: dict[str, Tensor],
    pairs: Mapping[str, Pair],
    problems: list[str],
    notes: list[str],
) -> dict[str, Delta]:
    """Return the changes of biases by name (`….bias`).

    Removes the biases from `copies` and `remaining`, whose keys are the file's names without PEFT's prefix.
    Biases inside a module in modules_to_save belong to the module's full copy and are not returned."""
    if config.bias == "none":
        return {}
    for path in [p for p in remaining if _WITHIN.fullmatch(p)]:
        match = _WITHIN.fullmatch(path)
        assert match is not None
        copy = remaining.get(f"{match[1]}.{match[3]}")
        if copy is not None and (match[2] == "original_module" or copy.equal(remaining[path])):
            del remaining[path]
    saved = [f".{entry}." for entry in config.modules_to_save]
    biases: dict[str, Tensor] = {}
    for path in [p for p in copies if p.endswith(".base_layer.bias")]:
        biases[path.replace(".base_layer.bias", ".bias")] = copies.pop(path)
    for path in [p for p in remaining if p.endswith(".bias") and not any(s in f".{p}" for s in saved)]:
        if config.bias == "all" or path.removesuffix(".bias") in pairs:  # PEFT before 0.7 wrote no `base_layer`
            biases[path] = remaining.pop(path)
    if not biases:
        notes.append(f"bias = {config.bias!r}, but there are no biases in the file: it has no effect")
    for path, value in biases.items():
        pair = pairs.get(path.removesuffix(".bias"))
        out = None if pair is None or pair.kind not in ("linear", "conv") else pair.B.shape[0]
        if value.ndim != 1 or out not in (None, len(value)):
            problems.append(f"{path} {tuple(value.shape)}: one value for each of {out or 'the'} outputs is expected")
    return {path: Delta("replacement", {"value": value}, tuple(value.shape)) for path, value in biases.items()}


def _bias_switch(adapter: Adapter) -> str:
    """Return the value of PEFT's `bias` setting for the adapter's trained biases."""
    owners = {name.removesuffix(".bias") for name, d in adapter.deltas.items() if d.form == "replacement"}
    return "none" if not owners else "lora_only" if owners <= set(adapter.pairs) else "all"


def _bias_problems(name: str, delta: Delta) -> list[str]:
    """Return the reasons why PEFT cannot store a replacement as a trained bias."""
    if not name.endswith(".bias") or len(delta.shape) != 1:
        return [f"{name}: PEFT can store full copies only of biases; merge the adapter into the base"]
    if delta.scale != 1:
        at = f"a trained bias at a strength of {delta.scale:g}"
        return [f"{name}: {at}: PEFT stores the new bias, which depends on the base's bias; merge it into the base"]
    return []


def _bias_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the new values of biases by their path in PEFT's layout."""
    out = {}
    for name, delta in adapter.deltas.items():
        if delta.form == "replacement":
            module = name.removesuffix(".bias")
            out[f"{module}.base_layer.bias" if module in adapter.pairs else name] = delta.parts["value"]
    return out


# -- expert parameters -------------------------------------------------------------------------------------------------
# Pairs of expert parameters, in the layouts of PEFT's `target_parameters` and Unsloth.
#
#     A (E·r, in): expert 0 rank 0, expert 0 rank 1, …
#     B (out, r·E): rank_major          rank 0 expert 0, rank 0 expert 1, …   PEFT, and Unsloth since 2026-09-17
#                   grouped_by_expert   expert 0 rank 0, expert 0 rank 1, …   Unsloth before 2026-09-17
#
# Both layouts of B have the same shapes, and older Unsloth files contain neither a version nor the layout.
# Since 2026-09-17, Unsloth writes `lora_B_layout` into the configuration.

_EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_SWAPPED_SINCE = (0, 19, 1)
"""The first PEFT version with the current layout of 3-d parameters."""


@dataclass
class ExpertReader:
    """Reader for pairs of expert parameters.

    `problems`: one message for each fault, added while reading."""

    config: cfg.PeftConfig
    base: Structure
    problems: list[str]
    unclear: list[str] = field(default_factory=list)
    """Parameters whose layout of B the file does not state."""

    def parameters(self, name: str, count: int) -> list[str]:
        """Return the parameters of module `name` that target_parameters selects, in PEFT's order.

        count: the number of parameters of this module in the file."""
        entries = self.config.target_parameters
        leaves = {t.rpartition(".")[2] for t in entries}
        adapted = {parameter for parameter in leaves if cfg.names_parameter(self.config, f"{name}.{parameter}")}
        if self.base.detailed:
            in_base = [key[len(name) + 1 :] for key in self.base.shapes if key.startswith(f"{name}.")]
            return [p for p in in_base if p in adapted]
        # Without a base, an entry that is only a parameter's name matches every module. Prefer entries that
        # also name the module.
        dotted = [t for t in entries if "." in t]
        named = {parameter for parameter in adapted if cfg.is_or_ends(f"{name}.{parameter}", dotted)}
        adapted = named if 0 < len(named) == count < len(adapted) else adapted
        ordered = [p for p in _EXPERT_ORDER if p in adapted]
        return ordered + sorted(adapted - set(ordered))

    def read(self, name: str, parameters: list[str], depths: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Pair]:
        """Return the pairs of a module's parameters.

        depths: {number of `.base_layer` in the key: {part: tensor}}."""
        tensors = [(d, part, t) for d, parts in sorted(depths.items()) for part, t in parts.items()]
        listing = ", ".join(f"{'base_layer ' * d}{part} {tuple(t.shape)}" for d, part, t in tensors)
        if sorted(depths) != list(range(len(parameters))):
            self.problems.append(
                f"{name}: tensors for {len(depths)} parameter(s) ({listing}), "
                f"but target_parameters names {len(parameters)} of this module: {', '.join(parameters) or 'none'}"
            )
            return {}
        if len(parameters) > 1 and not self.base.detailed and not set(parameters) <= set(_EXPERT_ORDER):
            self.problems.append(f"{name}: which tensors belong to which of {parameters} is known only with a base")
            return {}
        out: dict[str, Pair] = {}
        for depth, parts in depths.items():
            parameter = parameters[len(parameters) - 1 - depth]
            if set(parts) != {"A", "B"} or any(t.ndim != 2 or 0 in t.shape for t in parts.values()):
                self.problems.append(f"{name}.{parameter}: expected A and B, both 2-d; got {listing}")
            else:
                out |= self._pair(name, parameter, parts["A"], parts["B"])
        return out

    def _pair(self, name: str, parameter: str, A: Tensor, B: Tensor) -> dict[str, Pair]:
        full = f"{name}.{parameter}"
        rank, source = cfg.rank_of_module(self.config, full)
        scale = scale_of(cfg.alpha_of_module(self.config, full), rank, self.config.rslora)
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
        stored = self.base.shapes.get(full)
        experts, remainder = divmod(A.shape[0], rank)
        plain = parameter == "weight" and experts == 1 and len(stored or (0, 0)) == 2
        is_supported = stored is None or plain or (len(stored) == 3 and stored[0] == experts)
        if remainder or A.shape[0] != B.shape[1] or not is_supported:
            in_base = f" and the base has {stored}" if stored else ""
            self.problems.append(f"{full}: {shapes} do not fit rank {rank} (the config's {source}) per expert{in_base}")
            return {}
        if plain:
            return {name: Pair(A, B, scale)}  # the pair of a plain weight in target_parameters is linear
        A3, B3 = A.view(experts, rank, -1), self._by_expert(full, B, experts, rank)
        if self._is_flipped(name, full, shapes, (A.shape[1], B.shape[0]), stored):
            A3, B3 = B3.transpose(1, 2), A3.transpose(1, 2)
        return {full: Pair(A3.contiguous(), B3.contiguous(), scale, "experts")}

    def _by_expert(self, full: str, B: Tensor, experts: int, rank: int) -> Tensor:
        """Return B in the shape (E, out, r), converted from the stored (out, r·E).

        The stored layout is the one in the configuration, or PEFT's if the configuration has none."""
        if experts > 1 and rank > 1 and not self.config.b_layout and self.config.unsloth:
            self.unclear.append(full)
        if self.config.b_layout == cfg.GROUPED:
            return B.view(B.shape[0], experts, rank).permute(1, 0, 2)
        return B.view(B.shape[0], rank, experts).permute(2, 0, 1)

    def _is_flipped(
        self, name: str, full: str, shapes: str, got: tuple[int, int], stored: tuple[int, ...] | None
    ) -> bool:
        """Return whether the file's LoRA pair was computed for the transposed parameter.

        PEFT before 0.19.1 wrote such pairs. The shapes decide; for a square parameter, the PEFT version in
        the file decides.
        """
        version = self.config.version
        old = version is not None and version < _SWAPPED_SINCE
        if stored is None:
            if version is None or old:
                wrote = "PEFT " + ".".join(map(str, version)) if version else "an unnamed version of PEFT"
                self.problems.append(
                    f"{full}: written by {wrote}, and versions before 0.19.1 laid out expert weights differently "
                    f"({shapes}): only the base's shapes show the layout; pass the base"
                )
            return False
        transposed = name in self.base.transposed
        want = stored[1:] if transposed else stored[:0:-1]
        if got not in (want, want[::-1]):
            self.problems.append(f"{full}: {shapes} do not fit the base's {stored} in either layout")
        if want[0] != want[1]:
            return got != want
        if version is None:
            self.problems.append(f"{full}: {shapes} on a square {stored}: the layout is unknown without peft_version")
        return old and (not transposed or version >= (0, 19, 0))  # type: ignore[operator]

    def report_unclear(self) -> None:
        """Add one problem for all unclear parameters, with instructions."""
        if self.unclear:
            self.problems.append(
                f"{len(self.unclear)} expert parameter(s) ({', '.join(self.unclear[:3])}, …) of a file with Unsloth's "
                f"marks ({self.config.unsloth}) and without lora_B_layout: Unsloth before 2026-09-17 grouped B's "
                f"columns by expert, later versions and PEFT by rank, with the same shapes. Add to {CONFIG_FILE}: "
                f'"lora_B_layout": "{cfg.GROUPED}" if that Unsloth trained it, "{cfg.RANK_MAJOR}" otherwise'
            )


_LAYOUT = "0.21.2"
"""Value of `peft_version` in written files; it tells readers the layout of square expert parameters."""


# -- writing ----------------------------------------------------------------------------------------------------------
# Writes the smallest configuration that PEFT's matching rules resolve to exactly these modules, ranks and
# scales. As a check, the result is parsed again before it is written. The folder is written atomically.


@dataclass(frozen=True)
class FolderReport:
    """The result of writing a folder.

    `digest`: the digest of the adapter as read back. `files`: name -> SHA-256. `notes`: settings that the
    format cannot express."""

    folder: Path
    digest: str
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Encoded:
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    adapter: Adapter
    """The adapter as read back from the encoding."""
    notes: list[str]


def write_folder(
    adapter: Adapter,
    folder: str | Path,
    *,
    base_name: str = "",
    base: BaseLike = None,
    task_type: str | None = "auto",
    digest: str | None = None,
) -> FolderReport:
    """Write `adapter` to `folder` as PEFT's two files, `veneer.json` and `README.md`.

    base_name: the name of the base, by default the one in the card.
    base: the model or its structure. With a base, target_modules is a short list of suffixes; without a
        base, it is the list of exact names. A base is required for pairs on several expert parameters
        unless the parameters are named gate_up_proj and down_proj.
    task_type: "auto" is the task of the PEFT folder that the adapter was read from, else CAUSAL_LM for a text
        adapter.
    digest: the adapter's digest, required if the adapter's module names start with a pipeline component and
        the folder's names do not.

    A README.md without veneer's mark is not replaced. Equal adapters give equal bytes. Raises AdapterError
    for anything that PEFT's format cannot express, ResourceError if the disk is full; after any error the
    folder is unchanged."""
    folder = Path(folder)
    name = base_name or adapter.card.base
    done = _encode(adapter, base_name=name, base=base, task_type=task_type, where=str(folder))
    config = json.dumps(done.config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    stated = json.dumps(done.config, sort_keys=True, ensure_ascii=False)
    tensors = encode_tensors(done.tensors, {"format": "pt", CONFIG_KEY: stated})
    card = adapter.card
    if not card.rank and adapter.pairs:
        card = replace(card, rank=done.config["r"], alpha=float(done.config["lora_alpha"]))
    if not card.targets and isinstance(done.config["target_modules"], list):
        card = replace(
            card, targets=sorted([*done.config["target_modules"], *done.config.get("target_parameters", [])])
        )
    card = replace(card, base=card.base or name)
    digest = digest or done.adapter.digest()
    hashes = {TENSOR_FILE: cards.file_digest(tensors), CONFIG_FILE: cards.file_digest([config])}
    readme = cards.readme_bytes(replace(done.adapter, card=card), digest=digest, base_name=name, name=folder.name)
    contents: dict[str, list[bytes | memoryview]] = {
        TENSOR_FILE: tensors,
        CONFIG_FILE: [config],
        cards.CARD_FILE: [cards.card_bytes(card, digest=digest, files=hashes)],
        cards.README_FILE: [readme],
    }
    if not cards.is_ours(folder / cards.README_FILE):
        del contents[cards.README_FILE]
    put_folder(folder, contents, last=cards.CARD_FILE)
    return FolderReport(folder, digest, hashes, done.notes)


def encode_folder(
    adapter: Adapter, *, base_name: str = "", base: BaseLike = None, task_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and tensors of a PEFT folder, checked by reading them back.

    `task_type` and errors are those of `write_folder`."""
    done = _encode(adapter, base_name=base_name, base=base, task_type=task_type, where=None)
    return done.config, done.tensors


def _encode(adapter: Adapter, *, base_name: str, base: BaseLike, task_type: str | None, where: str | None) -> _Encoded:
    base_name = hub_id(base_name)  # PEFT, vLLM and the Hub do not know veneer's names for bases
    outline = structure_of(base) if base is not None else Structure({})
    collapsed = adapter.collapsed().mapped(lambda t: t.detach())
    lycoris = can_be_lycoris(collapsed)
    if task_type == "auto":
        task_type = adapter.card.extra.get("task_type") or ("CAUSAL_LM" if adapter.card.kind == "text" else None)
    problems = [] if lycoris else _problems(collapsed, outline)
    if not problems:
        check_finite(dict(collapsed.tensors()), where=where)
        try:
            if lycoris:
                names = {name.rpartition(".")[0] for name in collapsed.deltas}
                targets, notes = _target_modules(names, set(outline.kinds)), list[str]()
                config, tensors = write_lycoris(collapsed, base_name=base_name, task_type=task_type, targets=targets)
            else:
                tensors = _tensors(collapsed, outline)
                config, notes = _config(collapsed, outline, base_name, task_type)
            read = interpret(config, tensors, base if outline.detailed else None).adapter
            problems = _differences(collapsed, read)
        except AdapterError as error:
            problems = [f"PEFT could not read the folder back: {error.what}"]
    if problems:
        raise AdapterError(f"the adapter cannot be written as a PEFT folder:\n{bullets(problems, None)}", where=where)
    return _Encoded(config, tensors, read, notes)


def _problems(adapter: Adapter, base: Structure) -> list[str]:
    """Return a message for each part of the adapter that PEFT's format cannot express."""
    out = []
    if not (adapter.pairs or adapter.modules or adapter.token_rows or adapter.deltas):
        out.append("it is empty")
    out += _delta_problems(adapter)
    out += [f"{n}: the scale is {p.scale}" for n, p in adapter.pairs.items() if not math.isfinite(p.scale)]
    with_dora = {n for n, p in adapter.pairs.items() if p.magnitude is not None}
    if with_dora and len(with_dora) != len(adapter.pairs):
        plain = sorted(set(adapter.pairs) - with_dora)
        out.append(
            f"use_dora applies to all pairs, but {len(plain)} of {len(adapter.pairs)} have no magnitude "
            f"({', '.join(plain[:3])}); add magnitudes equal to the row norms of the weights, or train without DoRA"
        )
    by_parameter = {n for n, p in adapter.pairs.items() if p.kind == "experts"} | _routers(adapter, base)
    out += [f"{n}: DoRA on expert parameters or a router" for n in sorted(with_dora & by_parameter)]
    owners = {pair.module(name): "a pair" for name, pair in adapter.pairs.items()}
    owners |= dict.fromkeys(adapter.token_rows, "token rows")
    for name in sorted(adapter.modules):
        inside = [o for o in owners if o == name or o.startswith(f"{name}.")]
        out += [f"{o}: {owners[o]} inside {name}, which is a full copy" for o in inside]
        out += [] if adapter.modules[name] else [f"{name}: a full copy without tensors"]
    out += [f"{n}: a pair and token rows at once" for n in sorted(set(adapter.pairs) & set(adapter.token_rows))]
    return out


def _delta_problems(adapter: Adapter) -> list[str]:
    """Return a message for each delta that PEFT cannot express.

    PEFT supports two kinds: trained biases at scale 1, and lora_bias, which requires a bias with the pair's
    scale on every pair."""
    out, biased = [], set()
    for name, delta in sorted(adapter.deltas.items()):
        if delta.form == "replacement":
            out += _bias_problems(name, delta)
            continue
        pair = adapter.pairs.get(name.removesuffix(".bias"))
        if delta.form != "dense" or pair is None or delta.scale != pair.scale or delta.magnitude is not None:
            out.append(f"{name}: a {delta.form} delta; convert the delta to pairs, or merge the adapter into the base")
        else:
            biased.add(name.removesuffix(".bias"))
    if biased and (without_bias := sorted(set(adapter.pairs) - biased)):
        out.append(
            f"lora_bias applies to all pairs, but {len(without_bias)} have no bias ({', '.join(without_bias[:3])})"
        )
    return out


def _by_module(adapter: Adapter) -> dict[str, list[str]]:
    """Return {module: its expert parameters that have a pair}."""
    out: dict[str, list[str]] = defaultdict(list)
    for name, pair in adapter.pairs.items():
        if pair.kind == "experts":
            module, _, parameter = name.rpartition(".")
            out[module].append(parameter)
    return out


_ROUTER = re.compile(r"(?:.+\.)?layers\.\d+\.(?:mlp|block_sparse_moe|feed_forward|moe)\.(?:gate|router)")


def _routers(adapter: Adapter, base: Structure) -> set[str]:
    """Return the names of linear pairs on modules that are not linear layers, such as routers.

    PEFT adapts such a module's `weight` as a parameter. Without a base, the function guesses: it returns
    pairs next to fused experts and pairs with a router's name. If one of these modules is in fact a linear
    layer, PEFT accepts its `weight` as a parameter as well."""
    linear = {n for n, p in adapter.pairs.items() if p.kind == "linear"}
    if base.detailed:
        return {n for n in linear if base.kinds.get(n) == "other"}
    blocks = {module.rpartition(".")[0] for module in _by_module(adapter)}
    named = {n for n in linear if n.rpartition(".")[0] in blocks or _ROUTER.fullmatch(n)}
    return {n for n in named if adapter.pairs[n].magnitude is None}


def _tensors(adapter: Adapter, base: Structure) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    biases = {n.removesuffix(".bias"): d.parts["value"] for n, d in adapter.deltas.items() if d.form == "dense"}
    for name, pair in adapter.pairs.items():
        if pair.kind == "experts":
            continue
        a, b = (
            ("lora_embedding_A", "lora_embedding_B") if pair.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        out[f"{name}.{a}"], out[f"{name}.{b}"] = pair.A, pair.B
        if name in biases:
            out[f"{name}.lora_B.bias"] = biases[name]
        if pair.magnitude is not None:
            shape = (1, -1, *[1] * (pair.A.ndim - 2)) if pair.kind == "conv" else (-1,)
            out[f"{name}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    for module, parameters in _by_module(adapter).items():
        order = [p for p in (base.experts.get(module) or _EXPERT_ORDER) if p in parameters] or parameters
        for depth, parameter in enumerate(reversed(order)):
            pair = adapter.pairs[f"{module}.{parameter}"]
            site = module + ".base_layer" * depth
            out[f"{site}.lora_A.weight"] = pair.A.flatten(0, 1)
            out[f"{site}.lora_B.weight"] = pair.B.permute(1, 2, 0).flatten(1)
    for name, full_copy in adapter.modules.items():
        out |= {f"{name}.{key}": tensor for key, tensor in full_copy.items()}
    for name, rows in adapter.token_rows.items():
        out[f"{name}.token_adapter.trainable_tokens_delta"] = rows.rows
    out |= _bias_tensors(adapter)
    return {PREFIX + key: tensor.contiguous() for key, tensor in out.items()}


def _config(
    adapter: Adapter, base: Structure, base_name: str, task_type: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the smallest PEFT configuration for this adapter, and notes."""
    notes: list[str] = []
    routers = _routers(adapter, base)
    pairs = {
        f"{n}.weight" if n in routers else n: p for n, p in adapter.pairs.items()
    }  # the names that PEFT's patterns are matched against
    ranks = {n: p.rank for n, p in pairs.items()}
    rooted = ((p.scale, scale_of(cfg.exact_alpha(p.scale, p.rank, True), p.rank, True)) for p in pairs.values())
    rslora = adapter.rslora and all(scale == again for scale, again in rooted)
    alphas = {n: cfg.exact_alpha(p.scale, p.rank, rslora) for n, p in pairs.items()}
    rank, alpha = cfg.commonest(ranks.values(), 8), cfg.commonest(alphas.values(), 8.0)
    fused = {n for n, p in pairs.items() if p.kind == "experts"} | {f"{n}.weight" for n in routers}
    plain = set(pairs) - fused
    dropout = adapter.dropout
    if fused and dropout:
        notes.append(f"lora_dropout is written as 0 instead of {dropout:g}: PEFT has no dropout on target_parameters")
        dropout = 0.0
    linear = {n for n in plain if pairs[n].kind == "linear"}
    config: dict[str, Any] = {
        "alpha_pattern": cfg.patterns_of(alphas, alpha),
        "base_model_name_or_path": base_name or None,
        "bias": _bias_switch(adapter),
        "fan_in_fan_out": bool(linear) and linear <= base.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": sorted(adapter.modules) or None,
        "peft_type": "LORA",
        "peft_version": _LAYOUT,
        "r": rank,
        "rank_pattern": cfg.patterns_of(ranks, rank),
        "target_modules": _target_modules(plain, set(base.kinds)) if pairs else DUMMY_TARGETS,
        "task_type": task_type,
        "use_dora": any(p.magnitude is not None for p in pairs.values()),
        "use_rslora": rslora,
    }
    if any(d.form == "dense" for d in adapter.deltas.values()):
        config["lora_bias"] = True
    if fused:
        every = {f"{m}.{p}" for m, ps in base.experts.items() for p in ps}
        every |= {n for n in base.shapes if n.endswith(".weight")} if routers else set()
        config["target_parameters"] = _targets(fused, every, parts=2)
        if unsloth_marks(config):  # otherwise the layout of B would be ambiguous to a reader
            config["lora_B_layout"] = RANK_MAJOR
    if adapter.token_rows:
        config["trainable_token_indices"] = {n: list(r.indices) for n, r in sorted(adapter.token_rows.items())}
    return config, notes


def _target_modules(names: set[str], base_names: set[str]) -> list[str] | str:
    """Return the list from `_targets`, or one regular expression if the list is ambiguous.

    The list is ambiguous if one of its entries is also the suffix of another module of the base. The regular
    expression then contains all names."""
    targets = _targets(names, base_names)
    if any(k.endswith(f".{t}") for t in targets for k in base_names - names):
        return "|".join(re.escape(name) for name in sorted(names))
    return targets


def _targets(names: set[str], base_names: set[str], parts: int = 1) -> list[str]:
    """Return the shortest list of suffixes that select exactly `names` among `base_names`.

    A whole name replaces a suffix that would select more, and every suffix if `base_names` is empty.

    parts: minimum number of parts in a suffix. The first part of a suffix contains letters: PEFT would match
        the bare number `2` of `net.2` with the block `layers.2` too, and `base_names` does not always contain
        blocks."""
    out: set[str] = set()
    for name in names:
        split = name.split(".")
        length = next((n for n in range(parts, len(split)) if re.search("[A-Za-z]", split[-n])), len(split))
        suffix = ".".join(split[-length:])
        matches = {k for k in base_names if k == suffix or k.endswith(f".{suffix}")}
        out.add(suffix if matches and matches <= names else name)
    return sorted(out)


def _differences(original: Adapter, read: Adapter) -> list[str]:
    """Return a message for each difference between the adapter and the adapter read back."""
    out = []
    mine, theirs = dict(original.tensors()), dict(read.tensors())
    for name in sorted(set(mine) | set(theirs)):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.dtype != b.dtype or not a.equal(b):
            out.append(f"{name} would come back {'changed' if a is not None and b is not None else 'or go missing'}")
    for name in set(original.pairs) & set(read.pairs):
        expected, got = original.pairs[name].scale, read.pairs[name].scale
        if not math.isclose(expected, got, rel_tol=1e-12):
            out.append(f"{name}: scale {expected} would come back as {got}")
    for name in set(original.deltas) & set(read.deltas):
        if not math.isclose(original.deltas[name].scale, read.deltas[name].scale, rel_tol=1e-12):
            out.append(f"{name}: the scale would come back changed")
    if {n: r.indices for n, r in original.token_rows.items()} != {n: r.indices for n, r in read.token_rows.items()}:
        out.append("the token indices would come back changed")
    return out
