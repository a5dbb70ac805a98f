"""One forward pass of the base over the tokens of many sequences, each with its mix: ids in, logits out.

Three execution paths, tried in this order when a base is loaded. A path is accepted only if it reproduces the
logits of the base's own forward pass on a probe, token by token (models/text/probe.py):

    fused   Llama-like families (Llama, Mistral, Qwen2, Qwen3 …): veneer's forward pass over the base's
            weights, with q, k, v and gate, up fused, all layers in one compiled call if possible, and
            adapters through `lowrank`
    packed  families whose attention goes through transformers' interface: the base's own modules, every token
            a row, attention over pages; core's attachment applies each row's mix
    alone   other families (recurrent layers, other caches): one sequence at a time with transformers' own cache

On a fused base, rows with an adapter that has no low-rank form (full copies, token rows, LoHa …) run on the
packed path in the same step, over the same pages. The runner does not depend on scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment, attach, fit_problems
from veneer.core.targets import base_modules
from veneer.errors import ConfigError, ResourceError
from veneer.models.config import layer_heads
from veneer.models.patching import FusedProjection
from veneer.models.text.attention import AttentionSettings, attending, divert_attention, new_cache
from veneer.models.text.base import TextBase
from veneer.models.text.fast import route_experts
from veneer.models.text.probe import LENGTHS, WINDOW, ReferenceForward, short_windows
from veneer.ops.cpu import memory
from veneer.ops.cpu.sharing import shared
from veneer.ops.device_transfer import put_numbers
from veneer.ops.int8 import Int8Weight
from veneer.ops.quantized import Quantized
from veneer.ops.weight_layouts import Dense, PrepackedWeight, packing, prepack_weight
from veneer.ops.weight_panels import panels_here, panels_of_codes
from veneer.serve.forward.llama import LlamaForward, layout_of, llama_forward, static_positions
from veneer.serve.forward.lowrank import AdapterBatch, PackedAdapter, low_rank_problems, pack_adapter
from veneer.serve.forward.paged import BLOCK, PackedRows, Pages
from veneer.serve.forward.weights import ROWS, EightBits, QuantizedWeights


@dataclass(eq=False)
class Prepared:
    """An adapter prepared for this runner. `packed`: None if it has no low-rank form."""

    key: str
    adapter: Adapter
    packed: PackedAdapter | None

    @property
    def bytes(self) -> int:
        return self.adapter.size_bytes() + (0 if self.packed is None else self.packed.bytes)


@dataclass(frozen=True, eq=False)
class RunnerRow:
    """Tokens of one sequence, from position `first` on, stored in `blocks`.

    `wants`: number of tokens at the end whose logits are needed. `sequence`: the sequence's id, for bases
    with per-sequence state.
    """

    tokens: Sequence[int]
    first: int
    blocks: Sequence[int]
    mix: Sequence[tuple[Prepared, float]] = ()
    wants: int = 1
    sequence: int = 0


INT8_ROWS = 64
"""Minimum tokens of a row that runs in 8 bits. With fewer tokens, packing the weights takes longer than 8 bits save."""
PACK_BYTES = 4 << 30
"""Maximum bytes of a prepacked second copy of the projections."""


def block_bytes(base: TextBase) -> int:
    """Return the size of a cache block in bytes: keys and values of BLOCK tokens in every layer."""
    heads = layer_heads(base.model.config.get_text_config())
    return sum(2 * kv * d * BLOCK * base.dtype.itemsize for _, kv, d in heads)


class Runner:
    """A base prepared for serving.

    `cache_bytes`: memory for keys and values. `pack_bytes`: maximum bytes of a prepacked second copy of the
    projections. `context`: tokens per sequence, 0 for as many as the base and the cache allow; families with
    chunked attention run packed only if a context fits in one chunk. `batch_invariant`: a completion's bits
    do not depend on the other rows of its steps or on how its prompt is chunked, at some cost in speed;
    requires a Llama-like base and adapters with a low-rank form. `int8`: rows of INT8_ROWS tokens or more use
    8-bit copies of the layers' weights (ops/int8.py), unless an adapter of the row has no low-rank form; requires
    a Llama-like base on a CPU whose weights are not quantized.

    For a quantized Llama-like base in bfloat16, the codes are moved into the layout of the compiled step, and
    the model reads them from there. Other quantized weights stay as they are and are dequantized for each
    product.

    `how` and `why`: the selected path, and why earlier paths were rejected. `llama`: the base as tensors if
    `how` is "fused", otherwise None. `pages`: keys and values, one `Pages` for each shape of attention heads.
    `shares`: whether sequences can share blocks. `close` restores the base.
    """

    def __init__(
        self,
        base: TextBase,
        *,
        cache_bytes: int = 1 << 30,
        pack_bytes: int = PACK_BYTES,
        batch_invariant: bool = False,
        int8: bool = False,
        context: int = 0,
    ) -> None:
        self.pack_bytes, self.batch_invariant = pack_bytes, batch_invariant
        self.base = base
        self.model: Any = base.model
        self._undo, self._second = ExitStack(), ExitStack()
        self._attachment: Attachment | None = None
        self.layout = layout_of(base)
        if batch_invariant:
            self.layout = replace(self.layout, rows=ROWS)
        size = block_bytes(base)
        self.blocks = cache_bytes // size
        self.context = min(base.context, self.blocks * BLOCK, context or base.context)
        if self.blocks < 2:
            raise ResourceError(
                f"a cache of {cache_bytes / 1e6:.1f} MB holds {self.blocks} blocks of {BLOCK} tokens ({size:,} bytes)",
                fix="give the cache more memory",
            )
        shapes = layer_heads(self.model.config.get_text_config())
        pages = {
            shape: Pages(shapes.count(shape), self.blocks, *shape, base.dtype, base.device)
            for shape in dict.fromkeys(shapes)
        }
        self.pages = tuple(pages.values())
        for page in self.pages:
            page.tiles = batch_invariant
        self._layer_pages = [(pages[shape], shapes[:i].count(shape)) for i, shape in enumerate(shapes)]
        self.llama: LlamaForward | None = None
        self._eight: LlamaForward | None = None
        self._weights: dict[tuple[str, ...], PrepackedWeight] = {}  # names of fused modules -> weight on the fused path
        self._pasts: dict[int, Any] = {}
        self._attended: set[int] = set()
        self.how, self.why = self._choose()
        self.shares = self.how != "alone"
        if batch_invariant and self.how != "fused":
            self.close()
            raise ConfigError(
                f"batch-invariant answers need a base of the Llama architecture; this one runs {self.how}: {self.why}",
                fix="serve it without --batch-invariant",
            )
        if int8:
            self._eight = self._with_int8()

    def close(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._undo.close()

    # -- adapters ------------------------------------------------------------------------------------------------------

    def problems(self, adapter: Adapter) -> list[str]:
        """Return the reasons why an adapter cannot be served in full, one line each."""
        out = fit_problems(self.model, adapter)
        if not out and self.batch_invariant:
            out = [
                f"{p}, which a batch-invariant base does not support" for p in low_rank_problems(adapter, self.layout)
            ]
        return out

    def prepare(self, adapter: Adapter, key: str) -> Prepared:
        """Prepare an adapter that has no `problems`. Thread-safe."""
        fits = self.llama is not None and not low_rank_problems(adapter, self.layout)
        if fits:
            return Prepared(key, adapter, pack_adapter(adapter, self.layout, key))
        return Prepared(key, adapter if self.base.device.type == "cpu" else self._on_device(adapter), None)

    def _on_device(self, adapter: Adapter) -> Adapter:
        """Return the adapter on the base's device, with plain pairs in the base's dtype.

        The first step with an adapter then does not wait for copies, and its products do not run in float32.
        """
        device, dtype = self.base.device, self.base.dtype
        pairs = {
            name: replace(pair, A=pair.A.to(device, dtype), B=pair.B.to(device, dtype))
            for name, pair in adapter.pairs.items()
            if pair.magnitude is None and pair.origin is None
        }
        return replace(adapter, pairs={**adapter.pairs, **pairs}).mapped(lambda t: t.to(device))

    @property
    def attached(self) -> frozenset[str]:
        """Keys of the adapters attached to the model.

        These are the adapters without a low-rank form, or all adapters if the base is not fused."""
        return frozenset() if self._attachment is None else frozenset(self._attachment.adapters)

    def drop(self, key: str) -> None:
        """Drop everything derived from an evicted adapter. Call between steps."""
        if self._attachment is not None and key in self._attachment.adapters:
            self._attachment.remove(key)

    # -- running -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @shared()
    def run(self, rows: Sequence[RunnerRow]) -> Tensor:
        """Return logits (Σ wants, vocabulary), in the order of rows and tokens.

        The next call can overwrite them."""
        if self.how == "alone":
            return torch.cat([self._alone(row) for row in rows])
        llamas = [self._llama_for(row) for row in rows]
        if all(llama is llamas[0] for llama in llamas):
            return self._forward(rows, llamas[0])
        parts = {
            llama: iter(self._forward([r for r, own in zip(rows, llamas, strict=True) if own is llama], llama))
            for llama in dict.fromkeys(llamas)
        }
        logits = [next(parts[llama]) for row, llama in zip(rows, llamas, strict=True) for _ in range(row.wants)]
        return torch.stack(logits) if logits else torch.empty(0)

    def _llama_for(self, row: RunnerRow) -> LlamaForward | None:
        """Return the tensors that compute a row, or None for the packed path.

        The choice depends only on the row, so other rows of a step do not change a row's result."""
        if any(p.packed is None for p, _ in row.mix):
            return None
        return self.llama if self._eight is None or len(row.tokens) < INT8_ROWS else self._eight

    def _forward(self, rows: Sequence[RunnerRow], llama: LlamaForward | None) -> Tensor:
        return self._packed(rows) if llama is None else self._fused(rows, llama)

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in all layers."""
        for pages in self.pages:
            for part in (pages.K, pages.V):
                blocks = part if pages.native is not None else part.unflatten(1, (-1, BLOCK))
                blocks[:, target] = blocks[:, source]

    def forget(self, sequence: int) -> None:
        """Drop the state of a sequence that has ended or restarts."""
        self._pasts.pop(sequence, None)

    def _fused(self, rows: Sequence[RunnerRow], llama: LlamaForward) -> Tensor:
        mixes = [row.mix for row in rows]
        batch, ids = self._batch(rows)
        spans = [
            (a, b, [(p.packed, s) for p, s in mix])
            for a, b, mix in zip(batch.bounds, batch.bounds[1:], mixes, strict=False)
            if mix
        ]
        segments = AdapterBatch.build(self.layout, spans)  # type: ignore[arg-type]
        hidden = llama.hidden(ids, batch, segments)
        row_indices = [i for i, row in enumerate(rows) for _ in range(row.wants)]
        x = hidden[_logit_indices(rows, batch)]
        head = len(self.layout.groups) - 1
        if segments is not None and any(head in a.groups for a in segments.adapters):
            last = [(j, j + 1, [(p.packed, s) for p, s in mixes[i]]) for j, i in enumerate(row_indices)]
            segments = AdapterBatch.build(self.layout, last)  # type: ignore[arg-type]
        else:
            segments = None
        return llama.logits(x, segments)

    def _batch(self, rows: Sequence[RunnerRow]) -> tuple[PackedRows, Tensor]:
        batch = PackedRows.build([(r.first, r.first + len(r.tokens), r.blocks) for r in rows], self.base.device)
        return batch, put_numbers(self.base.device, [t for r in rows for t in r.tokens])[0]

    def _packed(self, rows: Sequence[RunnerRow]) -> Tensor:
        """Run the model with every token as a row.

        Every module, including fused experts, then has a mix per token."""
        batch, ids = self._batch(rows)
        with self._using([(row.mix, len(row.tokens)) for row in rows]), attending(partial(self._attend, batch)):
            out = self.model(input_ids=ids[:, None], position_ids=batch.positions[:, None], use_cache=False)
        logits: Tensor = out.logits[:, 0]
        return logits[_logit_indices(rows, batch)]

    def _alone(self, row: RunnerRow) -> Tensor:
        if row.first == 0:
            self._pasts[row.sequence] = new_cache(self.model)
        ids = torch.tensor([list(row.tokens)], device=self.base.device)
        positions = torch.arange(row.first, row.first + len(row.tokens), device=self.base.device)[None]
        with self._using([(row.mix, 1)]):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                cache=self._pasts[row.sequence],
                use_cache=True,
                logits_to_keep=max(row.wants, 1),  # 0 would compute the logits of all tokens
            )
        logits: Tensor = out.logits[0]
        return logits[len(logits) - row.wants :]

    @contextmanager
    def _using(self, mixes: Sequence[tuple[Sequence[tuple[Prepared, float]], int]]) -> Iterator[None]:
        """Use core's attachment inside the block. `mixes`: (mix, number of tokens) for each span."""
        acting = {p.key: p for mix, _ in mixes for p, _ in mix}
        if not acting:
            yield
            return
        if self._attachment is None:
            self._attachment = attach(self.model)
            if self.base.device.type != "cpu":  # caching the weights of mixes would exceed the memory limits
                self._attachment.cache.limit = 0
        for key, prepared in acting.items():
            if key not in self._attachment.adapters:
                self._attachment.add(key, prepared.adapter, finite=True)  # `problems` has checked the adapter
        named = [([(p.key, s) for p, s in mix], n) for mix, n in mixes]
        if all(mix == named[0][0] for mix, _ in named):
            self._attachment.use(*named[0][0])
        else:
            self._attachment.use_rows([mix for mix, n in named for _ in range(n)])
        try:
            yield
        finally:
            self._attachment.use()

    # -- selecting the path --------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[str, str]:
        paths: list[tuple[str, Callable[[], None]]] = [("fused", self._make_fused), ("packed", self._make_packed)]
        why = ""
        try:
            reference = ReferenceForward.compute(self.model)
        except _UNFIT as error:
            return "alone", f"its own forward does not accept batches ({_first_line(error)})"
        for name, make_path in paths:
            with ExitStack() as attempt:
                self._undo, outer = attempt, self._undo
                self.how = trying = name
                try:
                    make_path()
                    problem = self._problem(reference)
                    if not problem and name == "fused":
                        if not self.batch_invariant:  # adapters without a low-rank form also need the packed path
                            self._make_packed()
                        trying = "fused with quantized codes"
                        problem = self._problem(reference) if self._lay_codes() else ""
                except _UNFIT as error:
                    problem = _first_line(error)
                finally:
                    self._undo = outer
                if not problem:
                    self._undo.push(attempt.pop_all())
                    return name, why
                self.llama = None
                self._weights.clear()
                why += f"{'; ' if why else ''}not {trying} ({problem})"
        return "alone", why

    def _problem(self, reference: ReferenceForward) -> str:
        """Return how the logits differ from the base's own, or "".

        Runs the probe in chunks of different lengths, so that keys and values are read from the pages. Each
        row's last token runs separately, as in serving.
        """
        rows, blocks, used = reference.ids.split(LENGTHS), [], 0
        for n in LENGTHS:
            blocks.append(list(range(used, used := used - (-n // BLOCK))))
        if self.blocks < used:
            return f"a cache of {self.blocks} blocks is too small for the probe"
        starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
        parts, positions, llama = [], [], self.llama
        if llama is not None:
            self.llama = llama.with_windows(WINDOW)
        with short_windows(self.model):
            for step in range(3):
                ends = [(0, n // 4, n - 1, n)[step : step + 2] for n in LENGTHS]
                pieces = [(i, a, b) for i, (a, b) in enumerate(ends) if b > a]
                parts.append(
                    self.run([RunnerRow(rows[i][a:b].tolist(), a, blocks[i], (), b - a) for i, a, b in pieces])
                )
                positions += [starts[i] + t for i, a, b in pieces for t in range(a, b)]
        self.llama = llama
        layers = self.model.config.get_text_config().num_hidden_layers
        if llama is None and len(self._attended) < layers:  # layers without attention keep a state of their own
            return f"{layers - len(self._attended)} of its {layers} layers have no attention"
        got, at = torch.cat(parts), torch.tensor(positions, device=reference.ids.device)
        if problem := reference.logits_problem(got, at):
            return problem
        # The comparison tolerates differences at single tokens, because rounding can change the choice of
        # experts. So also compare the rows' last tokens together.
        last = torch.isin(at, torch.tensor([*starts[1:], sum(LENGTHS)], device=at.device) - 1)
        return "" if reference.rows_agree(got[last], at[last]) else "its logits differ from the base's own"

    def _make_fused(self) -> None:
        modules: dict[str, Any] = dict(base_modules(self.model))
        weights = (group.weight(i) for group in self.layout.groups for i in range(len(group.modules)))
        plain_bytes = sum(weight.nbytes for weight in weights if not isinstance(weight, Quantized))
        packs = plain_bytes <= self.pack_bytes and packing(self.base.dtype, self.base.device) is not Dense

        def joined(names: tuple[str, ...]) -> PrepackedWeight:
            parts = [modules[n] for n in names]
            weights = tuple(m.weight.detach() for m in parts)
            if any(isinstance(w, Quantized) for w in weights):
                return QuantizedWeights(weights)
            if packs:
                packed = prepack_weight(torch.cat(weights))
                for weight in weights:  # from now on, only adapters without a low-rank form read the original weights
                    memory.page_out(weight)
                return packed
            joint_weight = FusedProjection(parts, self._undo).weight if len(parts) > 1 else weights[0]
            if joint_weight is None:
                raise NotImplementedError(f"{', '.join(names)} cannot be joined")
            return Dense(joint_weight)

        def remembered(names: tuple[str, ...]) -> PrepackedWeight:
            self._weights[names] = packed = joined(names)
            return packed

        self._put_together(remembered)

    def _put_together(self, weights: Callable[[tuple[str, ...]], PrepackedWeight]) -> None:
        embedding = self.model.get_input_embeddings().weight.detach()
        if len(self.pages) > 1:
            raise NotImplementedError("the base's layers have heads of different sizes")
        self.llama = llama_forward(self.base, self.layout, weights, embedding, self.context, self.pages[0])

    def _lay_codes(self) -> bool:
        """Move the fused path's quantized codes into panels; return whether any were moved.

        Works group by group, so that no more than one group exists twice at a time.
        """
        base, modules = self.base, dict(base_modules(self.model))
        if base.dtype != torch.bfloat16 or base.device.type != "cpu" or not panels_here(8):
            return False
        self.llama, any_laid = None, False
        with memory.return_freed_memory():
            for names, weight in self._weights.items():
                if isinstance(weight, QuantizedWeights) and (laid := panels_of_codes(weight.parts)) is not None:
                    self._weights[names], any_laid = laid[0], True
                    for name, weight_codes in zip(names, laid[1], strict=True):
                        modules[name].weight = nn.Parameter(weight_codes, requires_grad=False)
                    del weight, laid
        self._put_together(self._weights.__getitem__)
        return any_laid

    def _with_int8(self) -> LlamaForward:
        """Return the fused path with 8-bit copies of the layers' weights.

        256 random tokens run in 16 bits and determine the balance and the outlier channels of the copies."""
        groups = self.layout.groups[:-1]
        weights = [[group.weight(i) for i in range(len(group.modules))] for group in groups]
        quantized = any(isinstance(part, Quantized) for parts in weights for part in parts)
        if self.llama is None or quantized or self.base.device.type != "cpu" or self.batch_invariant:
            self.close()
            raise ConfigError(
                "8-bit products need a Llama-like base on a CPU, without --quantize and --batch-invariant",
                where="--compute int8",
                fix="remove --compute int8",
            )
        copies = {group.modules: Int8Weight(parts[0]) for group, parts in zip(groups, weights, strict=True)}

        def with_copy(names: tuple[str, ...]) -> PrepackedWeight:
            weight = self._weights[names]
            return EightBits(weight, copies[names]) if names in copies else weight  # the head has no copy

        embedding = self.llama.embedding
        eight = llama_forward(self.base, self.layout, with_copy, embedding, self.context, self.pages[0])
        count, vocabulary = min(256, self.context), len(embedding)
        tokens = torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=torch.Generator().manual_seed(0))
        batch, ids = self._batch([RunnerRow(tokens.tolist(), 0, range(-(-count // BLOCK)))])
        with torch.no_grad(), memory.return_freed_memory():
            eight.hidden(ids, batch, None)
            for parts, copy in zip(weights, copies.values(), strict=True):
                copy.quantize(torch.cat(parts))
                for part in parts:
                    memory.page_out(part)
        return eight

    def _make_packed(self) -> None:
        config = self.model.config.get_text_config()
        static_positions(config)
        chunk = getattr(config, "attention_chunk_size", None)
        if chunk is not None and self.context > chunk:  # pages support attention windows, but not attention chunks
            raise NotImplementedError(
                f"the base uses chunked attention; context {self.context} exceeds its chunk of {chunk} tokens"
            )
        self._undo.callback(self._second.close)
        route_experts(self.model.modules(), self._second)
        self._second.callback(divert_attention(self.model))

    def require_low_rank(self) -> None:
        """Declare that all adapters will have a low-rank form.

        On a fused base, this restores the model's own modules, so that a trainer's fast paths
        (models/text/fast.py) can use them.
        """
        if self.how == "fused":
            self._second.close()

    def _attend(self, batch: PackedRows, layer: int, q: Tensor, k: Tensor, v: Tensor, how: AttentionSettings) -> Tensor:
        """Return the attention output of one layer, with every token as a row.

        q: (tokens, heads, d); k, v: (tokens, kv, d)
        """
        pages, at = self._layer_pages[layer]
        if q.shape[1] != pages.heads or k.shape[1:] != (pages.kv, pages.d) or how.sinks:
            raise NotImplementedError(f"attention over {tuple(q.shape)} and {tuple(k.shape)}, sinks {how.sinks}")
        pages.store(at, k, v, batch)
        self._attended.add(layer)
        scale = pages.d**-0.5 if how.scale is None else how.scale
        return pages.attend(at, q.flatten(1).contiguous(), batch, scale, how.cap, how.window).view(q.shape)


_UNFIT = (AttributeError, TypeError, ValueError, RuntimeError, KeyError, NotImplementedError)
"""Errors that mean a path does not support a base."""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _logit_indices(rows: Sequence[RunnerRow], batch: PackedRows) -> Tensor:
    """Return the indices, within a batch, of the tokens whose logits are needed."""
    indices = [k for i, row in enumerate(rows) for k in range(batch.bounds[i + 1] - row.wants, batch.bounds[i + 1])]
    return put_numbers(batch.positions.device, indices)[0]
