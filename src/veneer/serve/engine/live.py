"""Sampling during training: the engine without a server, with an attachment's current values.

    with attach(model) as attachment, live_sampler(base, attachment) as sampler, fast(model):
        attachment.add("run", adapter, trainable=True)
        completions = sampler.sample([CompletionRequest(prompt, seed, SamplingParams(), "run"), …])

Uses the engine's continuous batching, its prefix cache for completions that share a prompt, and its grammars.
The engine uses the base's own weights without a copy; quantized weights stay quantized. Adapters are
identified by the digest of their values, so after an optimizer step, keys and values cached before the step
are never found.

Enter `live_sampler` before `fast`, so that weights are fused once. No adapter can be active on the model
while the sampler is open.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment
from veneer.errors import VeneerError
from veneer.models.patching import without_dropout
from veneer.models.text.base import TextBase
from veneer.models.text.logprob_replay import Replay
from veneer.ops.attention import SharedRows
from veneer.ops.device_transfer import sent
from veneer.serve.engine.engine import TextEngine
from veneer.serve.engine.sampler import scored
from veneer.serve.forward.llama import LlamaForward
from veneer.serve.forward.lowrank import AdapterBatch, PackedAdapter, low_rank_problems, pack_adapter
from veneer.serve.forward.paged import BLOCK, PackedRows, Pages
from veneer.serve.forward.runner import Runner, block_bytes
from veneer.serve.request import BASE, DigestMix, Finished, Request, Sampling, Started, Token
from veneer.serve.settings import EngineSettings
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, SamplerSettings

_INTERRUPT_CHECK_SECONDS = 0.1
"""Seconds between checks for an interrupt."""
_CACHE = 1 << 30
"""Maximum bytes of keys and values; the cache is smaller if full contexts of all rows need less."""
_SCORED = 64
"""Number of tokens whose logits are in memory at once during a replay."""


@contextmanager
def live_sampler(
    base: TextBase, attachment: Attachment, settings: SamplerSettings | None = None
) -> Iterator[_LiveSampler]:
    """Yield a `Sampler` on an attachment.

    Raises ConfigError if the base does not run on the engine's own forward pass (`Runner`, "fused").
    """
    settings = settings or SamplerSettings()
    context = min(base.context, settings.context or base.context)
    blocks = settings.rows * (context // BLOCK + 1) + 2
    cache_bytes = min(_CACHE, blocks * block_bytes(base))
    engine_settings = EngineSettings(
        rows=settings.rows, queue=1 << 30, cache_bytes=cache_bytes, batch_invariant=settings.exact, context=context
    )
    now: dict[str, Adapter] = {}
    with attachment.off(), without_dropout(base.model):
        engine = TextEngine(base, lambda digest, _: now[digest], engine_settings, pack_bytes=settings.pack_bytes)
        engine.runner.require_low_rank()  # `problems` rejects other adapters
    with engine, ThreadPoolExecutor(1, thread_name_prefix="rollouts") as thread:
        yield _LiveSampler(attachment, settings, engine, thread, now)


class _LiveSampler(Sampler):
    """Samples from an attachment. `now`: digest -> adapter as of the latest `sample`, for the engine."""

    def __init__(
        self,
        attachment: Attachment,
        settings: SamplerSettings,
        engine: TextEngine,
        thread: ThreadPoolExecutor,
        now: dict[str, Adapter],
    ) -> None:
        self.attachment, self.settings, self.engine, self.thread, self.now = attachment, settings, engine, thread, now

    @property
    def runner(self) -> Runner:
        return self.engine.runner

    def problems(self, adapter: str) -> list[str]:
        return low_rank_problems(self.attachment.adapters[adapter], self.runner.layout)

    def sample(
        self, requests: Sequence[CompletionRequest], interrupted: Callable[[], bool] = lambda: False
    ) -> list[Rollout] | None:
        mixes: dict[str, DigestMix] = {"": BASE}
        fresh: dict[str, Adapter] = {}
        for name in dict.fromkeys(request.adapter for request in requests if request.adapter):
            adapter = self.attachment.adapter(name)
            digest = adapter.digest()
            fresh[digest], mixes[name] = adapter, ((digest, 1.0),)
        for digest in [d for d in self.now if d not in fresh]:
            self.engine.residents.drop(digest)
            del self.now[digest]
        self.now |= fresh
        return self.thread.submit(asyncio.run, self._all(requests, mixes, interrupted)).result()

    async def _all(
        self, requests: Sequence[CompletionRequest], mixes: dict[str, DigestMix], interrupted: Callable[[], bool]
    ) -> list[Rollout] | None:
        """Run all requests; return None if interrupted.

        The first request of each prompt starts first, so that the others find its cached prefix."""
        started: dict[tuple[str, tuple[int, ...]], asyncio.Event] = {}
        uses = Counter((request.adapter, request.prompt) for request in requests)

        async def complete(request: CompletionRequest) -> Rollout:
            key = (request.adapter, request.prompt)
            if key in started:
                await started[key].wait()
                return await self._complete(request, mixes[request.adapter], None)
            begun = started[key] = asyncio.Event()
            try:
                return await self._complete(request, mixes[request.adapter], begun if uses[key] > 1 else None)
            finally:
                begun.set()

        tasks = [asyncio.ensure_future(complete(request)) for request in requests]
        try:
            while any(not task.done() for task in tasks):
                done, _ = await asyncio.wait(
                    tasks, timeout=_INTERRUPT_CHECK_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                )
                if interrupted():
                    return None
                for task in done:
                    task.result()
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, request: CompletionRequest, mix: DigestMix, begun: asyncio.Event | None) -> Rollout:
        how = request.how
        sampling = Sampling(
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=request.seed,
            logprobs=0,
            sampled_logprob=True,
            grammar=how.grammar,  # type: ignore[arg-type]
        )
        tokens: list[Token] = []
        cached, end = 0, None
        async for event in self.engine.events(Request(request.prompt, sampling, mix, name=request.adapter)):
            match event:
                case Started():
                    cached = event.cached
                case Token():
                    tokens.append(event)
                    if begun is not None:
                        begun.set()
                case Finished():
                    end = event
        assert end is not None
        if end.error is not None:
            raise end.error
        if end.reason == "cancelled":
            raise VeneerError("the engine ended while it was sampling")
        return Rollout(
            request.prompt,
            tuple(t.id for t in tokens),
            tuple(t.logprob or 0.0 for t in tokens),
            tuple(t.sampled_logprob or 0.0 for t in tokens),
            "".join(t.text for t in tokens) + end.text,
            end.reason == "length",
            cached,
        )

    def replay(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        trained: Tensor,
        adapter: str = "",
        shared: SharedRows | None = None,
    ) -> Replay:
        llama, layout = self.runner.llama, self.runner.layout
        assert llama is not None
        packed = pack_adapter(self.attachment.adapters[adapter], layout, adapter) if adapter else None
        positions = trained.nonzero()[:, 0].to(input_ids.device)
        rows = _ReplayedRows.build(lengths, shared)
        return _EngineReplay(llama, packed, self.runner, input_ids, rows, positions)


@dataclass(frozen=True)
class _ReplayedRows:
    """The tokens that a replay computes.

    `rows`: (first position, end, blocks) of each row, as in the engine. `computed_indices`: for each computed
    token, its index among all tokens of the rows. `row_indices`: for each token of the rows, its index among
    the computed tokens. `previous`: for each token of the rows, the index of its predecessor.
    """

    rows: list[tuple[int, int, list[int]]]
    computed_indices: Tensor
    row_indices: Tensor
    previous: Tensor

    @property
    def blocks(self) -> int:
        return 1 + max(block for _, _, blocks in self.rows for block in blocks)

    @classmethod
    def build(cls, lengths: Sequence[int], shared: SharedRows | None) -> _ReplayedRows:
        """Build from row lengths.

        Full blocks of a prefix shared with an earlier row reuse that row's blocks."""
        indices_of_tokens = torch.arange(sum(lengths)) if shared is None else shared.places.cpu()
        owner: list[int] = []
        rows: list[tuple[int, int, list[int]]] = []
        computed_indices: list[Tensor] = []
        used = 0
        for i, indices in enumerate(indices_of_tokens.split(list(lengths))):
            common = int((indices < len(owner)).sum())
            owner += [i] * (len(indices) - common)
            full_blocks = common // BLOCK if common else 0
            shared_blocks = rows[owner[int(indices[0])]][2][:full_blocks] if full_blocks else []
            rows.append(
                (
                    full_blocks * BLOCK,
                    len(indices),
                    [*shared_blocks, *range(used, used := used - (-len(indices) // BLOCK) - full_blocks)],
                )
            )
            computed_indices.append(indices[full_blocks * BLOCK :])
        computed = torch.cat(computed_indices)
        row_indices = SharedRows.from_indices(computed).firsts
        return cls(rows, computed, row_indices, row_indices - 1 if shared is None else row_indices[shared.before.cpu()])


class _EngineReplay(Replay):
    """Replays whole rows with the engine's forward pass.

    All layers reuse the pages of one layer. `positions`: indices of the tokens whose log-probabilities are
    requested.
    """

    def __init__(
        self,
        llama: LlamaForward,
        packed: PackedAdapter | None,
        runner: Runner,
        ids: Tensor,
        rows: _ReplayedRows,
        positions: Tensor,
    ) -> None:
        self.ids, self.positions, self.layout, self.packed = ids, positions, runner.layout, packed
        own_pages, layers, device = runner.pages[0], len(llama.blocks), ids.device
        pages = Pages(1, rows.blocks, own_pages.heads, own_pages.kv, own_pages.d, own_pages.K.dtype, own_pages.K.device)
        pages.K, pages.V = (t.expand(layers, *t.shape[1:]) for t in (pages.K, pages.V))
        pages.tiles = own_pages.tiles
        self.llama = replace(llama, pages=pages)
        self.row_indices, self.previous = sent(rows.row_indices, device), sent(rows.previous, device)
        computed = ids[sent(rows.computed_indices, device)]
        spans = [] if packed is None else [(0, len(computed), [(packed, 1.0)])]
        segments = AdapterBatch.build(self.layout, spans)
        self._layers = self.llama.each_layer(computed, PackedRows.build(rows.rows, device), segments)

    @torch.no_grad()
    def layer(self) -> Tensor:
        return next(self._layers)[self.row_indices]

    @torch.no_grad()
    def logps(self) -> Tensor:
        hidden = next(self._layers)
        for hidden in self._layers:  # noqa: B007  skip the layers nobody read
            pass
        head = len(self.layout.groups) - 1
        out = []
        for chunk in self.positions.split(_SCORED):
            x = hidden[self.previous[chunk]]
            segments = None
            if self.packed is not None and head in self.packed.groups:
                segments = AdapterBatch.build(self.layout, [(0, len(x), [(self.packed, 1.0)])])
            logits = self.llama.logits(x, segments)
            tokens = scored(logits, self.ids[chunk], [0] * len(chunk))
            out += [token.logprob or 0.0 for token in tokens]
        return torch.tensor(out, device=hidden.device)
