"""Continuous batching scheduler: selects the sequences and tokens that each step computes.

A step has at most `budget` tokens. Each decoding sequence gets one token, or more if it has forced or
drafted tokens. The rest of the budget goes to prompts, which are computed in chunks, so that a long prompt never
delays the next tokens of other sequences.

Fairness (Sheng et al., arXiv 2401.00588, "virtual token counter"): each tenant has a counter of the tokens that it
received, divided by its weight. A computed prompt token, a forced token and a draft (accepted or not) count 1; a
step that samples a token counts 2. The tenant with the lowest counter gets the next slot and the next prompt
tokens. The counter of a tenant that returns after a pause is raised to the lowest counter of the active
tenants: idle time earns no credit. A prompt of ordinary length is charged only after its last chunk, so that a
tenant that arrives at a busy server is not delayed halfway through a prompt. Within a tenant, requests run
first come, first served, except for sequences whose adapters are still loading. In a step that produces a
sequence's first token, other tenants' prompts can at most double the step's prompt tokens.

Slots: if the tenant with the lowest counter has less than its share (by weight, among active tenants) of
slots and blocks, the scheduler preempts the youngest sequence of the tenant furthest above its share.

Memory: when no block is free, the scheduler preempts the youngest sequence of the tenant with the highest
counter. The preempted sequence loses its blocks, keeps its tokens, and is later recomputed, except for the
blocks that the cache still has. The caller of `add` must ensure that each request fits in the cache when it
runs alone. Works on plain numbers, without tensors or a clock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from veneer.serve.engine.cache import BlockTable, Cache
from veneer.serve.request import Request, cache_root

_LOOK_AHEAD = 64
"""Maximum number of a tenant's waiting requests that are checked for being ready to run."""
_SHORT = 64
"""Tokens of other tenants' prompts that are always allowed in a step that produces a first token."""
_GENERATED = 2.0
"""Cost of a generated token, relative to a prompt token, as in the paper."""
_CREDIT = 512
"""Maximum uncharged prompt tokens of a tenant; above it, or when a prompt is complete, they are charged."""


@dataclass(eq=False)
class Sequence:
    """A running or waiting request.

    `tokens`: prompt and generated tokens. `computed`: number of tokens whose keys and values are in the
    cache. `cached`: number of prompt tokens found in the cache when the sequence first ran. `charged`: number
    of prompt tokens charged to the tenant. `forced`: number of generated tokens that the grammar forced.
    `unscored`: number of tokens at the end whose log-probabilities are still needed. `appended`: number of
    tokens appended since the last step. `drafts`: tokens that the next step verifies as the continuation of
    `tokens`. `last_chunk`: serial number of the sequence's last chunk, from a counter that all sequences
    share.
    """

    request: Request
    tokens: list[int]
    table: BlockTable | None = None
    computed: int = 0
    cached: int = 0
    charged: int = 0
    forced: int = 0
    unscored: int = 0
    appended: int = 0
    drafts: tuple[int, ...] = ()
    order: int = 0
    last_chunk: int = -1
    ran: bool = False

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def decodes(self) -> bool:
        """Whether all tokens have been computed, except the last, or those appended since the last step."""
        return len(self.tokens) - self.computed <= max(1, self.appended)


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, computed in one step.

    `last`: whether the step needs the logits of the chunk's last token, which is the sequence's last token when
    the step begins. `drafts`: tokens after `end`, only in a last chunk, which are computed too."""

    sequence: Sequence
    start: int
    end: int
    last: bool
    drafts: tuple[int, ...] = ()


def _wanted(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.computed + len(sequence.drafts)


@dataclass
class _Tenant:
    weight: float = 1.0
    counter: float = 0.0
    owed: float = 0.0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0


class Scheduler:
    """Schedules the sequences of all tenants.

    `rows`: sequences that run at once. `budget`: tokens per step, at least `rows`. `loaded(sequence)`: return
    whether the sequence's adapters are in memory; also called for the next sequences in line, to start
    loading their adapters. `shares`: whether sequences can share blocks.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        rows: int = 32,
        budget: int = 512,
        loaded: Callable[[Sequence], bool] = lambda _: True,
        shares: bool = True,
    ) -> None:
        self.cache, self.rows, self.budget, self.loaded, self.shares = cache, rows, budget, loaded, shares
        self._chunks = 0
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.looked_up = self.found = 0
        """Prompt tokens looked up in the cache, and how many were found; each prompt counts once."""
        self._tenants: dict[str, _Tenant] = {}
        self._floor = 0.0
        self._order = 0

    @property
    def waiting(self) -> int:
        return sum(len(t.waiting) for t in self._tenants.values())

    def add(self, request: Request) -> Sequence:
        self._order += 1
        sequence = Sequence(request, list(request.prompt), order=self._order)
        tenant = self._tenants.setdefault(request.tenant, _Tenant())
        tenant.weight = request.weight
        if not tenant.waiting and not tenant.running:
            tenant.counter = max(tenant.counter, self._lowest())
        tenant.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished, cancelled or failed sequence and free its blocks."""
        self._lowest()
        if sequence in self.running:
            self._stop(sequence)
        else:
            self._tenants[sequence.request.tenant].waiting.remove(sequence)

    def step(self) -> list[Chunk]:
        """Return the chunks to compute now, at most one per sequence, and allocate blocks for their tokens."""
        self._make_room()
        chunks: list[Chunk] = []
        share = self.budget // max(1, len(self.running))  # maximum tokens of a decoding sequence
        left = self.budget - sum(min(share, _wanted(s)) for s in self.running if s.decodes)
        begun = sorted(self.running, key=self._turn)
        first, used, full = "", 0, False
        while True:
            following = None
            if left > 0 and not full and len(self.running) < self.rows:
                following = self._next()
            if begun and (following is None or self._turn(begun[0]) <= self._turn(following)):
                following = begun.pop(0)
                if following not in self.running:  # a sequence handled earlier in this step has preempted it
                    continue
            elif following is None:
                return chunks
            elif not self._start(following):
                full = True
                continue
            else:  # a sequence that was preempted in this step is still in `begun`
                begun = [s for s in begun if s is not following]
                if following.decodes:  # its prompt is cached, and `left` does not account for its tokens yet
                    left -= min(share, _wanted(following))
            if following.decodes:
                self._chunk(following, share, chunks)
                continue
            if first and following.request.tenant != first:
                left = min(left, max(_SHORT, used))
                first = ""
            if left <= 0:
                continue
            size = self._chunk(following, left, chunks)
            left, used = left - size, used + size
            if size and chunks[-1].last and following.generated == following.forced:
                first = following.request.tenant

    def mark_computed(self, chunk: Chunk, accepted: int = 0) -> None:
        """Record that the chunk's keys and values are in the cache.

        The first `accepted` drafts become tokens of the sequence. The other drafts are discarded.
        """
        sequence = chunk.sequence
        assert sequence.table is not None
        sequence.computed, sequence.appended = chunk.end + accepted, 0
        sequence.tokens += chunk.drafts[:accepted]
        self.cache.mark_computed(sequence.table, sequence.tokens[: sequence.computed])
        if chunk.drafts:
            sequence.drafts = ()
            self.cache.shrink(sequence.table, sequence.computed)
            self._tenants[sequence.request.tenant].counter += len(chunk.drafts) / sequence.request.weight
        new = min(chunk.end, sequence.prompt) - max(sequence.charged, sequence.cached)
        tenant = self._tenants[sequence.request.tenant]
        if new > 0:  # recomputed tokens are not charged again
            tenant.owed += new
            sequence.charged = max(sequence.charged, sequence.cached) + new
        if chunk.last or tenant.owed > _CREDIT:
            self._charge(tenant)

    def appended(self, sequence: Sequence, token: int, *, forced: bool = False) -> None:
        sequence.tokens.append(token)
        sequence.appended += 1
        sequence.forced += forced
        self._tenants[sequence.request.tenant].counter += (1.0 if forced else _GENERATED) / sequence.request.weight

    # -- internals -----------------------------------------------------------------------------------------------------

    def _lowest(self) -> float:
        """Return the lowest counter of the active tenants, or the last such value if no tenant is active."""
        at_work = [t.counter for t in self._tenants.values() if t.waiting or t.running]
        self._floor = min(at_work, default=self._floor)
        return self._floor

    def _charge(self, tenant: _Tenant) -> None:
        tenant.counter += tenant.owed / tenant.weight
        tenant.owed = 0.0

    def _turn(self, sequence: Sequence) -> tuple[float, int, int, int]:
        """Return a sequence's sort key; sequences with lower keys are computed first."""
        tenant = self._tenants[sequence.request.tenant]
        return tenant.counter, tenant.running, sequence.last_chunk, sequence.order

    def _make_room(self) -> None:
        """Preempt sequences that keep the next sequence in line from getting its tenant's share."""
        following = self._next()
        while following is not None and (victim := self._in_the_way(following)) is not None:
            self._preempt(victim)

    def _in_the_way(self, following: Sequence) -> Sequence | None:
        needed = -(-(len(following.tokens) + 1) // self.cache.block)
        no_slot = len(self.running) >= self.rows
        no_blocks = needed > self.cache.available - len(self.running)
        if not self.running or not (no_slot or no_blocks):
            return None
        at_work = {name: t for name, t in self._tenants.items() if t.waiting or t.running}
        weights = sum(t.weight for t in at_work.values())
        blocks = dict.fromkeys(at_work, 0)
        for sequence in self.running:
            blocks[sequence.request.tenant] += len(sequence.table.blocks) if sequence.table is not None else 0

        def above(name: str, slots: int, more_blocks: int) -> float:
            """Return the ratio of a tenant's usage to its share; 1 is exactly the share.

            `slots`, `more_blocks`: added to the current usage.
            """
            share = at_work[name].weight / weights
            by_slots = (at_work[name].running + slots) / (self.rows * share) if no_slot else 0.0
            by_blocks = (blocks[name] + more_blocks) / (self.cache.size * share) if no_blocks else 0.0
            return max(by_slots, by_blocks)

        tenant = following.request.tenant
        if at_work[tenant].running and above(tenant, 1, needed) > 1:
            return None
        most = max((name for name in at_work if name != tenant), key=lambda name: above(name, 0, 0), default=None)
        if most is None or above(most, 0, 0) <= 1:
            return None
        return max((s for s in self.running if s.request.tenant == most), key=lambda s: s.order)

    def _next(self) -> Sequence | None:
        """Return the first ready sequence of the tenant with the lowest counter, or None.

        Tenants without a ready sequence are skipped.
        """
        for tenant in sorted((t for t in self._tenants.values() if t.waiting), key=lambda t: (t.counter, t.running)):
            for sequence in itertools.islice(tenant.waiting, _LOOK_AHEAD):
                if self.loaded(sequence):
                    return sequence
        return None

    def _start(self, sequence: Sequence) -> bool:
        """Open the sequence's block table and run the sequence, if its tokens fit.

        Returns whether they fit. Never preempts other sequences."""
        no_cache = sequence.request.sampling.prompt_logprobs  # the cache stores no logits
        if self.shares and not no_cache:
            known = sequence.tokens[: len(sequence.tokens) - sequence.unscored]
            request = sequence.request
            name = None if request.salt else request.router_name
            table = self.cache.open(cache_root(request.mix, request.salt), known, name)
        else:
            table = BlockTable(f"sequence {sequence.order}".encode())
        needed = -(-(len(sequence.tokens) + 1) // self.cache.block) - len(table.blocks)
        if needed > self.cache.available - len(self.running) and self.running:
            self.cache.close(table)
            return False
        sequence.table, sequence.computed = table, table.cached
        if not sequence.ran:
            sequence.ran, sequence.cached = True, min(sequence.computed, sequence.prompt)
            self.looked_up += sequence.prompt if self.shares and not no_cache else 0
            self.found += sequence.cached
        tenant = self._tenants[sequence.request.tenant]
        tenant.waiting.remove(sequence)
        tenant.running += 1
        self.running.append(sequence)
        return True

    def _chunk(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        end = min(len(sequence.tokens), sequence.computed + left)
        assert sequence.table is not None
        drafts = sequence.drafts[: sequence.computed + left - end] if end == len(sequence.tokens) else ()
        if drafts and not self.cache.grow(sequence.table, end + len(drafts)):
            drafts = ()  # drafts never preempt a sequence
        while not self.cache.grow(sequence.table, end):
            victim = max(self.running, key=lambda s: (self._tenants[s.request.tenant].counter, s.order))
            self._preempt(victim)
            chunks[:] = [c for c in chunks if c.sequence is not victim]
            if victim is sequence:
                return 0
        self._chunks += 1
        sequence.last_chunk = self._chunks
        chunks.append(Chunk(sequence, sequence.computed, end, end == len(sequence.tokens), drafts))
        return end - sequence.computed + len(drafts)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._tenants[sequence.request.tenant].waiting.appendleft(sequence)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        self.cache.close(sequence.table)
        sequence.table, sequence.computed = None, 0
        self.running.remove(sequence)
        self._tenants[sequence.request.tenant].running -= 1
        self._charge(self._tenants[sequence.request.tenant])
