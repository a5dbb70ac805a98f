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
from veneer.formats import peft_config as cfg
from veneer.formats.peft_bias import trained_biases
from veneer.formats.structure import Structure, describe

__all__ = ["EXPERT_ORDER", "PREFIX", "Base", "Loaded", "interpret"]

PREFIX = "base_model.model."
EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
EMBEDDINGS = ("embed_tokens", "lm_head")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SWAPPED_SINCE = (0, 19, 1)
"""The first PEFT that lays out 3-d parameters as above."""

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
) -> Loaded:
    """What a configuration and tensors mean together. Raises as `read` does."""
    parsed, problems = cfg.parse(config)
    reader = _Reader(parsed, describe(base) if base is not None else Structure({}), problems)
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
        card or _card_of(parsed, reader.pairs),
        rslora=parsed.rslora,
        dropout=parsed.dropout,
        deltas=reader.deltas,
    )
    return Loaded(adapter, dict(config), reader.notes)


def _card_of(config: cfg.Config, pairs: Mapping[str, Pair]) -> Card:
    targets = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules or ""]
    kind = "text" if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS") else ""
    targets = sorted({t for t in [*targets, *config.target_parameters] if t})
    return Card(base=config.base_name, kind=kind, rank=config.r, alpha=config.alpha, targets=targets)


@dataclass
class _Reader:
    """Sorts tensors into pairs, full copies and token rows, and collects every problem on the way."""

    config: cfg.Config
    base: Structure
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        sites, rest, tokens, copies = self._sort(tensors)
        modules: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(dict)
        for site, parts in sites.items():
            name = site.replace(".base_layer", "")
            modules[name][site.count(".base_layer")] = parts
        for name in sorted(modules):
            depths = modules[name]
            parameters = [] if self._is_plain(name, depths) else self._parameters(name)
            if parameters or len(depths) > 1 or 0 not in depths:
                self._experts(name, parameters, depths)
            else:
                self._pair(name, depths[0])
        self._trained_biases(copies, rest)
        self._full_modules(rest)
        self._tokens(tokens)
        self._copies(copies)
        self._check_targets()
        self._check_patterns()
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
        if ".lora_" in path:
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

    # -- experts -----------------------------------------------------------------------------------------------------

    def _parameters(self, name: str) -> list[str]:
        """The parameters of module `name` that target_parameters names, in the order PEFT wraps them."""
        leaves = {t.rpartition(".")[2] for t in self.config.target_parameters}
        found = {leaf for leaf in leaves if cfg.names_parameter(self.config, f"{name}.{leaf}")}
        if self.base.detailed:
            own = [key[len(name) + 1 :] for key in self.base.shapes if key.startswith(f"{name}.")]
            return [p for p in own if p in found]
        known = [p for p in EXPERT_ORDER if p in found]
        return known + sorted(found - set(known))

    def _experts(self, name: str, parameters: list[str], depths: dict[int, dict[str, Tensor]]) -> None:
        listed = ", ".join(
            f"{'base_layer ' * d}{part} {tuple(t.shape)}"
            for d, parts in sorted(depths.items())
            for part, t in parts.items()
        )
        if sorted(depths) != list(range(len(parameters))):
            self.problems.append(
                f"{name}: tensors for {len(depths)} parameter(s) ({listed}), "
                f"target_parameters names {len(parameters)} of this module: {', '.join(parameters) or 'none'}"
            )
            return
        if len(parameters) > 1 and not self.base.detailed and not set(parameters) <= set(EXPERT_ORDER):
            self.problems.append(f"{name}: which tensors belong to which of {parameters} depends on the base; give it")
            return
        for depth, parts in depths.items():
            parameter = parameters[len(parameters) - 1 - depth]
            if set(parts) != {"A", "B"} or any(t.ndim != 2 or 0 in t.shape for t in parts.values()):
                self.problems.append(f"{name}.{parameter}: A and B, both 2-d, are expected, there is {listed}")
            else:
                self._expert_pair(name, parameter, parts["A"], parts["B"])

    def _expert_pair(self, name: str, parameter: str, A: Tensor, B: Tensor) -> None:
        full = f"{name}.{parameter}"
        rank, source = cfg.rank_of_module(self.config, full)
        scale = scale_of(cfg.alpha_of_module(self.config, full), rank, self.config.rslora)
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
        stored = self.base.shapes.get(full)
        experts, left = divmod(A.shape[0], rank)
        plain = parameter == "weight" and experts == 1 and len(stored or (0, 0)) == 2
        known = stored is None or plain or (len(stored) == 3 and stored[0] == experts)
        if left or A.shape[0] != B.shape[1] or not known:
            of = f" and the base has {stored}" if stored else ""
            self.problems.append(f"{full}: {shapes} do not fit rank {rank} (the config's {source}) per expert{of}")
            return
        if plain:
            self.pairs[name] = Pair(A, B, scale)  # a weight named as a parameter is a linear pair
            return
        A3, B3 = A.view(experts, rank, -1), B.view(B.shape[0], rank, experts).permute(2, 0, 1)
        flip = self._is_flipped(name, full, shapes, (A.shape[1], B.shape[0]), stored)
        if flip:
            A3, B3 = B3.transpose(1, 2), A3.transpose(1, 2)
        self.pairs[full] = Pair(A3.contiguous(), B3.contiguous(), scale, "experts")

    def _is_flipped(
        self, name: str, full: str, shapes: str, got: tuple[int, int], stored: tuple[int, ...] | None
    ) -> bool:
        """Whether the file holds the pair of the transposed parameter, as PEFT before 0.19.1 wrote it: shapes decide,
        and where a square parameter lets both pass, the version that wrote the file."""
        version = self.config.version
        old = version is not None and version < SWAPPED_SINCE
        if stored is None:
            if version is None or old:
                wrote = "PEFT " + ".".join(map(str, version)) if version else "an unnamed version of PEFT"
                self.problems.append(
                    f"{full}: written by {wrote}, and versions before 0.19.1 laid out expert weights differently "
                    f"({shapes}): only the base's shapes can tell; give the base"
                )
            return False
        transposed = name in self.base.transposed
        want = stored[1:] if transposed else stored[:0:-1]
        if got not in (want, want[::-1]):
            self.problems.append(f"{full}: {shapes} fit neither way round on the base's {stored}")
        if want[0] != want[1]:
            return got != want
        if version is None:
            self.problems.append(
                f"{full}: {shapes} on a square {stored}: which layout it is cannot be told without peft_version"
            )
        return old and (not transposed or version >= (0, 19, 0))  # type: ignore[operator]

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
        for entry in sorted(set(entries) - used):
            self.problems.append(f"modules_to_save names {entry!r}, and there are no tensors for it")
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
        omitted = [n for n in plain if n not in parameters and not cfg.matches(config, n) and not self._is_tied_pair(n)]
        for name in omitted:
            pair = plain[name]
            self.problems.append(
                f"{name}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)} are in the file, but target_modules "
                "omits this module, so PEFT would leave them out without a word"
            )
        targets = config.target_modules
        entries = (
            targets if isinstance(targets, list) else [targets] if targets and targets != cfg.DUMMY_TARGETS else []
        )
        ending: dict[str, list[str]] = {}  # an entry of a list fits names that end in it: thousands of each are common
        for name in plain:
            parts = name.split(".")
            for at in range(len(parts)):
                ending.setdefault(".".join(parts[at:]), []).append(name)
        for entry in entries:
            one = [entry] if isinstance(targets, list) else None
            if not any(cfg.matches(config, n, one) for n in (ending.get(entry, []) if one else plain)):
                self.problems.append(f"target_modules names {entry!r}, and there are no tensors for it")
        for entry in config.target_parameters:
            if not any(n == entry or n.endswith(f".{entry}") for n in [*self.pairs, *(f"{p}.weight" for p in plain)]):
                self.problems.append(f"target_parameters names {entry!r}, and there are no tensors for it")
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
        for name, kind in self.base.kinds.items():
            if kind == "other" or name in self.pairs or name in self.modules:
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
        for entry in self.config.modules_to_save:
            for name in self.base.kinds:
                inside = any(name == m or name.startswith(f"{m}.") for m in self.modules)
                if name.endswith(entry) and not inside and any(k.startswith(f"{name}.") for k in self.base.shapes):
                    self.problems.append(
                        f"{name}: modules_to_save selects this module, and there are no tensors for it"
                    )

    def _check_patterns(self) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.config, key):
                if not any(cfg.regex_match(rf"(.*\.)?({pattern})$", name) for name in self.pairs):
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
