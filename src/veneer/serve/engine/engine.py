"""The embedded engine: one thread that runs steps, and an async interface for the HTTP routes.

    a step    inbox → scheduler (rows and tokens) → runner (one forward pass) → sampler → text → events

In a step, a row computes and samples one token, except in two cases. Tokens that the grammar forces are appended
without a forward pass of their own; the next step computes their keys and values. Drafts (`drafts`) are computed
together and verified: the row samples at each position, as it would without drafts, until a sample differs.

Only the step thread changes state; other threads post callbacks to its queue. A request's adapters are leased
before the request runs and released when it ends, for whatever reason. An error ends only the request that
caused it: a failed step is rerun row by row, and only rows that fail again end with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import AdapterError
from veneer.models.text.base import TextBase
from veneer.serve.engine.admission import FairPool
from veneer.serve.engine.cache import Cache
from veneer.serve.engine.detokenize import AnswerText
from veneer.serve.engine.drafts import Drafter, Drafts
from veneer.serve.engine.sampler import SampledRow, SampledToken, sample, scored
from veneer.serve.engine.scheduler import Chunk, Scheduler, Sequence
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import Prepared, Runner, RunnerRow
from veneer.serve.names.adapter_cache import AdapterCache, Lease
from veneer.serve.names.adapter_sources import Problems
from veneer.serve.request import (
    BASE,
    Engine,
    EngineEvent,
    EngineStats,
    Finished,
    Refused,
    Request,
    Started,
    Token,
    Usage,
    cache_root,
    invalid,
    shutting_down,
)
from veneer.serve.settings import EngineSettings
from veneer.serve.transient import internal_error

if TYPE_CHECKING:
    from veneer.serve.engine.grammar import Matcher
    from veneer.serve.engine.kv_events import KvEvents

log = logging.getLogger(__name__)

_SCORED = 64
"""Number of prompt tokens scored at once; each needs a row of float32 logits."""

_LOST = 3
"""Number of consecutive steps that must fail for all rows before the engine reports that it is unhealthy."""


_Choices = list[SampledToken | Refused]

_Note = tuple[Callable[[EngineEvent], None], EngineEvent]
"""(callback, event that the callback receives)."""


@dataclass(eq=False)
class _Live:
    """A request in the engine."""

    request: Request
    draws: SampledRow
    answer: AnswerText
    deliver: Callable[[EngineEvent], None]
    loop: asyncio.AbstractEventLoop
    came: float
    sequence: Sequence | None = None
    lease: Lease[Prepared] | None = None
    waits: Callable[[Any], None] | None = None
    began: float | None = None
    first: float | None = None
    last: float | None = None
    drafter: Drafter | None = None
    forced: list[int] = field(default_factory=list)
    """Tokens at the end of the sequence that the grammar forced and whose events are not emitted yet."""
    scores: dict[int, SampledToken] = field(default_factory=dict)
    """Position of a prompt or forced token -> its log-probabilities, if requested."""


class TextEngine(Engine[Request, EngineEvent]):
    """Serves a text base.

    `read(digest, problems)`: reads an adapter from disk and raises Refused if `problems` reports any.
    `pack_bytes`: see Runner. `events`: publishes changes of the cache. Call `start` before use and `stop` at
    the end.
    """

    def __init__(
        self,
        base: TextBase,
        read: Callable[[str, Problems], Adapter],
        settings: EngineSettings | None = None,
        *,
        pack_bytes: int = 4 << 30,
        events: KvEvents | None = None,
    ) -> None:
        self.base, self.settings = base, (settings := settings or EngineSettings())
        self.kv_events = events
        self.runner = Runner(
            base,
            pack_bytes=pack_bytes,
            cache_bytes=settings.cache_bytes,
            batch_invariant=settings.batch_invariant,
            int8=settings.compute == "int8",
            context=settings.context,
        )
        self.residents: AdapterCache[Prepared] = AdapterCache(
            lambda digest: read(digest, self.problems),
            self.runner.prepare,
            limit_bytes=settings.adapter_bytes,
            freed=self._freed,
        )
        self.cache = Cache(self.runner.blocks, BLOCK, self.runner.copy_block, events.put if events else None)
        self.scheduler = Scheduler(
            self.cache, rows=settings.rows, budget=settings.budget, loaded=self._loaded, shares=self.runner.shares
        )
        self.context = self.runner.context
        self.vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
        self._live: dict[Sequence, _Live] = {}
        self._by_id: dict[str, _Live] = {}
        self._box: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._outbox: dict[asyncio.AbstractEventLoop, list[_Note]] = defaultdict(list)
        self._state: Literal["new", "open", "closed"] = "new"
        self.drafts = Drafts()
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._forced_tokens = self._drafted_tokens = self._accepted_tokens = 0
        self._texts: dict[int, str] = {}
        self._compiles, self._masks = FairPool(2, "grammar"), ThreadPoolExecutor(2, thread_name_prefix="mask")
        self._heartbeat, self._lost = time.monotonic(), 0
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="engine", daemon=True)

    # -- lifecycle -----------------------------------------------------------------------------------------------------

    def start(self) -> TextEngine:
        self._state = "open"
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse new requests and cancel running ones."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._box.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self.residents.close()
        self._masks.shutdown(wait=True)
        self._compiles.shutdown(wait=False, cancel_futures=True)
        self.runner.close()
        if self.kv_events is not None:
            self.kv_events.stop()

    async def begin(self) -> None:
        self.start()

    async def end(self) -> None:
        await asyncio.to_thread(self.stop)

    def __enter__(self) -> TextEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def problems(self, adapter: Adapter) -> list[str]:
        """Return the reasons why an adapter cannot be served in full, one line each."""
        return self.runner.problems(adapter)

    def problem(self) -> str:
        """Return why the engine is unhealthy (stuck step, ended thread, failing steps), or "" if healthy."""
        if self._state != "open":
            return ""
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        if (seconds := time.monotonic() - self._heartbeat) > self.settings.stuck_seconds:
            return f"the engine's step has not ended for {seconds:.0f} s"
        return f"the last {self._lost} steps failed for all their requests" if self._lost >= _LOST else ""

    @property
    def here(self) -> int:
        """Number of admitted requests that have not ended, running or waiting."""
        return max(len(self._by_id), len(self._live))

    def stats(self) -> EngineStats:
        memory = self.residents.stats()
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting,
            cache_used=self.cache.in_use / self.cache.size,
            prefix_hits=self.scheduler.found,
            prefix_lookups=self.scheduler.looked_up,
            preemptions=self.scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            forced_tokens=self._forced_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            adapters=memory.adapters,
            adapter_bytes=memory.bytes,
            evictions=memory.evictions,
            # The size of adapters is unknown before the first one. A batch holds at most `rows` of them.
            adapter_slots=memory.slots or self.settings.rows,
            blocks=self.cache.size,
            block_size=self.cache.block,
        )

    # -- async interface -----------------------------------------------------------------------------------------------

    async def events(self, request: Request) -> AsyncIterator[EngineEvent]:
        """Yield the events of a request; see `request.Engine`."""
        self._check(request)
        inbox = asyncio.Queue[EngineEvent]()
        grammar: Matcher | None = None
        if request.sampling.grammar is not None:
            from veneer.serve.engine.grammar import compile_grammar

            (kind, text), base = request.sampling.grammar, self.base
            start = await self._compiles.run(
                request.tenant,
                request.weight,
                len(text),
                lambda: compile_grammar(kind, text, base.tokenizer, vocabulary=self.vocabulary, ends=base.stop_ids),
            )
            grammar = start.copy()
        row = SampledRow(
            request.sampling,
            request.prompt,
            vocabulary=self.vocabulary,
            ends=self.base.stop_ids,
            grammar=grammar,
            under=request.name if request.mix else "",
        )
        answer = AnswerText(self.base.tokenizer, request.sampling, self.base.stop_ids)
        live = _Live(request, row, answer, inbox.put_nowait, asyncio.get_running_loop(), time.monotonic())
        if request.id in self._by_id:
            raise invalid(f"a request {request.id!r} is running")
        self._by_id[request.id] = live
        self._box.put(lambda: self._begin(live))
        try:
            while True:
                event = await inbox.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._box.put(lambda: self._end(live, "cancelled"))

    def _check(self, request: Request) -> None:
        if self._state != "open":
            raise shutting_down()
        prompt, most = len(request.prompt), request.sampling.max_tokens
        if not prompt:
            raise invalid("the prompt is empty", "prompt")
        if prompt + most > self.context:
            message = f"the context has {self.context} tokens; the prompt has {prompt}, and max_tokens is {most}"
            raise Refused(message, status=400, code="context_exceeded", fix="shorten the prompt or max_tokens")
        if wrong := [t for t in request.prompt if not 0 <= t < self.vocabulary]:
            raise invalid(f"token {wrong[0]} is not in this base's vocabulary of {self.vocabulary:,}", "prompt")
        if self.here - len(self.scheduler.running) >= self.settings.queue:
            raise Refused("too many requests are waiting", status=429, code="overloaded", retry_after=1.0)

    # -- the step thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._state != "closed":
            self._heartbeat = time.monotonic()
            try:
                startable = (live.lease is not None or live.request.mix == BASE for live in self._live.values())
                self._run_callbacks(wait=not self.scheduler.running and not any(startable))
                self._heartbeat = time.monotonic()
                self._step()
            except Exception as error:  # an internal error ends the current requests; the engine continues
                self._lost += 1
                refused = internal_error("the answer", error)
                for live in list(self._by_id.values()):
                    self._end(live, "error", error=refused)
            self._send()
        for live in list(self._by_id.values()):
            self._end(live, "cancelled")
        self._send()

    def _run_callbacks(self, wait: bool) -> None:
        """Run all queued callbacks. `wait`: wait up to a second for the first one if none is queued."""
        try:
            callback = self._box.get(timeout=1.0) if wait else self._box.get_nowait()
            while callback is not None:
                callback()
                callback = self._box.get_nowait()
        except Empty:
            pass
        self._send()

    def _begin(self, live: _Live) -> None:
        if self._by_id.get(live.request.id) is not live:
            return
        live.sequence = self.scheduler.add(live.request)
        self._live[live.sequence] = live
        self._loaded(live.sequence)
        self._force(live)
        self._draft(live, 1 + len(self.scheduler.running))

    def _loaded(self, sequence: Sequence) -> bool:
        """Return whether the sequence's adapters are in memory. The first call starts loading them."""
        live = self._live[sequence]
        if live.lease is not None or live.request.mix == BASE:
            return True
        if live.waits is None:
            live.waits = lambda result: self._box.put(lambda: self._leased(live, result))
            live.lease = self.residents.acquire(live.request.mix, live.waits)
        return live.lease is not None

    def _leased(self, live: _Live, result: Lease[Prepared] | Refused) -> None:
        if isinstance(result, Refused):
            self._end(live, "error", error=result)
        elif live.sequence in self._live:
            live.lease = result
        else:
            result.release()

    def _force(self, live: _Live) -> None:
        """Append the tokens that the grammar forces, if any, to the sequence."""
        sequence, sampling = live.sequence, live.request.sampling
        assert sequence is not None
        if live.draws.grammar is None or not self.runner.shares:
            return
        try:
            live.forced = live.draws.force(sampling.max_tokens - sequence.generated)
        except Exception as error:
            self._end(live, "error", error=error if isinstance(error, Refused) else internal_error("the answer", error))
            return
        for token in live.forced:
            self.scheduler.appended(sequence, token, forced=True)
            if live.drafter is not None:
                live.drafter.add(token, sampled=False)
        sequence.unscored = 0 if sampling.logprobs is None else len(live.forced)
        self._forced_tokens += len(live.forced)

    def _draft(self, live: _Live, rows: int) -> None:
        """Propose the sequence's drafts for the next step, in which `rows` sequences decode."""
        sequence = live.sequence
        assert sequence is not None
        if not self.settings.draft or not self.runner.shares:
            return
        if live.drafter is None:
            root = cache_root(live.request.mix, live.request.salt)
            live.drafter = self.drafts.drafter(root, sequence.tokens)
        room = max(0, live.request.sampling.max_tokens - sequence.generated - 1)
        sequence.drafts = live.drafter.propose(min(self.settings.draft, room), rows)
        if sequence.drafts and live.draws.grammar is not None:
            sequence.drafts = sequence.drafts[: live.draws.grammar.allowed(sequence.drafts)]

    def _step(self) -> None:
        for sequence in self.scheduler.running:
            self._draft(self._live[sequence], len(self.scheduler.running))
        chunks = self.scheduler.step()
        if not chunks:
            return
        for chunk in chunks:
            live = self._live[chunk.sequence]
            if live.began is None:
                live.began = time.monotonic()
                self._prompt_tokens += len(live.request.prompt)
                self._emit(live, Started(chunk.sequence.cached))
        self._steps += 1
        choices = self._choose(chunks)
        now = time.monotonic()
        for chunk in chunks:
            if (still := self._live.get(chunk.sequence)) is not None:  # None if the row failed
                chosen = choices[id(chunk)]
                self.scheduler.mark_computed(chunk, max(0, len(chosen) - 1))
                if chunk.last:
                    self._append_tokens(still, chosen, now)

    def _choose(self, chunks: list[Chunk]) -> dict[int, _Choices]:
        """Return id of a chunk -> next tokens: one for a last chunk, and one for each accepted draft.

        If the step fails, each row is rerun separately."""
        rows = [self._row(c) for c in chunks]
        out: dict[int, _Choices] = {id(c): [] for c in chunks}
        for chunk in chunks:
            if chunk.last:
                self._live[chunk.sequence].draws.prefetch_mask(self._masks.submit)
                self._drafted_tokens += len(chunk.drafts)
        try:
            self._sample(chunks, rows, self.runner.run(rows), out)
            self._lost = 0
            return out
        except Exception:
            log.exception("a step of %d rows failed; each row is rerun separately", len(rows))
        self._lost += 1
        for chunk in chunks:
            if out[id(chunk)]:  # sampled before the step failed
                continue
            try:
                row = self._row(chunk, again=not self.runner.shares)
                self._sample([chunk], [row], self.runner.run([row]), out)
                self._lost = 0
            except Exception as error:
                live = self._live[chunk.sequence]
                self._end(live, "error", error=_refusal(live.request, error))
        return out

    def _sample(self, chunks: list[Chunk], rows: list[RunnerRow], logits: Tensor, out: dict[int, _Choices]) -> None:
        """Add the next tokens of last chunks to `out`. Drafts are accepted while the samples equal them."""
        self._score(chunks, rows, logits)
        ends = itertools.accumulate(row.wants for row in rows)
        active = [(c, end - 1 - len(c.drafts)) for c, end in zip(chunks, ends, strict=True) if c.last]
        depth = 0
        while active:
            at = [first + depth for _, first in active]
            part = logits if at == list(range(len(logits))) else logits[at]
            following = []
            sampled = sample(part, [self._live[chunk.sequence].draws for chunk, _ in active])
            for (chunk, first), choice in zip(active, sampled, strict=True):
                out[id(chunk)].append(choice)
                token = choice.id if isinstance(choice, SampledToken) else None
                if depth < len(chunk.drafts) and chunk.drafts[depth] == token:
                    self._accepted_tokens += 1
                    if token not in self._live[chunk.sequence].answer.ends:
                        following.append((chunk, first))
            active, depth = following, depth + 1

    def _row(self, chunk: Chunk, *, again: bool = False) -> RunnerRow:
        """Return the runner's row for a chunk. `again`: recompute the sequence from its start.

        Paged keys and values can be overwritten safely. But the state of recurrent layers can already include
        part of the failed step, so it has to be recomputed.
        """
        sequence, live = chunk.sequence, self._live[chunk.sequence]
        assert sequence.table is not None
        mix = live.lease.parts if live.lease is not None else ()
        start, sampling = 0 if again else chunk.start, live.request.sampling
        tokens = [*sequence.tokens[start : chunk.end], *chunk.drafts]
        scored = len(sequence.tokens) - sequence.unscored
        if sampling.prompt_logprobs and chunk.start < sequence.prompt:
            scored = chunk.start + 1
        wants = max(0, chunk.end - max(chunk.start, scored - 1)) + len(chunk.drafts)
        return RunnerRow(tokens, start, sequence.table.blocks, mix, wants, id(sequence))

    def _score(self, chunks: list[Chunk], rows: list[RunnerRow], logits: Tensor) -> None:
        """Store the log-probabilities of the rows' prompt and forced tokens, if requested."""
        at = 0
        for chunk, row in zip(chunks, rows, strict=True):
            live = self._live[chunk.sequence]
            first = chunk.end + len(chunk.drafts) - row.wants + 1
            known = chunk.sequence.tokens[first : chunk.end + 1]
            count = live.request.sampling.logprobs or 0
            for k in range(0, len(known), _SCORED):
                ids = torch.tensor(known[k : k + _SCORED], device=logits.device)
                tokens = scored(logits[at + k : at + k + len(ids)], ids, [count] * len(ids))
                live.scores |= dict(enumerate(tokens, first + k))
            at += row.wants

    def _append_tokens(self, live: _Live, chosen: _Choices, now: float) -> None:
        """Append the chosen tokens, and then the tokens that the grammar forces, to the completion."""
        sequence = live.sequence
        assert sequence is not None
        accepted = max(0, len(chosen) - 1)
        if not self._append_forced(live, len(sequence.tokens) - accepted, now):
            return
        for choice in chosen:
            if isinstance(choice, Refused):
                self._end(live, "error", error=choice)
                return
            if choice is chosen[-1]:
                self.scheduler.appended(sequence, choice.id)
            if live.drafter is not None:
                live.drafter.add(choice.id)
            if not self._append_token(live, choice, now):
                return
        self._force(live)
        if live.request.sampling.logprobs is None:  # otherwise, the next step computes the log-probabilities
            self._append_forced(live, len(sequence.tokens), now)

    def _append_forced(self, live: _Live, end: int, now: float) -> bool:
        """Append the forced tokens whose events are not emitted yet. Return whether the completion continues.

        end: position in the sequence after the last of these tokens."""
        assert live.sequence is not None
        tokens, live.forced, live.sequence.unscored = live.forced, [], 0
        choices = [live.scores.get(k, SampledToken(t)) for k, t in enumerate(tokens, end - len(tokens))]
        if live.request.sampling.sampled_logprob:
            choices = [replace(choice, sampled_logprob=0.0) for choice in choices]
        return all(self._append_token(live, choice, now) for choice in choices)

    def _append_token(self, live: _Live, choice: SampledToken, now: float) -> bool:
        """Append a token to the completion's text, and emit it. Return whether the completion continues."""
        self._generated_tokens += 1
        prompt = self._prompt(live) if live.first is None else ()
        live.first, live.last = live.first or now, now
        piece = live.answer.add(choice.id)
        special = choice.id in self.base.stop_ids
        top = self._top(choice)
        self._emit(live, Token(choice.id, piece.text, choice.logprob, top, special, prompt, choice.sampled_logprob))
        if piece.reason is not None:
            self._end(live, piece.reason, stop=piece.stop)
        return piece.reason is None

    def _end(
        self,
        live: _Live,
        reason: Literal["stop", "length", "cancelled", "error"],
        stop: str | int | None = None,
        error: Refused | None = None,
    ) -> None:
        """Release everything that the request holds and emit its Finished event, at most once."""
        if self._by_id.get(live.request.id) is not live:
            return
        del self._by_id[live.request.id]
        sequence = live.sequence
        completion = cached = 0
        if sequence is not None:
            completion, cached = live.answer.count, sequence.cached
            if live.drafter is not None and reason in ("stop", "length"):
                self.drafts.finished(live.drafter, sequence.prompt)
            self.scheduler.remove(sequence)
            del self._live[sequence]
            self.runner.forget(id(sequence))
        if live.lease is not None:
            live.lease.release()
        elif live.waits is not None:
            self.residents.withdraw(live.waits)
        live.lease = None
        began, first = live.began or time.monotonic(), live.first
        usage = Usage(
            prompt=len(live.request.prompt) if live.began else 0,
            cached=cached,
            completion=completion,
            queued=began - live.came,
            prefill=(first - began) if first else 0.0,
            decode=(live.last - first) if first and live.last else 0.0,
        )
        text = live.answer.flush() if reason != "cancelled" else ""
        self._emit(live, Finished(reason, usage, stop, text, error))

    def _emit(self, live: _Live, event: EngineEvent) -> None:
        self._outbox[live.loop].append((live.deliver, event))

    def _send(self) -> None:
        """Deliver the queued events, with one call per event loop."""
        for loop, events in self._outbox.items():
            with suppress(RuntimeError):  # the loop is closed: nobody is listening
                loop.call_soon_threadsafe(_deliver, events)
        self._outbox.clear()

    def _prompt(self, live: _Live) -> tuple[Token, ...]:
        if not live.request.sampling.prompt_logprobs:
            return ()
        tokens = [live.scores.get(k, SampledToken(token)) for k, token in enumerate(live.request.prompt)]
        live.scores = {}
        return tuple(Token(c.id, self._text(c.id), c.logprob, self._top(c)) for c in tokens)

    def _top(self, choice: SampledToken) -> tuple[tuple[int, str, float], ...]:
        return tuple((i, self._text(i), p) for i, p in choice.top)

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self.base.tokenizer.decode([token]))
        return text

    # -- adapters ------------------------------------------------------------------------------------------------------

    def _freed(self, prepared: Prepared) -> None:
        key = prepared.key  # the callback must not keep the object alive
        self._box.put(lambda: self.runner.drop(key))


def _refusal(request: Request, error: Exception) -> Refused:
    """Return the client's error for a failed step: 400 for a mix that cannot be applied."""
    if not isinstance(error, AdapterError):
        return internal_error("the answer", error)
    return Refused(f"{request.name}: {error.what}", status=400, code="adapter_unusable", fix=error.fix)


def _deliver(events: list[_Note]) -> None:
    for deliver, event in events:
        deliver(event)
