"""Who runs next, and how many tokens of each: continuous batching with prompts in chunks beside decoding.

Every step takes at most `budget` tokens: one for each sequence that is decoding, the rest for prompts, which are
computed in chunks. So a long prompt never stops others from getting their next token. Where there are tenants, a step
also ends by time: `cost` says what a step, a row and a token of a prompt take, and what does not fit waits for the next
step, in the order of the tenants' counters, and within a tenant of who waited longest.

Fairness (Sheng et al., arXiv 2401.00588, "virtual token counter"): each tenant has a counter of what it was given,
prompt tokens computed and two or more for each generated one (by the time it takes), divided by its weight. The next
place, and the next tokens of prompts, go to the tenant with the lowest counter. A tenant that comes back after a pause
is lifted to the lowest counter of those at work: idle time earns nothing. A prompt of ordinary length is counted when
it has brought its first token, so that whoever comes to a busy server is not made to wait half-way. Within a tenant:
first come, first served; one whose adapter is still being read is passed over. A step that brings somebody's first
token is made at most twice as long by other tenants' prompts.

Places: whoever has the lowest counter, and less than its share (by weight, of those at work) of places and blocks, does
not wait until others end: of the tenant that has most above its share the youngest is pre-empted.

Memory: a sequence that needs a block where none is left pre-empts the youngest of the tenant with the highest counter:
its blocks go, its tokens stay, and it is computed again from what the cache still knows. Nothing fails for want of
blocks unless it could not fit alone; who adds a request sees to that. Numbers only: no tensors, no clock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from veneer.serve.engine.cache import BlockTable, Cache
from veneer.serve.request import Request, cache_root

_LOOK_AHEAD = 64
"""How many of a tenant's waiting requests are asked whether they can run."""
_PIECE = 32
"""Tokens below which it is not worth while to begin with a prompt."""
_SHORT = 64
"""Tokens of other tenants' prompts that a step may always have beside one whose first token it brings."""
_GENERATED = 2.0
_CREDIT = 512
"""Tokens of prompts that a tenant is charged for when they have brought a first token, and not before."""
_DEAREST = 32.0
"""What a generated token counts beside one of a prompt, at least and at most: a step of its own, nearly (the paper's
weights are 1 and 2; on a processor a row of a step may take as long as a dozen tokens of a prompt)."""


@dataclass(eq=False)
class Sequence:
    """A request under way. `tokens`: the prompt and what was generated; `computed`: how many of them have keys and
    values in the cache; `cached`: how many it found there when it first ran; `charged`: prompt tokens counted;
    `served`: the number of its last chunk, of all."""

    request: Request
    tokens: list[int]
    table: BlockTable | None = None
    computed: int = 0
    cached: int = 0
    charged: int = 0
    order: int = 0
    served: int = -1
    ran: bool = False

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def decodes(self) -> bool:
        """Whether all but its last token is computed."""
        return self.computed >= len(self.tokens) - 1


@dataclass(frozen=True)
class Chunk:
    """Tokens start … end of a sequence, to be computed in this step; `last`: the logits after them are wanted."""

    sequence: Sequence
    start: int
    end: int

    @property
    def last(self) -> bool:
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class StepCost:
    """The time of a step in seconds: `fixed` + `row` · rows that decode + `token` · tokens of prompts. `step`: the
    longest that a step may take; 0 for no limit."""

    fixed: float = 0.0
    row: float = 0.0
    token: float = 0.0
    step: float = 0.0

    @property
    def spare(self) -> float:
        """Seconds that rows and tokens may take together: at least as many as what is fixed."""
        return max(self.step - self.fixed, self.fixed) if self.step else inf

    @property
    def generated(self) -> float:
        """What a generated token counts beside one of a prompt: by the time it takes, from _GENERATED to DEAREST."""
        return min(max(_GENERATED, self.row / self.token), _DEAREST) if self.token else _GENERATED


@dataclass
class _Tenant:
    weight: float = 1.0
    counter: float = 0.0
    owed: float = 0.0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0


class Scheduler:
    """`rows`: sequences at once. `budget`: tokens in a step, at least `rows`. `loaded(sequence)`: whether its adapters
    are in memory; it is asked for those next in line, so it may start to read them. `shares`: whether sequences can
    share blocks. `cost`: set by whoever measures steps."""

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
        self.cost = StepCost()
        self._chunks = 0
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.looked_for = self.found = 0
        """Tokens of prompts that were looked for in the cache, and found, each prompt once."""
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
        """Finished, cancelled or failed: its blocks are given back."""
        self._lowest()
        if sequence in self.running:
            self._stop(sequence)
        else:
            self._tenants[sequence.request.tenant].waiting.remove(sequence)

    def step(self) -> list[Chunk]:
        """What to compute now, each sequence at most once. Every chunk's table has room for its tokens."""
        self._make_room()
        chunks: list[Chunk] = []
        left = self.budget - sum(s.decodes for s in self.running)
        spare = self.cost.spare if any(name and (t.waiting or t.running) for name, t in self._tenants.items()) else inf
        begun = sorted(self.running, key=self._turn)
        first, used, full = "", 0, False
        while True:
            following = None
            if left > 0 and spare > 0 and not full and len(self.running) < self.rows:
                following = self._next()
            if begun and (following is None or self._turn(begun[0]) <= self._turn(following)):
                following = begun.pop(0)
                if following not in self.running:  # pre-empted by one before it
                    continue
            elif following is None:
                return chunks
            elif not self._start(following):
                full = True
                continue
            else:  # one that was pre-empted a moment ago is among those that had begun
                begun = [s for s in begun if s is not following]
            if following.decodes:
                if not chunks or spare >= self.cost.row:
                    spare -= self.cost.row
                    self._chunk(following, 1, chunks)
                continue
            if first and following.request.tenant != first:
                left = min(left, max(_SHORT, used))
                first = ""
            room = left if spare == inf or not self.cost.token else min(left, int(spare / self.cost.token))
            if room < max(1, min(_PIECE, left, len(following.tokens) - following.computed)):
                if chunks or left <= 0:
                    continue
                room = min(_PIECE, left)
            size = self._chunk(following, room, chunks)
            left, used, spare = left - size, used + size, spare - size * self.cost.token
            if size and chunks[-1].last and following.generated == 0:
                first = following.request.tenant

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache."""
        sequence = chunk.sequence
        assert sequence.table is not None
        sequence.computed = chunk.end
        self.cache.computed(sequence.table, sequence.tokens[: chunk.end])
        new = min(chunk.end, sequence.prompt) - max(sequence.charged, sequence.cached)
        tenant = self._tenants[sequence.request.tenant]
        if new > 0:  # not for what is computed again after a pre-emption
            tenant.owed += new
            sequence.charged = max(sequence.charged, sequence.cached) + new
        if chunk.last or tenant.owed > _CREDIT:
            self._settle(tenant)

    def appended(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        self._charge(sequence, self.cost.generated)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _lowest(self) -> float:
        """The lowest counter of the tenants at work; while there is none, what it was last."""
        at_work = [t.counter for t in self._tenants.values() if t.waiting or t.running]
        self._floor = min(at_work, default=self._floor)
        return self._floor

    def _settle(self, tenant: _Tenant) -> None:
        tenant.counter += tenant.owed / tenant.weight
        tenant.owed = 0.0

    def _charge(self, sequence: Sequence, tokens: float) -> None:
        self._tenants[sequence.request.tenant].counter += tokens / sequence.request.weight

    def _turn(self, sequence: Sequence) -> tuple[float, int, int, int]:
        """Who is computed before whom."""
        tenant = self._tenants[sequence.request.tenant]
        return tenant.counter, tenant.running, sequence.served, sequence.order

    def _make_room(self) -> None:
        """Pre-empt what keeps the next in line from its tenant's share."""
        following = self._next()
        while following is not None and (victim := self._in_the_way(following)) is not None:
            self._preempt(victim)

    def _in_the_way(self, following: Sequence) -> Sequence | None:
        needed = -(-(len(following.tokens) + 1) // self.cache.block)
        no_place = len(self.running) >= self.rows
        no_blocks = needed > self.cache.available - len(self.running)
        if not self.running or not (no_place or no_blocks):
            return None
        at_work = {name: t for name, t in self._tenants.items() if t.waiting or t.running}
        weights = sum(t.weight for t in at_work.values())
        blocks = dict.fromkeys(at_work, 0)
        for sequence in self.running:
            blocks[sequence.request.tenant] += len(sequence.table.blocks) if sequence.table is not None else 0

        def above(name: str, places: int, room: int) -> float:
            """How far a tenant is above its share, in shares, with so many more places and blocks."""
            share = at_work[name].weight / weights
            in_places = (at_work[name].running + places) / (self.rows * share) if no_place else 0.0
            in_blocks = (blocks[name] + room) / (self.cache.size * share) if no_blocks else 0.0
            return max(in_places, in_blocks)

        own = following.request.tenant
        if at_work[own].running and above(own, 1, needed) > 1:
            return None
        most = max((name for name in at_work if name != own), key=lambda name: above(name, 0, 0), default=None)
        if most is None or above(most, 0, 0) <= 1:
            return None
        return max((s for s in self.running if s.request.tenant == most), key=lambda s: s.order)

    def _next(self) -> Sequence | None:
        """The first that can run of the tenant with the lowest counter that has one."""
        for tenant in sorted((t for t in self._tenants.values() if t.waiting), key=lambda t: (t.counter, t.running)):
            for sequence in itertools.islice(tenant.waiting, _LOOK_AHEAD):
                if self.loaded(sequence):
                    return sequence
        return None

    def _start(self, sequence: Sequence) -> bool:
        """Open its table and let it run, if its tokens fit beside what runs: one that starts pre-empts nobody."""
        whole = sequence.request.sampling.prompt_logprobs  # what the cache knows has no logits
        if self.shares and not whole:
            table = self.cache.open(cache_root(sequence.request.mix, sequence.request.salt), sequence.tokens)
        else:
            table = BlockTable(f"sequence {sequence.order}".encode())
        needed = -(-(len(sequence.tokens) + 1) // self.cache.block) - len(table.blocks)
        if needed > self.cache.available - len(self.running) and self.running:
            self.cache.close(table)
            return False
        sequence.table, sequence.computed = table, len(table.blocks) * self.cache.block
        if not sequence.ran:
            sequence.ran, sequence.cached = True, sequence.computed
            self.looked_for += sequence.prompt if self.shares and not whole else 0
            self.found += sequence.cached
        tenant = self._tenants[sequence.request.tenant]
        tenant.waiting.remove(sequence)
        tenant.running += 1
        self.running.append(sequence)
        return True

    def _chunk(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        end = min(len(sequence.tokens), sequence.computed + left)
        assert sequence.table is not None
        while not self.cache.grow(sequence.table, end):
            victim = self._victim()
            self._preempt(victim)
            chunks[:] = [c for c in chunks if c.sequence is not victim]
            if victim is sequence:
                return 0
        self._chunks += 1
        sequence.served = self._chunks
        chunks.append(Chunk(sequence, sequence.computed, end))
        return end - sequence.computed

    def _victim(self) -> Sequence:
        return max(self.running, key=lambda s: (self._tenants[s.request.tenant].counter, s.order))

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
        self._settle(self._tenants[sequence.request.tenant])
