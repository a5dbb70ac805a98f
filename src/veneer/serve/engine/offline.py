"""The engine without a server: greedy completions of many prompts at once.

    with answering(base, adapters) as answer:
        answer(prompts, [("support", 1.0)], max_new_tokens=64)      same as `complete`, several times as fast

If the base or an adapter does not run on the engine's own forward pass, `answer` calls `complete` instead.
The mix must then be active on the model, as `complete` requires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from veneer.core.adapter import Adapter, mix_text
from veneer.models.patching import without_dropout
from veneer.models.text.base import TextBase
from veneer.models.text.generate import Completion, Prompt, complete, completion_of, encode_prompts
from veneer.serve.engine.engine import TextEngine
from veneer.serve.forward.lowrank import low_rank_problems
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import PACK_BYTES, block_bytes
from veneer.serve.request import Finished, Request, Sampling, Token, make_mix
from veneer.serve.settings import EngineSettings


class AnswerFunction(Protocol):
    def __call__(
        self, prompts: Sequence[Prompt], mix: Sequence[tuple[str, float]], *, max_new_tokens: int
    ) -> list[Completion]: ...


@contextmanager
def answering(base: TextBase, adapters: Mapping[str, Adapter], *, rows: int = 32) -> Iterator[AnswerFunction]:
    """Yield a function that completes prompts with mixes of adapters.

    `adapters`: name -> adapter. `rows`: completions at once. No adapter can be attached to the model on
    entry. Raises the errors of `complete`.
    """

    def plain(prompts: Sequence[Prompt], mix: Sequence[tuple[str, float]], *, max_new_tokens: int) -> list[Completion]:
        return complete(base, prompts, max_new_tokens=max_new_tokens, batch_size=rows)

    if base.device.type != "cpu":
        yield plain
        return
    settings = EngineSettings(rows=rows, queue=1 << 30, cache_bytes=_cache_bytes(base, rows))
    with without_dropout(base.model), TextEngine(base, lambda digest, _: adapters[digest], settings) as engine:
        fused = engine.runner.how == "fused"
        if fused and not any(low_rank_problems(adapter, engine.runner.layout) for adapter in adapters.values()):
            with ThreadPoolExecutor(1, thread_name_prefix="answers") as thread:
                yield partial(_engine_answers, base, engine, thread)
            return
    yield plain


def answering_bytes(base: TextBase, weights: int, *, rows: int = 32) -> int:
    """Return an upper bound on the memory in bytes that `answering` adds to the base on a CPU.

    Includes keys and values, and a prepacked copy of the projections. `weights`: bytes of the base's weights.
    """
    return min(weights, PACK_BYTES) + _cache_bytes(base, rows)


def _cache_bytes(base: TextBase, rows: int) -> int:
    """Return the cache size in bytes: at most 2 · `rows` full contexts.

    For a small base, filling a server's default cache with zeros at every evaluation would waste time.
    """
    blocks = 2 * rows * (base.context // BLOCK + 1)
    return min(EngineSettings.cache_bytes, blocks * block_bytes(base))


def _engine_answers(
    base: TextBase,
    engine: TextEngine,
    thread: ThreadPoolExecutor,
    prompts: Sequence[Prompt],
    mix: Sequence[tuple[str, float]],
    *,
    max_new_tokens: int,
) -> list[Completion]:
    """Complete prompts with the engine.

    Runs in a separate thread, because the caller's thread can have a running event loop.
    """
    encoded = encode_prompts(base, prompts)
    named = make_mix(mix)

    async def complete_prompt(ids: list[int]) -> Completion:
        sampling = Sampling(max_tokens=min(max_new_tokens, engine.context - len(ids)), temperature=0.0)
        request = Request(tuple(ids), sampling, named, name=mix_text(tuple(mix)))
        new: list[int] = []
        async for event in engine.events(request):
            if isinstance(event, Token):
                new.append(event.id)
            elif isinstance(event, Finished) and event.error is not None:
                raise event.error
        return completion_of(base, new, len(ids))

    async def complete_all() -> list[Completion]:
        return await asyncio.gather(*map(complete_prompt, encoded))

    return thread.submit(asyncio.run, complete_all()).result()
