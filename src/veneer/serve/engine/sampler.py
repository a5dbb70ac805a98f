"""Logits of many rows to a token for each, every row by its own settings.

    row = SampledRow(request.sampling, request.prompt, vocabulary=base_vocabulary, ends=stop_ids)     once a request
    for choice in sample(logits, rows): …                                                      once a step

A greedy row without further wishes costs its share of one argmax. The others go through, in this order: grammar,
logit bias, penalties, temperature, top-k, min-p, top-p. What is drawn then is a function of (seed, how many tokens the
row has made, its scores): no generator is kept, so a row draws the same whoever shares its batch, on every device, and
when it is taken up again elsewhere. The draw is Gumbel's: argmax(score − log e) with e ~ Exp(1) draws from
softmax(score). Beside inverting the distribution function it has the merit that rounding in the scores seldom changes
the token.

Settings go to the device in a few copies that nobody waits for, and what was chosen comes back in one read a step.

Knows torch and the words of `request`; no tokenizer, no model.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.errors import quoted
from veneer.ops.device_transfer import put_numbers, sent
from veneer.serve.outage import fault
from veneer.serve.request import Refused, Sampling, invalid

if TYPE_CHECKING:
    from veneer.serve.engine.grammar import Matcher

_NEAR = 1 << 18
"""Scores that a processor draws from at a time: what is made of them on the way stays in its second cache."""
NUCLEUS = 1024
"""Best tokens that top-p looks at first; where they do not hold its share, it looks at all."""


@dataclass(frozen=True)
class SampledToken:
    """A chosen token. `logprob` and `top` ((id, logprob), best first) are of the model's own distribution, `drawn` is
    its logprob in the one that it was drawn from, where the row asks for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drawn: float | None = None


class SampledRow:
    """What one request brings to every draw: its settings, its seed, the tokens so far.

    `ends`: the ids that end an answer, which must not come before `min_tokens`; those of the base, to which the
    request's own are added. `seed`: the one that is used, also where the request leaves it to the system. `under`: the
    mix of adapters that its scores come from, as the client named it. Raises Refused for ids that the vocabulary does
    not have."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        *,
        vocabulary: int,
        ends: Collection[int] = (),
        grammar: Matcher | None = None,
        under: str = "",
    ) -> None:
        for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_ids)):
            if wrong := [i for i in ids if not 0 <= i < vocabulary]:
                raise invalid(f"{param} names token {wrong[0]}; this base has {vocabulary:,} tokens", param)
        self.sampling, self.grammar, self.under = sampling, grammar, under
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.made = 0
        ending = {*sampling.stop_ids} | (set() if sampling.ignore_eos else {*ends})
        self._ends = sorted(ending if sampling.min_tokens else ())
        self._counts: Counter[int] = Counter()
        self._counted = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._repeats = sampling.repetition_penalty != 1
        self._seen = dict.fromkeys(prompt) if self._repeats else {}
        self._changes = bool(grammar or sampling.logit_bias or self._counted or self._repeats)
        self._mask: Future[Tensor] | None = None

    @property
    def unmodified(self) -> bool:
        """Whether the next token is drawn from the model's own distribution as it is."""
        s = self.sampling
        cut = s.top_k or s.top_p < 1 or s.min_p
        return not (self._changes or cut or s.temperature != 1 or self.made < s.min_tokens)

    @property
    def plain(self) -> bool:
        """Whether the best of the model's own scores is the answer."""
        return not (self.sampling.temperature or self._changes or self.made < self.sampling.min_tokens)

    def ahead(self, submit: Callable[[Callable[[], Tensor]], Future[Tensor]]) -> None:
        """Begin with the grammar's mask for the next token, while the model computes the scores."""
        if self.grammar is not None and self._mask is None:
            self._mask = submit(self.grammar.mask)

    def take(self, token: int) -> None:
        """Count a token as made. `sample` does it for what it chooses."""
        self.made += 1
        if self._counted:
            self._counts[token] += 1
        if self._repeats:
            self._seen[token] = None
        if self.grammar is not None:
            self.grammar.advance(token)

    def mask(self) -> Tensor | None:
        """Which tokens the grammar allows next, on the CPU; None without one. Raises what the grammar raises."""
        if self.grammar is None:
            return None
        begun, self._mask = self._mask, None
        return self.grammar.mask() if begun is None else begun.result()

    @property
    def forbidden(self) -> Sequence[int]:
        """What must not come next, unless the grammar allows nothing else."""
        return self._ends if self.made < self.sampling.min_tokens else ()

    @property
    def seen(self) -> Collection[int]:
        """The tokens that a repetition penalty acts on."""
        return self._seen

    @property
    def counts(self) -> Mapping[int, int]:
        """Token -> how often it was made, where a penalty asks."""
        return self._counts


_NOTHING_ALLOWED, _NOT_FINITE = -1, -2
"""In the place of a token: why there is none."""


def _no_token(row: SampledRow, why: int) -> Refused:
    what = "no token has a finite score"
    if why == _NOT_FINITE and row.under:  # by what was asked for: not worth a retry
        what = f"{what} under {quoted(row.under)}: the base overflowed"
        return Refused(what, status=400, code="adapter_unusable", param="model", fix="lower strengths")
    return Refused(what, status=500, code="internal")


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | Refused]:
    """Choose the next token of every row, and count it as made. logits: (rows, vocabulary), of any float type; not
    changed.

    A row whose scores are not finite, or whose grammar cannot go on, gets its Refused; the others get their tokens."""
    if len(rows) != len(logits):
        raise ValueError(f"{len(rows)} rows for logits {tuple(logits.shape)}")
    many = max(1, _NEAR // logits.shape[-1]) if free_to_ask(logits) else len(rows)
    parts = (slice(at, at + many) for at in range(0, len(rows), max(1, many)))
    return [choice for part in parts for choice in _sample(logits[part], rows[part])]


def _sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | Refused]:
    device = logits.device
    best, ids = logits.max(-1)
    finite = best.isfinite()
    failed: dict[int, Exception] = {}
    own_as_it_is = [row.unmodified for row in rows]
    drawn = torch.zeros(len(rows), device=device)  # of what is the best alone, which is certain
    changed = [i for i, row in enumerate(rows) if not row.plain]
    if changed:
        own = [rows[i] for i in changed]
        at = put_numbers(device, changed)[0]
        scores = logits.index_select(0, at).float()
        failed = {changed[k]: error for k, error in adjust(scores, own).items()}
        top, chosen = scores.max(-1)
        finite.index_copy_(0, at, top.isfinite())
        warm = [k for k, row in enumerate(own) if row.sampling.temperature]
        if warm:
            some = put_numbers(device, warm)[0]
            tokens, logprobs = _draw(scores.index_select(0, some), [own[k] for k in warm])
            chosen.index_copy_(0, some, tokens)
            drawn.index_copy_(0, at.index_select(0, some), logprobs)
        ids.index_copy_(0, at, chosen)
    ids = torch.where(finite, ids, _NOTHING_ALLOWED)
    ids = torch.where(best.isfinite(), ids, _NOT_FINITE)
    asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    counts = [rows[i].sampling.logprobs or 0 for i in asking]
    told_of: tuple[Tensor, ...] = ()
    if asking:
        some = put_numbers(device, asking)[0]
        told_of = _logprobs(logits.index_select(0, some), ids.index_select(0, some).clamp_min(0), max(counts))
    numbers, under, *parts = _read(ids, drawn, *told_of)
    made = [int(n) for n in numbers]
    told = dict(zip(asking, _sampled([made[i] for i in asking], counts, *parts), strict=True)) if asking else {}
    for i, one in told.items():
        if rows[i].sampling.drawn_logprob:  # of its own distribution the very same number
            told[i] = replace(one, drawn=one.logprob if own_as_it_is[i] else under[i])
    out: list[SampledToken | Refused] = []
    for i, (row, token) in enumerate(zip(rows, made, strict=True)):
        try:
            if i in failed:
                raise failed[i]
            if token < 0:
                raise _no_token(row, token)
            row.take(token)
            out.append(told[i] if i in told else SampledToken(token))
        except Exception as error:  # its own row's alone: the others have taken their tokens
            out.append(error if isinstance(error, Refused) else fault("the answer", error))
    return out


def adjust(scores: Tensor, rows: Sequence[SampledRow]) -> dict[int, Exception]:
    """Everything before the temperature, in place. scores: (rows, vocabulary), float32. Places of the rows whose
    grammar has failed, and how."""
    failed: dict[int, Exception] = {}
    masks: dict[int, Tensor] = {}
    for k, row in enumerate(rows):
        try:
            if (mask := row.mask()) is not None:
                masks[k] = mask
        except Exception as error:
            failed[k] = error
    if masks:
        held = put_numbers(scores.device, list(masks))[0]
        allowed = sent(torch.stack(list(masks.values())), scores.device)
        scores.index_copy_(0, held, scores.index_select(0, held).masked_fill_(~allowed, -math.inf))
    first = _Entries(scores)
    for k, row in enumerate(rows):
        first.add(k, row.forbidden)
    if (there := first.there) is not None:
        kept = scores[there]
        scores[there] = -math.inf
        if masks:  # a grammar that is at its end goes before: so is the answer
            over = (scores.amax(-1) == -math.inf).index_select(0, there[0])
            scores[there] = torch.where(over, kept, -math.inf)
    bias = _Entries(scores)
    for k, row in enumerate(rows):
        bias.add(k, row.sampling.logit_bias, row.sampling.logit_bias.values())
    if (there := bias.there) is not None:
        scores[there] += bias.values
    repeated = _Entries(scores)
    for k, row in enumerate(rows):
        repeated.add(k, row.seen, [row.sampling.repetition_penalty] * len(row.seen))
    if (there := repeated.there) is not None:
        x, penalty = scores[there], repeated.values
        scores[there] = torch.where(x > 0, x / penalty, x * penalty)
    often = _Entries(scores)
    for k, row in enumerate(rows):
        s = row.sampling
        often.add(k, row.counts, [s.frequency_penalty * n + s.presence_penalty for n in row.counts.values()])
    if (there := often.there) is not None:
        scores[there] -= often.values
    return failed


class _Entries:
    """Some entries of a matrix, gathered row by row, each with a number of its own."""

    def __init__(self, matrix: Tensor) -> None:
        self.like = matrix
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, columns: Collection[int], values: Collection[float] = ()) -> None:
        self._rows += [row] * len(columns)
        self._columns += columns
        self._values += values

    @property
    def there(self) -> tuple[Tensor, Tensor] | None:
        """Their rows and columns on the matrix's device; None where there are none."""
        if not self._rows:
            return None
        rows, columns = put_numbers(self.like.device, self._rows, self._columns)
        return rows, columns

    @property
    def values(self) -> Tensor:
        return _numbers(self.like, self._values)


def _numbers(like: Tensor, values: Sequence[float]) -> Tensor:
    """Numbers in the dtype and on the device of a tensor."""
    return sent(torch.tensor(values, dtype=like.dtype), like.device)


def _draw(scores: Tensor, rows: Sequence[SampledRow]) -> tuple[Tensor, Tensor]:
    """A token for each row, from softmax(scores / temperature) within top-k, min-p and top-p; and its logprob there,
    where some row asks for it and it is not the model's own (else 0). scores: (rows, vocabulary), float32."""
    heat = _numbers(scores, [r.sampling.temperature for r in rows])[:, None].clamp_min(1e-20)
    scores = (scores - scores.amax(-1, keepdim=True)) / heat  # the best is 0, so that no heat makes it infinite
    cut = [k for k, r in enumerate(rows) if r.sampling.top_k or r.sampling.top_p < 1 or r.sampling.min_p]
    keys = sent(torch.tensor([draw_key(r.seed, r.made) for r in rows], dtype=torch.int32), scores.device)
    floor = None
    if cut:
        at = put_numbers(scores.device, cut)[0]
        floor = scores.new_full((len(rows), 1), -math.inf)
        floor.index_copy_(0, at, lowest_kept(scores.index_select(0, at), [rows[k].sampling for k in cut]))
    some = floor is not None and free_to_ask(scores)
    noisy = _some_noisy(scores, floor, keys) if some and floor is not None else _noisy(scores, floor, keys)
    chosen = noisy.argmax(-1)
    if not any(r.sampling.drawn_logprob and not r.unmodified for r in rows):
        return chosen, scores.new_zeros(len(rows))
    kept = scores if floor is None else scores.masked_fill(scores < floor, -math.inf)
    return chosen, kept.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def free_to_ask(scores: Tensor) -> bool:
    """Whether what a tensor holds may be asked for on the way: a device would make its host wait."""
    return scores.device.type == "cpu"


def _noisy(scores: Tensor, floor: Tensor | None, keys: Tensor) -> Tensor:
    """score − log e where a score is not below its row's floor, else −∞."""
    tokens = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    noisy = scores - exponential(tokens, keys[:, None]).log_()
    return noisy if floor is None else noisy.masked_fill_(scores < floor, -math.inf)


def _some_noisy(scores: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
    """The same, e made where it is asked for alone: how many that are a device would have to tell its host first."""
    row, token = ((scores >= floor) & (scores > -math.inf)).nonzero(as_tuple=True)
    noisy = torch.full_like(scores, -math.inf)
    noisy[row, token] = scores[row, token] - exponential(token.to(torch.int32), keys[row]).log_()
    return noisy


def lowest_kept(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """(rows, 1): the lowest score that stays. As a bound on the score, not a place in an order, equal scores share
    their fate, and the outcome does not depend on how a sort settles ties. scores: (rows, vocabulary), the best 0."""
    vocabulary = scores.shape[-1]
    floor = _numbers(scores, [math.log(s.min_p) if s.min_p else -math.inf for s in settings])[:, None]
    ks = [min(s.top_k or vocabulary, vocabulary) for s in settings]
    nucleus = [r for r, s in enumerate(settings) if s.top_p < 1]
    wanted = max(
        [k for k in ks if k < vocabulary] + ([min(NUCLEUS, vocabulary)] if nucleus and free_to_ask(scores) else [1])
    )
    best = scores.topk(wanted).values
    if few := [r for r, k in enumerate(ks) if k < vocabulary]:
        at, place = put_numbers(scores.device, few, [ks[r] - 1 for r in few])
        lowest = best.index_select(0, at).gather(1, place[:, None])
        floor.index_copy_(0, at, torch.maximum(floor.index_select(0, at), lowest))
    if not nucleus:
        return floor
    at = put_numbers(scores.device, nucleus)[0]
    own, least = scores.index_select(0, at), floor.index_select(0, at)
    total = own.masked_fill(own < least, -math.inf).logsumexp(-1, keepdim=True)
    share = sent(torch.tensor([[settings[r].top_p] for r in nucleus], dtype=torch.float64), scores.device)
    if free_to_ask(scores):  # most nuclei are small, and whether one is not costs nothing to ask
        lowest, held = _nucleus(best.index_select(0, at), least, total, share)
        if wanted < vocabulary and not held.all():
            some = (~held).nonzero().flatten()
            order = own[some].sort(descending=True).values
            lowest[some] = _nucleus(order, least[some], total[some], share[some])[0]
    else:
        lowest, _ = _nucleus(own.sort(descending=True).values, least, total, share)
    floor.index_copy_(0, at, torch.maximum(least, lowest))
    return floor


def _nucleus(order: Tensor, floor: Tensor, total: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The score of the last token that those before it leave below `share` of all above `floor`; and whether `order`,
    the best scores in falling order, reaches that far."""
    order = order.masked_fill(order < floor, -math.inf)
    p = (order - total).double().exp_()
    stays = p.cumsum(-1).sub_(p) < share
    stays[:, 0] = True
    all_of_it = share >= 1
    lowest = order.masked_fill(~stays, math.inf).amin(-1, keepdim=True).masked_fill(all_of_it, -math.inf)
    return lowest, ~stays[:, -1] | (order[:, -1] == -math.inf) | all_of_it[:, 0]


def scored(logits: Tensor, ids: Tensor, counts: Sequence[int]) -> list[SampledToken]:
    """The logprobs of given tokens, each with its count of alternatives. logits: (n, vocabulary), n > 0; ids: (n,)."""
    numbers, *parts = _read(ids, *_logprobs(logits, ids, max(counts)))
    return _sampled([int(n) for n in numbers], counts, *parts)


def _logprobs(logits: Tensor, ids: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs of the tokens (n,), those of the `most` best and which these are, both (n, most))"""
    logits = logits.float()
    tokens = _best(logits, min(most, logits.shape[-1])) if most else ids.new_empty(len(ids), 0)
    p = logits.log_softmax(-1)
    return p.gather(-1, ids[:, None])[:, 0], p.gather(-1, tokens), tokens


def _best(scores: Tensor, count: int) -> Tensor:
    """The tokens of the best scores, best first; of equal ones, which 16 bits have many of, the first of the vocabulary
    comes first, as argmax has it. `topk` alone takes any, others where more are asked for. scores: (n, vocabulary),
    float32."""
    least = scores.topk(max(1, count)).values[:, -1:]
    if free_to_ask(scores):
        row, token = (~(scores < least)).nonzero(as_tuple=True)  # `count` or more of each row, nan among them
        order = scores[row, token].argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        many = row.bincount(minlength=len(scores))
        first = (many.cumsum(0) - many)[:, None]
        return token[order][first + torch.arange(count)]
    vocabulary = scores.shape[-1]
    token = torch.arange(vocabulary, dtype=torch.int32, device=scores.device)
    place = torch.where(scores > least, token - vocabulary, token).masked_fill_(scores < least, vocabulary)
    token = place.topk(count, largest=False, sorted=False).indices.sort().values
    return token.gather(-1, scores.gather(-1, token).argsort(descending=True, stable=True))


def _read(*tensors: Tensor) -> list[list[float]]:
    """The values of tensors one after another, in one read: as float32, which holds every token below 2²⁴."""
    flat: list[float] = torch.cat([t.flatten().float() for t in tensors]).cpu().tolist()
    out, at = [], 0
    for tensor in tensors:
        out.append(flat[at : at + tensor.numel()])
        at += tensor.numel()
    return out


def _sampled(
    ids: Sequence[int], counts: Sequence[int], own: Sequence[float], values: Sequence[float], tokens: Sequence[float]
) -> list[SampledToken]:
    """`values` and `tokens`: of all rows, as many of each."""
    each = len(values) // max(1, len(ids))
    out = []
    for r, (token, n, logprob) in enumerate(zip(ids, counts, own, strict=True)):
        best = slice(r * each, r * each + min(n, each))
        out.append(
            SampledToken(token, logprob, tuple((int(t), v) for t, v in zip(tokens[best], values[best], strict=True)))
        )
    return out


# -- randomness: a hash of (seed, position, token) -------------------------------------------------------------------


def draw_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words, signed, by splitmix64 (Steele and others 2014) of the seed, then of that and the position."""
    z = _splitmix(_splitmix(seed) + position)
    low, high = z & 0xFFFFFFFF, z >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def _splitmix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def exponential(tokens: Tensor, keys: Tensor) -> Tensor:
    """Exp(1), float32, one for each token under its key. tokens: (…), int32; keys: (…, 2), int32."""
    x = _mix_(tokens ^ keys[..., 0])
    x = _mix_(x.add_(keys[..., 1])).bitwise_and_(0x7FFFFFFF)
    u = x.float().add_(0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
    return u.neg_().log1p_().neg_()  # small where u is, in full precision: it is the small ones that win


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit (Wellons' lowbias32), in place; the masks make the shifts
    logical."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
