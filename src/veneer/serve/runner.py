"""One forward of the base over the tokens of many sequences, each with its mix: ids in, logits out.

Three ways, tried in this order when a base is loaded; each is believed only after it gave the logits of the base's own
forward on a probe:

    fused     families of Llama's kind (Llama, Mistral, Qwen2, Qwen3 …): a forward of our own over the base's weights,
              q, k, v and gate, up joined, norm, rotation and gate one kernel each; thin products by serve/thin.py
    packed    any family whose attention goes through transformers' interface: its own modules, every token a row,
              attention over pages; core's attachment gives each row its mix
    alone     what is left (recurrent layers, other caches): each sequence by itself with transformers' own cache

Adapters with no thin form (full copies, token rows, LoHa …) run on the second way beside the others, over the same
pages. Knows nothing of scheduling.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import kernels
from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment, attach, fit_problems
from veneer.core.merge import merged_state
from veneer.core.targets import base_modules
from veneer.errors import ResourceError
from veneer.models.speed import Join
from veneer.models.text import TextBase
from veneer.serve.matrix import Dense, Matrix, Reordered, can_pack
from veneer.serve.paged import BLOCK, PackedRows, Pages, Rotary
from veneer.serve.thin import Group, Layout, Segments, Thin, thin, thin_problems

__all__ = ["Prepared", "Row", "Runner"]

_INTERFACE = "veneer_pages"
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(eq=False)
class Prepared:
    """An adapter as this runner uses it. `thin` is None where it has no thin form."""

    key: str
    adapter: Adapter
    thin: Thin | None

    @property
    def bytes(self) -> int:
        return self.adapter.size_bytes() if self.thin is None else self.thin.bytes


@dataclass(frozen=True, eq=False)
class Row:
    """Some tokens of one sequence: from position `first` on, into `blocks`. `wants`: the logits after the last of them.
    `sequence`: which one, for bases that keep each sequence's state by itself."""

    tokens: Sequence[int]
    first: int
    blocks: Sequence[int]
    mix: Sequence[tuple[Prepared, float]] = ()
    wants: bool = True
    sequence: int = 0


class Runner:
    """A base made ready to serve. `cache_bytes`: memory for keys and values; `pack_bytes`: what a second copy of the
    projections may take, in the order they are multiplied in. `context`: tokens a sequence may have.

    `how` and `why`: the way that was taken. `shares`: whether sequences can share blocks. Close it to put the base back
    as it was."""

    def __init__(self, base: TextBase, *, cache_bytes: int = 1 << 30, pack_bytes: int = 4 << 30) -> None:
        self.pack_bytes = pack_bytes
        self.base = base
        self.model: Any = base.model
        self._undo = ExitStack()
        self._attachment: Attachment | None = None
        config: Any = self.model.config.get_text_config()
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        d = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers = config.num_hidden_layers
        self.layout = _layout(base)
        self.context = min(base.context, cache_bytes // Pages.bytes_of_a_block(layers, kv, d, base.dtype) * BLOCK)
        size = Pages.bytes_of_a_block(layers, kv, d, base.dtype)
        self.blocks = cache_bytes // size
        if self.blocks < 2:
            raise ResourceError(
                f"a cache of {cache_bytes / 1e6:.1f} MB holds {self.blocks} blocks of {BLOCK} tokens ({size:,} bytes)",
                fix="give it more memory",
            )
        self.pages = Pages(layers, self.blocks, heads, kv, d, base.dtype, base.device)
        self._segments: Segments | None = None
        self._plan: _Plan | None = None
        self._merged: _Merged | None = None
        self._attached: dict[str, weakref.ref[Prepared]] = {}
        self._pasts: dict[int, Any] = {}
        self.how, self.why = self._choose()
        self.shares = self.how != "alone"

    def close(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._merged = None
        self._undo.close()

    # -- adapters ------------------------------------------------------------------------------------------------------

    def problems(self, adapter: Adapter) -> list[str]:
        """Why an adapter cannot be served on this base with full effect, one line each."""
        return fit_problems(self.model, adapter)

    def prepare(self, adapter: Adapter, key: str) -> Prepared:
        """Make an adapter without `problems` ready; may be called from any thread."""
        fits = self._plan is not None and not thin_problems(adapter, self.layout)
        return Prepared(key, adapter, thin(adapter, self.layout, key) if fits else None)

    def tidy(self) -> None:
        """Let go of adapters that nobody has any more: of what was merged, and of the attachment's."""
        if self._merged is not None and any(ref() is None for ref in self._merged.adapters):
            self._merged = None
        for key in [k for k, ref in self._attached.items() if ref() is None]:
            del self._attached[key]
            assert self._attachment is not None
            self._attachment.remove(key)

    # -- merged --------------------------------------------------------------------------------------------------------

    def merged_bytes(self) -> int:
        return 0 if self._plan is None else sum(w.nbytes for g in self.layout.groups for w in g.weights)

    @torch.no_grad()
    def merge(self, mix: Sequence[tuple[Prepared, float]]) -> None:
        """Keep a second set of weights with `mix` folded in, used by steps in which every row has it. The base's own
        are not touched. From any thread."""
        if self._plan is None or any(p.thin is None for p, _ in mix):
            return
        made = merged_state(self.model, tuple((p.adapter, s) for p, s in mix))
        own: dict[str, Any] = dict(base_modules(self.model))

        def weight(name: str) -> Tensor:
            new = made.get(f"{name}.weight")
            return own[name].weight.detach() if new is None else new.to(self.base.dtype)

        packs = can_pack(self.base.dtype, self.base.device)

        def joined(names: tuple[str, ...]) -> Matrix:
            whole = torch.cat([weight(n) for n in names])
            return Reordered.of(whole) if packs else Dense(whole)

        embedding = weight(self.layout.embedding)
        plan = _plan_of(self.base, self.layout, joined, embedding, self.context)
        self._merged = _Merged(_key(mix), plan, [weakref.ref(p) for p, _ in mix])

    def unmerge(self) -> None:
        self._merged = None

    @property
    def merged(self) -> tuple[tuple[str, float], ...] | None:
        return None if self._merged is None else self._merged.mix

    # -- running -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """Logits (rows that want them, vocabulary), in the order of the rows."""
        if self.how == "alone":
            return torch.stack([logits for row in rows if (logits := self._alone(row)) is not None] or [torch.empty(0)])
        thick = [any(p.thin is None for p, _ in row.mix) for row in rows]
        if self._plan is None or all(thick):
            return self._packed(rows)
        if not any(thick):
            return self._fused(rows)
        parts = {True: iter(()), False: iter(())}
        for kind, way in ((False, self._fused), (True, self._packed)):
            parts[kind] = iter(way([row for row, t in zip(rows, thick, strict=True) if t == kind]))  # type: ignore[assignment]
        return torch.stack(
            [next(parts[t]) for row, t in zip(rows, thick, strict=True) if row.wants] or [torch.empty(0)]
        )

    def forget(self, sequence: int) -> None:
        """A sequence has ended, or begins again."""
        self._pasts.pop(sequence, None)

    def _fused(self, rows: Sequence[Row]) -> Tensor:
        plan, mixes = self._plan, [row.mix for row in rows]
        assert plan is not None
        if (merged := self._merged) is not None and all(_key(mix) == merged.mix for mix in mixes):
            plan, mixes = merged.plan, [() for _ in rows]
        batch, ids = self._batch(rows)
        spans = [
            (a, b, [(p.thin, s) for p, s in mix])
            for a, b, mix in zip(batch.bounds, batch.bounds[1:], mixes, strict=False)
            if mix
        ]
        segments = Segments.of(self.layout, spans, self._segments) if spans else None  # type: ignore[arg-type]
        self._segments = segments or self._segments
        hidden = plan.hidden(ids, batch, segments, self.pages)
        kept = [i for i, row in enumerate(rows) if row.wants]
        x = hidden[torch.tensor([batch.bounds[i + 1] - 1 for i in kept], dtype=torch.int64, device=ids.device)]
        head = len(self.layout.groups) - 1
        if segments is not None and any(head in a.groups for a in segments.adapters):
            last = [(j, j + 1, [(p.thin, s) for p, s in mixes[i]]) for j, i in enumerate(kept)]
            segments = Segments.of(self.layout, last)  # type: ignore[arg-type]
        else:
            segments = None
        return plan.logits(x, segments)

    def _batch(self, rows: Sequence[Row]) -> tuple[PackedRows, Tensor]:
        batch = PackedRows.of([(r.first, r.first + len(r.tokens), r.blocks) for r in rows], self.base.device)
        return batch, torch.tensor([t for r in rows for t in r.tokens], device=self.base.device)

    def _packed(self, rows: Sequence[Row]) -> Tensor:
        """Fused experts see the tokens of all rows together: rows whose mixes differ there go one mix after another."""
        apart: dict[tuple[tuple[str, float], ...], list[int]] = {
            _key(row.mix): [] for row in rows if any(_has_experts(p.adapter) for p, _ in row.mix)
        }
        if not apart:
            return self._packed_together(rows)
        for i, row in enumerate(rows):
            apart.setdefault(_key(row.mix) if _key(row.mix) in apart else (), []).append(i)
        out: list[Tensor | None] = [None] * len(rows)
        for own in apart.values():
            logits = iter(self._packed_together([rows[i] for i in own]))
            for i in own:
                out[i] = next(logits) if rows[i].wants else None
        wanted = [o for o in out if o is not None]
        return torch.stack(wanted) if wanted else torch.empty(0)

    def _packed_together(self, rows: Sequence[Row]) -> Tensor:
        batch, ids = self._batch(rows)
        self._use([(row.mix, len(row.tokens)) for row in rows])
        try:
            with _during(_Call(self.pages, batch)):
                out = self.model(input_ids=ids[:, None], position_ids=batch.positions[:, None], use_cache=False)
        finally:
            if self._attachment is not None:
                self._attachment.use()
        logits: Tensor = out.logits[:, 0]
        kept = [batch.bounds[i + 1] - 1 for i, row in enumerate(rows) if row.wants]
        return logits[torch.tensor(kept, dtype=torch.int64, device=ids.device)]

    def _alone(self, row: Row) -> Tensor | None:
        from transformers import DynamicCache

        if row.first == 0:
            self._pasts[row.sequence] = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(row.tokens)], device=self.base.device)
        positions = torch.arange(row.first, row.first + len(row.tokens), device=self.base.device)[None]
        self._use([(row.mix, 1)])
        try:
            out = self.model(
                input_ids=ids, position_ids=positions, cache=self._pasts[row.sequence], use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        finally:
            if self._attachment is not None:
                self._attachment.use()
        return out.logits[0, -1] if row.wants else None

    def _use(self, mixes: Sequence[tuple[Sequence[tuple[Prepared, float]], int]]) -> None:
        acting = {p.key: p for mix, _ in mixes for p, _ in mix}
        self.tidy()
        if not acting:
            return
        if self._attachment is None:
            self._attachment = attach(self.model)
        for key, prepared in acting.items():
            if key not in self._attached:
                self._attachment.add(key, prepared.adapter)
                self._attached[key] = weakref.ref(prepared)
        named = [([(p.key, s) for p, s in mix], n) for mix, n in mixes]
        if all(mix == named[0][0] for mix, _ in named):
            self._attachment.use(*named[0][0])
        else:
            self._attachment.use_rows([mix for mix, n in named for _ in range(n)])

    # -- which way -----------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[str, str]:
        ways: list[tuple[str, Callable[[], None]]] = [("fused", self._make_fused), ("packed", self._make_packed)]
        why = ""
        wanted = self._wanted()
        for name, make in ways:
            with ExitStack() as attempt:
                self._undo, kept = attempt, self._undo
                try:
                    make()
                    self.how = name
                    problem = "its logits differ from the base's own" if not self._agrees(wanted) else ""
                except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
                    problem = f"{type(error).__name__}: {error}".splitlines()[0]
                finally:
                    self._undo = kept
                if not problem:
                    self._undo.push(attempt.pop_all())
                    if name == "fused":  # adapters with no thin form need the second way too
                        self._make_packed()
                    return name, why
                self._plan = None
                why += f"{'; ' if why else ''}not {name} ({problem})"
        return "alone", why

    @torch.no_grad()
    def _wanted(self) -> list[Tensor]:
        """The base's own logits after two sequences, computed whole."""
        return [
            self.model(input_ids=torch.tensor([ids], device=self.base.device)).logits[0, -1] for ids in self._probes()
        ]

    def _probes(self) -> list[list[int]]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(min(3, vocabulary - 1), vocabulary, (n,), generator=generator).tolist() for n in (19, 37)]

    def _agrees(self, wanted: list[Tensor]) -> bool:
        """In pieces of different length, so that keys and values come from the pages, as in serving."""
        probes, eps = self._probes(), torch.finfo(self.base.dtype).eps
        cuts = [[0, 5, 18, 19], [0, 16, 36, 37]]
        needs = sum(-(-len(p) // BLOCK) for p in probes)
        if self.blocks < needs:
            return False
        for step in range(3):
            rows = [
                Row(p[c[step] : c[step + 1]], c[step], [0, 1] if i == 0 else [2, 3, 4], wants=step == 2)
                for i, (p, c) in enumerate(zip(probes, cuts, strict=True))
            ]
            got = self.run(rows)
        return all(
            bool((g.double() - w.double()).norm() <= 16 * eps * w.double().norm())
            for g, w in zip(got, wanted, strict=True)
        )

    def _make_fused(self) -> None:
        modules: dict[str, Any] = dict(base_modules(self.model))
        weights = [w for g in self.layout.groups for w in g.weights]
        packs = can_pack(self.base.dtype, self.base.device) and sum(w.nbytes for w in weights) <= self.pack_bytes

        def joined(names: tuple[str, ...]) -> Matrix:
            parts = [modules[n] for n in names]
            if packs:
                made = Reordered.of(torch.cat([m.weight.detach() for m in parts]))
                for module in parts:  # they are read again only by adapters with no thin form
                    kernels.page_out(module.weight.detach())
                return made
            weight = Join(parts, self._undo).weight if len(parts) > 1 else parts[0].weight.detach()
            if weight is None:
                raise NotImplementedError(f"{', '.join(names)} cannot be joined")
            return Dense(weight)

        self._plan = _plan_of(
            self.base, self.layout, joined, self.model.get_input_embeddings().weight.detach(), self.context
        )

    def _make_packed(self) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _static_positions(self.model.config.get_text_config())
        ALL_ATTENTION_FUNCTIONS.register(_INTERFACE, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_INTERFACE, lambda *args, **kwargs: None)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(_INTERFACE)
        change: Any = self.model.set_attn_implementation
        self._undo.callback(change, before)


def _has_experts(adapter: Adapter) -> bool:
    return any(p.kind == "experts" for p in adapter.pairs.values())


def _key(mix: Sequence[tuple[Prepared, float]]) -> tuple[tuple[str, float], ...]:
    return tuple((p.key, s) for p, s in mix)


# -- fused -------------------------------------------------------------------------------------------------------------

Weights = Callable[[tuple[str, ...]], Matrix]
"""The weights of some linear modules, below one another, by the modules' names."""


@dataclass(frozen=True, eq=False)
class _Block:
    """One layer; `window` 0 for none."""

    norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    rotary: Rotary
    out: Matrix
    out_bias: Tensor | None
    norm_after: Tensor
    gate_up: Matrix
    down: Matrix
    window: int


@dataclass(frozen=True, eq=False)
class _Plan:
    """A base of Llama's kind as tensors. Its layout's groups: qkv, o, gate-up, down of each layer, then the head."""

    embedding: Tensor
    blocks: list[_Block]
    norm: Tensor
    head: Matrix
    head_bias: Tensor | None
    eps: float
    scale: float

    def hidden(self, ids: Tensor, batch: PackedRows, segments: Segments | None, pages: Pages) -> Tensor:
        """The normed output of the last layer, (tokens, dim)."""
        x = F.embedding(ids, self.embedding)
        if segments is not None:
            segments.embed(ids, x)
        for i, block in enumerate(self.blocks):
            h = _rms_norm(x, block.norm, self.eps)
            qkv = block.qkv(h, block.qkv_bias)
            if segments is not None:
                segments.add(4 * i, h, qkv)
            pages.turn_and_store(i, qkv, block.rotary, batch)
            attended = pages.attend(i, qkv, batch, self.scale, window=block.window)
            _add_onto(x, attended, block.out, block.out_bias, segments, 4 * i + 1)
            h = _rms_norm(x, block.norm_after, self.eps)
            both = block.gate_up(h)
            if segments is not None:
                segments.add(4 * i + 2, h, both)
            _add_onto(x, _silu_gate(both), block.down, None, segments, 4 * i + 3)
        return _rms_norm(x, self.norm, self.eps)

    def logits(self, x: Tensor, segments: Segments | None) -> Tensor:
        out = self.head(x, self.head_bias)
        if segments is not None:
            segments.add(4 * len(self.blocks), x, out)
        return out


def _layout(base: TextBase) -> Layout:
    """The groups of a base of Llama's kind; none for another."""
    model: Any = base.model
    groups: list[Group] = []
    modules: dict[str, Any] = dict(base_modules(model))
    embedding = next((n for n, m in modules.items() if m is model.get_input_embeddings()), "")

    def group(at: str, *choices: tuple[str, ...]) -> None:
        names = next(c for c in choices if all(f"{at}{n}" in modules for n in c))
        parts = [modules[f"{at}{n}"] for n in names]
        if any(type(m) is not nn.Linear for m in parts):
            raise StopIteration
        weights = tuple(m.weight.detach() for m in parts)
        groups.append(Group(tuple(f"{at}{n}" for n in names), weights, tuple(m.bias for m in parts)))

    try:
        for i in range(model.config.get_text_config().num_hidden_layers):
            at = f"model.layers.{i}."
            group(f"{at}self_attn.", ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
            group(f"{at}self_attn.", ("o_proj",))
            group(f"{at}mlp.", ("gate_proj", "up_proj"), ("gate_up_proj",))
            group(f"{at}mlp.", ("down_proj",))
        group("", ("lm_head",))
    except StopIteration:
        groups = []
    return Layout(tuple(groups), embedding, base.dtype, base.device)


def _plan_of(base: TextBase, layout: Layout, weights: Weights, embedding: Tensor, context: int) -> _Plan:
    """Raises NotImplementedError where the base is of another kind; whether it is of this one, a probe tells."""
    root: Any = base.model.model
    config: Any = base.model.config.get_text_config()
    if not layout.groups:
        raise NotImplementedError("its layers are not Llama's")
    if config.hidden_act not in ("silu", "swish"):
        raise NotImplementedError(f"its gate is {config.hidden_act}")
    _static_positions(config)
    probe = torch.zeros(1, dtype=torch.float32, device=base.device)
    cos, sin = root.rotary_emb(probe, torch.arange(context, device=base.device)[None])
    cos, sin = (t[0, :, : t.shape[-1] // 2].float().contiguous() for t in (cos, sin))
    blocks = []
    for i, layer in enumerate(root.layers):
        qkv, out, gate_up, down = layout.groups[4 * i : 4 * i + 4]
        own = layer.self_attn
        q_norm, k_norm = (getattr(own, n).weight.detach() if hasattr(own, n) else None for n in ("q_norm", "k_norm"))
        rotary = Rotary(cos, sin, q_norm, k_norm, config.rms_norm_eps)
        bias = None
        if any(b is not None for b in qkv.biases):
            parts = zip(qkv.weights, qkv.biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts]).detach()
        if any(b is not None for g in (gate_up, down) for b in g.biases):
            raise NotImplementedError("its MLP has biases")
        window = getattr(own, "sliding_window", getattr(config, "sliding_window", None)) or 0
        blocks.append(
            _Block(
                layer.input_layernorm.weight.detach(), weights(qkv.modules), bias, rotary, weights(out.modules),
                out.biases[0], layer.post_attention_layernorm.weight.detach(), weights(gate_up.modules),
                weights(down.modules), window,
            )
        )  # fmt: skip
    head, norm = layout.groups[-1], root.norm.weight.detach()
    scale = root.layers[0].self_attn.scaling
    return _Plan(embedding, blocks, norm, weights(head.modules), head.biases[0], config.rms_norm_eps, scale)


@dataclass(frozen=True, eq=False)
class _Merged:
    mix: tuple[tuple[str, float], ...]
    plan: _Plan
    adapters: list[weakref.ref[Prepared]]


def _add_onto(x: Tensor, h: Tensor, matrix: Matrix, bias: Tensor | None, segments: Segments | None, g: int) -> None:
    """x += h·Wᵀ + b and its thin products, in place."""
    if segments is not None and segments.gained(g):  # DoRA needs the base's product by itself
        y = matrix(h, bias)
        segments.add(g, h, y)
        x.add_(y)
        return
    matrix.add_onto(x, h)
    if bias is not None:
        x.add_(bias)
    if segments is not None:
        segments.add(g, h, x)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    native = kernels.usable(x, weight)
    if native is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    y = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(x), x.shape[-1], eps, torch.get_num_threads())
    return y


def _silu_gate(both: Tensor) -> Tensor:
    """silu(gate) ⊙ up of (rows, 2 f)."""
    native = kernels.usable(both)
    if native is None:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up
    h = both.new_empty(len(both), both.shape[-1] // 2)
    native.silu_gate(both.data_ptr(), h.data_ptr(), len(h), h.shape[-1], torch.get_num_threads())
    return h


# -- packed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    pages: Pages
    batch: PackedRows


class _Now(threading.local):
    call: _Call | None = None


_now = _Now()


@contextmanager
def _during(call: _Call) -> Iterator[None]:
    _now.call = call
    try:
        yield
    finally:
        _now.call = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, every token a row: query (tokens, heads, 1, d). Outside of a Runner's call it
    is torch's own."""
    call = _now.call
    if call is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        own: Tensor
        own, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return own, None
    pages, batch = call.pages, call.batch
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with sinks")
    if query.shape[2] != 1 or query.shape[1] != pages.heads or key.shape[1:] != (pages.kv, 1, pages.d):
        raise NotImplementedError(f"attention over {tuple(query.shape)} and {tuple(key.shape)}")
    pages.store(module.layer_idx, key[:, :, 0], value[:, :, 0], batch)
    scale = kwargs.get("scaling")
    out = pages.attend(
        module.layer_idx, query[:, :, 0].flatten(1).contiguous(), batch, pages.d**-0.5 if scale is None else scale,
        cap=kwargs.get("softcap") or 0.0, window=kwargs.get("sliding_window") or 0,
    )  # fmt: skip
    return out.view(len(out), 1, pages.heads, pages.d), None


def _static_positions(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise NotImplementedError(f"{rope} positions depend on the longest sequence")
