"""What the tensors of a PEFT folder mean under its configuration. See formats/peft.py for the layout.

Every tensor must be accounted for by the configuration and the other way round, under PEFT's own rules of matching.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Card, Kind, Pair, TokenRows, scale_of
from veneer.core.forms import Delta
from veneer.errors import AdapterError, nearest
from veneer.formats import moe
from veneer.formats import peft_config as cfg
from veneer.formats.peft_bias import trained_biases
from veneer.formats.peft_experts import ExpertReader
from veneer.formats.structure import Structure, describe
from veneer.formats.wrappers import Renaming, renaming

__all__ = ["PREFIX", "Base", "Loaded", "interpret"]

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "rows A",
    ".lora_embedding_B": "rows B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "copy",
    ".base_layer.bias": "copy",
}

Base = nn.Module | Structure | Iterable[str] | Callable[[], Any] | None
"""What a caller may give of the base: the model, its outline, or its module names."""


@dataclass
class Loaded:
    """An adapter as read: with `config` as it stands in the file, and `notes` on what was left aside and why."""

    adapter: Adapter
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def interpret(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: Base = None,
    *,
    where: str | None = None,
    card: Card | None = None,
    moe_layout: str = "",
) -> Loaded:
    """What a configuration and tensors mean together. `moe_layout`: how expert pairs' B is laid out, where the file
    does not say (formats/peft_experts.py). Raises as `read` does."""
    parsed, problems = cfg.parse(config)
    if moe_layout and parsed.b_layout not in ("", moe_layout):
        problems.append(f"the file says lora_B_layout = {parsed.b_layout}, and the caller {moe_layout}")
    outline = describe(base) if base is not None else Structure({})
    other = renaming((key.removeprefix(PREFIX) for key in tensors), outline.kinds)
    seen = outline.under(other.to_file, other.to_base) if other else outline
    reader = _Reader(parsed, seen, problems, layout=moe_layout, other=other)
    if parsed.usable:
        try:
            reader.run(tensors)
        except cfg.PatternError as error:
            problems.append(str(error))
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems)
        raise AdapterError(f"the adapter cannot be used as it is ({len(problems)} problem(s)):\n{shown}", where=where)
    adapter = Adapter(
        reader.pairs,
        reader.modules,
        reader.token_rows,
        card or cfg.card_of(parsed),
        rslora=parsed.rslora,
        dropout=parsed.dropout,
        deltas=reader.deltas,
    )
    if other:
        adapter = adapter.renamed(other.to_base)
        reader.notes.append(other.note())
    if parsed.stamps:
        adapter.card.extra = {**adapter.card.extra, "adapter_config": parsed.stamps}
        reader.notes += [f"{key} = {str(value)[:60]}: a stamp, kept" for key, value in parsed.stamps.items()]
    return Loaded(adapter, dict(config), reader.notes)


@dataclass
class _Reader:
    """Sorts tensors into pairs, full copies and token rows, and collects every problem on the way."""

    config: cfg.Config
    base: Structure
    problems: list[str]
    layout: str = ""
    other: Renaming | None = None
    """The file's names, where they are those of another class than the base's."""
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)
    """Modules that the file has in another tool's packing, so that its target_modules may not name them."""

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        given = set(tensors)
        tensors, notes, wrong = moe.unpacked(tensors)
        self.packed = {k.removeprefix(PREFIX).rpartition(".lora_")[0] for k in set(tensors) - given}
        self.notes += notes
        self.problems += wrong
        sites, rest, tokens, copies = self._sort(tensors)
        modules: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(dict)
        for site, parts in sites.items():
            name = site.replace(".base_layer", "")
            modules[name][site.count(".base_layer")] = parts
        experts = ExpertReader(self.config, self.base, self.problems, self.layout)
        for name in sorted(modules):
            depths = modules[name]
            parameters = [] if self._is_plain(name, depths) else experts.parameters(name)
            if parameters or len(depths) > 1 or 0 not in depths:
                self.pairs |= experts.read(name, parameters, depths)
            else:
                self._pair(name, depths[0])
        experts.ask()
        self._trained_biases(copies, rest)
        self._full_modules(rest)
        self._tokens(tokens)
        self._copies(copies)
        self._check_targets()
        self._check_patterns()
        self.pairs, notes, wrong = moe.fuse(self.pairs, self.base)
        self.notes += notes
        self.problems += wrong
        self._check_base()

    def _sort(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Split the keys: pairs by module, full copies, token rows, copies of embeddings."""
        sites: dict[str, dict[str, Tensor]] = defaultdict(dict)
        rest: dict[str, Tensor] = {}
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
            if tensor.dtype not in FLOATS:
                self.problems.append(f"{key} {tuple(tensor.shape)}: dtype {tensor.dtype} holds no weights")
                continue
            suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.endswith(s)), None)
            if suffix is None:
                self._sort_other(key, path, tensor, rest)
                continue
            name, part = path.removesuffix(suffix), SUFFIXES[suffix]
            if part in ("tokens", "copy"):
                (tokens if part == "tokens" else copies)[name if part == "tokens" else path] = tensor
            elif part in sites[name]:
                self.problems.append(f"{key}: a second magnitude for {name}")
            else:
                sites[name][part] = tensor
        return sites, rest, tokens, copies

    def _sort_other(self, key: str, path: str, tensor: Tensor, rest: dict[str, Tensor]) -> None:
        shape = tuple(tensor.shape)
        if self.config.velora and path.endswith(".lora_velora_embed"):
            if not any(note.startswith("VeLoRA") for note in self.notes):
                self.notes.append("VeLoRA's lora_velora_embed, which the backward pass alone reads, is left aside")
        elif ".lora_" in path:
            after = path.rpartition(".lora_")[2].split(".")
            named = len(after) > 1 and after[1] not in ("weight", "bias")
            why = (
                f"the adapter's name ({after[1]!r}) is still in the key; save it with `save_pretrained`"
                if named
                else ""
            )
            self.problems.append(f"{key} {shape}: {why or 'not a tensor of plain LoRA or DoRA'}")
        else:
            rest[path] = tensor

    # -- pairs -------------------------------------------------------------------------------------------------------

    def _pair(self, name: str, parts: dict[str, Tensor]) -> None:
        """A pair on a linear, a convolution or an embedding."""
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
        kind: Kind = "embedding" if rows else "linear" if A.ndim == 2 else "conv"
        rank, source = cfg.rank_of_module(self.config, name)
        groups = B.shape[1] and A.shape[0] // B.shape[1] if kind == "conv" and B.ndim > 1 else 1
        sound = (
            A.ndim >= 2 and B.ndim == A.ndim and A.shape[0] == B.shape[1] * groups and all(n == 1 for n in B.shape[2:])
        )
        if not sound or A.ndim > 5 or (rows and A.ndim != 2) or 0 in A.shape or 0 in B.shape:
            self.problems.append(f"{name}: A and B do not fit each other ({shapes})")
            return
        if A.shape[0] != rank:
            self.problems.append(
                f"{name}: the config's {source} says rank {rank}, the tensors have {A.shape[0]} ({shapes})"
                + (": A and B have changed places" if (A.shape[1], B.shape[0]) == (rank, rank) else "")
            )
            return
        scale = scale_of(cfg.alpha_of_module(self.config, name), rank, self.config.rslora)
        self.pairs[name] = Pair(
            A, B, scale, kind, self._magnitude(name, magnitude, B.shape[0], A.ndim if not rows else 2)
        )
        self._bias(name, parts.get("bias"), B.shape[0], scale)

    def _bias(self, name: str, bias: Tensor | None, out: int, scale: float) -> None:
        """lora_bias: B has a bias b, so that the output moves by s·b as well."""
        if (bias is not None) != self.config.lora_bias:
            said = "is set, but there is no" if bias is None else "is not set, but there is a"
            self.problems.append(f"{name}: lora_bias {said} lora_B.bias")
        elif bias is not None and tuple(bias.shape) != (out,):
            self.problems.append(f"{name}: lora_B.bias is {tuple(bias.shape)}, expected ({out},)")
        elif bias is not None:
            self.deltas[f"{name}.bias"] = Delta("dense", {"value": bias}, (out,), scale)

    def _magnitude(self, name: str, magnitude: Tensor | None, out: int, ndim: int) -> Tensor | None:
        if (magnitude is not None) != self.config.dora:
            what = "use_dora is set, but there is no" if magnitude is None else "use_dora is not set, but there is a"
            self.problems.append(f"{name}: {what} lora_magnitude_vector")
            return None
        if magnitude is None:
            return None
        want = (out,) if ndim == 2 else (1, out) + (1,) * (ndim - 2)
        if tuple(magnitude.shape) != want:
            self.problems.append(f"{name}: lora_magnitude_vector is {tuple(magnitude.shape)}, expected {want}")
        return magnitude.reshape(-1)

    def _is_plain(self, name: str, depths: dict[int, dict[str, Tensor]]) -> bool:
        """Whether target_modules means this module itself. PEFT never puts both on one module, and without a base a
        short target_parameters entry, such as `down_proj`, could be a parameter of any module."""
        A = depths.get(0, {}).get("A")
        ranked = A is None or A.shape[:1] == (cfg.rank_of_module(self.config, name)[0],)
        return list(depths) == [0] and not self.base.detailed and ranked and cfg.matches(self.config, name)

    # -- biases, full copies, token rows, copies of embeddings ---------------------------------------------------------

    def _trained_biases(self, copies: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
        found = trained_biases(self.config, copies, rest, self.pairs, self.problems, self.notes)
        self.problems += [f"{n}: lora_bias and a trained bias at once" for n in sorted(set(found) & set(self.deltas))]
        self.deltas |= found

    def _full_modules(self, rest: dict[str, Tensor]) -> None:
        entries = self.config.modules_to_save
        used: set[str] = set()
        for path, tensor in rest.items():
            parts = path.split(".")
            owners = [".".join(parts[:n]) for n in range(1, len(parts))]
            owner = next((o for o in owners if any(o.endswith(e) for e in entries)), None)
            if owner is not None:
                used |= {e for e in entries if owner.endswith(e)}
            elif owners and (
                parts[-2] in EMBEDDINGS or owners[-1] in (self.base.input_embedding, self.base.output_embedding)
            ):
                owner = owners[-1]
                self.notes.append(
                    f"{path} {tuple(tensor.shape)}: a whole embedding saved beside the pairs, kept as a full copy"
                )
            if owner is not None:
                self.modules.setdefault(owner, {})[path.removeprefix(f"{owner}.")] = tensor
            else:
                self.problems.append(
                    f"{PREFIX}{path} {tuple(tensor.shape)}: nothing in the config accounts for this tensor"
                )
        for entry in sorted(set(entries) - used - set(self.config.heads)):
            if not self.base.detailed or any(name.endswith(entry) for name in self.base.kinds):
                self.problems.append(f"modules_to_save names {entry!r}, and there are no tensors for it")
            else:
                self.notes.append(f"modules_to_save names {entry!r}, which this base does not have: it has no effect")
        for name in sorted(set(self.modules) & set(self.pairs)):
            self.problems.append(f"{name}: a pair and a full copy at once")

    def _tokens(self, tokens: dict[str, Tensor]) -> None:
        indices = self.config.token_indices
        wanted: dict[str, list[int]] = indices if isinstance(indices, dict) else {}
        if isinstance(indices, list):
            if len(tokens) == 1:
                wanted = {next(iter(tokens)): indices}
            else:
                self.problems.append(
                    f"trainable_token_indices is a list, and the file has rows for {len(tokens)} modules"
                )
                return
        for key, ids in wanted.items():
            found = [name for name in tokens if name.endswith(key)]
            if len(found) != 1 and not (not found and self._is_tied(key)):
                self.problems.append(f"trainable_token_indices names {key!r}: {len(found)} modules have rows for it")
            for name in found:
                rows = tokens.pop(name)
                if rows.ndim != 2 or len(rows) != len(ids):
                    self.problems.append(f"{name}: {len(ids)} token indices, rows of shape {tuple(rows.shape)}")
                else:
                    self.token_rows[name] = TokenRows(tuple(ids), rows)
        for name, rows in tokens.items():
            self.problems.append(f"{name}: token rows {tuple(rows.shape)} that trainable_token_indices does not name")

    def _is_tied(self, key: str) -> bool:
        """A tied head writes no rows of its own."""
        return key == "lm_head" if not self.base.detailed else any(n.endswith(key) for n in self.base.tied)

    def _copies(self, copies: dict[str, Tensor]) -> None:
        """PEFT puts the base's own embedding beside a pair on it, and on loading writes it over the base. Equal to the
        base it says nothing; if it differs, the adapter belongs to a base whose embedding was changed."""
        for path, tensor in copies.items():
            name = path.rpartition(".base_layer.")[0]
            own = self.base.weight(name) if path.endswith(".weight") else None
            shape = tuple(tensor.shape)
            if name not in self.pairs or self.pairs[name].kind not in ("embedding", "linear"):
                self.problems.append(f"{PREFIX}{path} {shape}: a copy of a base module that carries no pair")
            elif own is None:
                self.notes.append(
                    f"{path} {shape}: a copy of the base's own weight, left aside; not compared with a base"
                )
            elif tuple(own.shape) != shape:
                self.problems.append(
                    f"{path} {shape}: the base has {tuple(own.shape)}; the adapter was trained on a resized embedding, "
                    "resize the base's first"
                )
            elif not torch.equal(tensor.to(own), own):
                changed = int((tensor.to(own) != own).any(dim=-1).sum())
                self.problems.append(
                    f"{path} {shape}: {changed} rows differ from the base's; the adapter was trained on a base with "
                    "another embedding. Use that base, or train the embedding through modules_to_save"
                )
            else:
                self.notes.append(f"{path} {shape}: a copy of the base's own weight, equal to it, left aside")

    # -- the configuration against the tensors -----------------------------------------------------------------------

    def _check_targets(self) -> None:
        config = self.config
        plain = {n: p for n, p in self.pairs.items() if p.kind != "experts"}
        parameters = {
            n for n in self.pairs if cfg.names_parameter(config, n) or cfg.names_parameter(config, f"{n}.weight")
        }
        omitted = [
            n
            for n in set(plain) - self.packed
            if n not in parameters and not cfg.matches(config, n) and not self._is_tied_pair(n)
        ]
        for name in sorted(omitted):
            pair = plain[name]
            self.problems.append(
                f"{name}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)} are in the file, but target_modules "
                "omits this module, so PEFT would leave them out without a word"
            )
        idle, all_of_them = cfg.idle_targets(config, plain)
        if idle and all_of_them:
            self.problems.append(f"target_modules names {', '.join(map(repr, idle))}, and there are no tensors for any")
        for entry in () if all_of_them else idle:
            # PEFT keeps names that matched nothing, as long as another did; what one of them selects in a base that is
            # given must be there (`_check_expected`).
            self.notes.append(f"target_modules names {entry!r}, and there are no tensors for it: it has no effect")
        for entry in config.target_parameters:
            if not any(n == entry or n.endswith(f".{entry}") for n in [*self.pairs, *(f"{p}.weight" for p in plain)]):
                here = not self.base.detailed or any(n == entry or n.endswith(f".{entry}") for n in self.base.shapes)
                told = self.problems if here or len(config.target_parameters) == 1 else self.notes
                told.append(f"target_parameters names {entry!r}, and there are no tensors for it")
        if self.base.detailed:
            self._check_expected()

    def _is_tied_pair(self, name: str) -> bool:
        """ensure_weight_tying gives the tied head the embedding's pair, transposed, without naming it."""
        if not self.config.tie or self.pairs[name].kind != "linear":
            return False
        twins = [p for p in self.pairs.values() if p.kind == "embedding"]
        mine = self.pairs[name]
        return any(torch.equal(mine.A, p.B.T) and torch.equal(mine.B, p.A.T) for p in twins)

    def _check_expected(self) -> None:
        """What the configuration selects in this base must all be in the file."""
        everything = self.config.target_modules == cfg.ALL_LINEAR
        guessed = self.config.target_modules is None and not self.config.target_parameters
        for name, kind in self.base.kinds.items():
            if guessed or kind == "other" or name in self.pairs or name in self.modules:
                continue
            if self.other and not self.other.concerns(name):
                continue
            if everything and (kind != "linear" or name == self.base.output_embedding):
                continue
            if cfg.matches(self.config, name):
                self.problems.append(
                    f"{name}: target_modules selects this {kind} module, and there are no tensors for it"
                )
        for module, parameters in self.base.experts.items():
            for parameter in parameters:
                full = f"{module}.{parameter}"
                if cfg.names_parameter(self.config, full) and full not in self.pairs:
                    self.problems.append(
                        f"{full}: target_parameters selects this parameter, and there are no tensors for it"
                    )
        for entry in set(self.config.modules_to_save) - set(self.config.heads):
            for name in self.base.kinds:
                inside = any(name == m or name.startswith(f"{m}.") for m in self.modules)
                if name.endswith(entry) and not inside and any(k.startswith(f"{name}.") for k in self.base.shapes):
                    self.problems.append(
                        f"{name}: modules_to_save selects this module, and there are no tensors for it"
                    )

    def _check_patterns(self) -> None:
        for key, pattern in cfg.idle_patterns(self.config, self.pairs):
            self.notes.append(f"{key} {pattern!r} matches no module of the adapter: it has no effect")

    def _check_base(self) -> None:
        """Names against a list of names; names, kinds and shapes against a model."""
        if self.base.detailed:
            found = Adapter(self.pairs, self.modules, self.token_rows, deltas=self.deltas)
            self.problems += self.base.problems(found)
        elif self.base.kinds:
            owners = {n.rpartition(".")[0] if p.kind == "experts" else n for n, p in self.pairs.items()}
            for name in sorted((owners | set(self.modules) | set(self.token_rows)) - set(self.base.kinds)):
                near = nearest(name, self.base.kinds, 1)
                self.problems.append(f"{name}: no such module in the base" + (f"; nearest: {near[0]}" if near else ""))
