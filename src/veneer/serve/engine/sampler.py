"""Logits of many rows to a token for each, every row by its own settings.

    row = SampledRow(request.sampling, request.prompt, vocabulary=base_vocabulary, ends=stop_ids)     once a request
    for choice in sample(logits, rows): …                                                      once a step

A greedy row without further wishes costs its share of one argmax. The others go through, in this order: grammar,
logit bias, penalties, temperature, top-k, min-p, top-p. What is drawn then is a function of (seed, how many tokens the
row has made, its scores): no generator is kept, so a row draws the same whoever shares its batch, on every device, and
when it is taken up again elsewhere. The draw is Gumbel's: argmax(score − log e) with e ~ Exp(1) draws from
softmax(score). Beside inverting the distribution function it has the merit that rounding in the scores seldom changes
the token.

Knows torch and the words of `request`; no tokenizer, no model.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.serve.outage import fault
from veneer.serve.request import Refused, Sampling, invalid

if TYPE_CHECKING:
    from veneer.serve.engine.grammar import Matcher

NUCLEUS = 1024
"""Best tokens that top-p looks at first; where they do not hold its share, it looks at all."""


@dataclass(frozen=True)
class SampledToken:
    """A chosen token. `logprob` and `top` ((id, logprob), best first) are of the model's own distribution, where the
    row asks for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SampledRow:
    """What one request brings to every draw: its settings, its seed, the tokens so far.

    `ends`: the ids that end an answer, which must not come before `min_tokens`; those of the base, to which the
    request's own are added. `seed`: the one that is used, also where the request leaves it to the system. Raises
    Refused for ids that the vocabulary does not have."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        *,
        vocabulary: int,
        ends: Collection[int] = (),
        grammar: Matcher | None = None,
    ) -> None:
        for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_ids)):
            if wrong := [i for i in ids if not 0 <= i < vocabulary]:
                raise invalid(f"{param} names token {wrong[0]}; this base has {vocabulary:,} tokens", param)
        self.sampling, self.grammar = sampling, grammar
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

    def adjust(self, scores: Tensor) -> None:
        """Everything before the temperature, in place. scores: (vocabulary,), float32."""
        s = self.sampling
        if self.grammar is not None:
            begun, self._mask = self._mask, None
            mask = self.grammar.mask() if begun is None else begun.result()
            scores.masked_fill_(~mask.to(scores.device), -math.inf)
        if self._ends and self.made < s.min_tokens:
            kept = scores[self._ends]
            scores[self._ends] = -math.inf
            if self.grammar is not None and scores.max() == -math.inf:  # the grammar is at its end: so is the answer
                scores[self._ends] = kept
        if s.logit_bias:
            ids, bias = list(s.logit_bias), list(s.logit_bias.values())
            scores[ids] += torch.tensor(bias, dtype=scores.dtype, device=scores.device)
        if self._seen:
            seen = torch.tensor(list(self._seen), device=scores.device)
            x = scores[seen]
            scores[seen] = torch.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
        if self._counts:
            made = torch.tensor(list(self._counts), device=scores.device)
            often = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
            scores[made] -= s.frequency_penalty * often + s.presence_penalty


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | Refused]:
    """Choose the next token of every row, and count it as made. logits: (rows, vocabulary), of any float type; not
    changed.

    A row whose scores are not finite, or whose grammar cannot go on, gets its Refused; the others get their tokens."""
    if len(rows) != len(logits):
        raise ValueError(f"{len(rows)} rows for logits {tuple(logits.shape)}")
    if not rows:
        return []
    best, ids = logits.max(-1)
    failed: dict[int, Exception] = {}
    changed = [i for i, row in enumerate(rows) if not row.plain]
    if changed:
        scores = logits[changed].float()
        for own, i in zip(scores, changed, strict=True):
            try:
                rows[i].adjust(own)
            except Exception as error:
                failed[i] = error
        best[changed], ids[changed] = (t.to(u.dtype) for t, u in zip(scores.max(-1), (best, ids), strict=True))
        warm = [k for k, i in enumerate(changed) if rows[i].sampling.temperature]
        if warm:
            drawing = [rows[changed[k]] for k in warm]
            ids[[changed[k] for k in warm]] = _draw(scores if len(warm) == len(changed) else scores[warm], drawing)
    asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    counts = [rows[i].sampling.logprobs or 0 for i in asking]
    told = dict(zip(asking, scored(logits[asking], ids[asking], counts), strict=True)) if asking else {}
    out: list[SampledToken | Refused] = []
    for i, (row, token, top) in enumerate(zip(rows, ids.tolist(), best.tolist(), strict=True)):
        try:
            if i in failed:
                raise failed[i]
            if not math.isfinite(top):
                raise Refused("no token has a finite score", status=500, code="internal")
            row.take(token)
            out.append(told[i] if i in told else SampledToken(token))
        except Exception as error:  # its own row's alone: the others have taken their tokens
            out.append(error if isinstance(error, Refused) else fault("the answer", error))
    return out


def _draw(scores: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """A token for each row, from softmax(scores / temperature) within top-k, min-p and top-p. scores: (rows,
    vocabulary), float32."""
    heat = scores.new_tensor([[r.sampling.temperature] for r in rows]).clamp_min(1e-20)
    scores = (scores - scores.amax(-1, keepdim=True)) / heat  # the best is 0, so that no heat makes it infinite
    cut = [k for k, r in enumerate(rows) if r.sampling.top_k or r.sampling.top_p < 1 or r.sampling.min_p]
    keys = torch.tensor([_key(r.seed, r.made) for r in rows], dtype=torch.int32, device=scores.device)
    if not cut:
        tokens = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        return (scores - _exponential(tokens, keys[:, None]).log_()).argmax(-1)
    floor = scores.new_full((len(rows), 1), -math.inf)
    floor[cut] = _floor(scores[cut], [rows[k].sampling for k in cut])
    row, token = ((scores >= floor) & (scores > -math.inf)).nonzero(as_tuple=True)
    noisy = torch.full_like(scores, -math.inf)
    noisy[row, token] = scores[row, token] - _exponential(token.to(torch.int32), keys[row]).log_()
    return noisy.argmax(-1)


def _floor(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """(rows, 1): the lowest score that stays. As a bound on the score, not a place in an order, equal scores share
    their fate, and the outcome does not depend on how a sort settles ties. scores: (rows, vocabulary), the best 0."""
    vocabulary = scores.shape[-1]
    ks = [min(s.top_k or vocabulary, vocabulary) for s in settings]
    nucleus = any(s.top_p < 1 for s in settings)
    wanted = max([k for k in ks if k < vocabulary] + ([min(NUCLEUS, vocabulary)] if nucleus else [1]))
    best = scores.topk(wanted).values
    floor = scores.new_tensor([[math.log(s.min_p) if s.min_p else -math.inf] for s in settings])
    for r, k in enumerate(ks):
        if k < vocabulary:
            floor[r] = torch.maximum(floor[r], best[r, k - 1])
    if not nucleus:
        return floor
    total = scores.masked_fill(scores < floor, -math.inf).logsumexp(-1, keepdim=True)
    share = torch.tensor([[s.top_p] for s in settings], dtype=torch.float64, device=scores.device)
    lowest, held = _nucleus(best, floor, total, share)
    if wanted < vocabulary and not held.all():
        some = (~held).nonzero().flatten()
        order = scores[some].sort(descending=True).values
        lowest[some] = _nucleus(order, floor[some], total[some], share[some])[0]
    return torch.maximum(floor, lowest)


def _nucleus(order: Tensor, floor: Tensor, total: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The score of the last token that those before it leave below `share` of all above `floor`; and whether `order`,
    the best scores in falling order, reaches that far."""
    order = order.masked_fill(order < floor, -math.inf)
    p = (order - total).double().exp()
    stays = p.cumsum(-1) - p < share
    stays[:, 0] = True
    all_of_it = share >= 1
    lowest = order.masked_fill(~stays, math.inf).amin(-1, keepdim=True).masked_fill(all_of_it, -math.inf)
    return lowest, ~stays[:, -1] | (order[:, -1] == -math.inf) | all_of_it[:, 0]


def scored(logits: Tensor, ids: Tensor, counts: Sequence[int]) -> list[SampledToken]:
    """The logprobs of given tokens, each with its count of alternatives. logits: (n, vocabulary), n > 0; ids: (n,)."""
    p = logits.float().log_softmax(-1)
    own = p.gather(-1, ids[:, None])[:, 0].tolist()
    values, tokens = (t.tolist() for t in p.topk(min(max(counts), p.shape[-1])))
    return [
        SampledToken(token, logprob, tuple(zip(t[:n], v[:n], strict=True)))
        for token, logprob, n, t, v in zip(ids.tolist(), own, counts, tokens, values, strict=True)
    ]


# -- randomness: a hash of (seed, position, token) -------------------------------------------------------------------


def _key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words, signed, by splitmix64 (Steele and others 2014) of the seed, then of that and the position."""
    z = _splitmix(_splitmix(seed) + position)
    low, high = z & 0xFFFFFFFF, z >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def _splitmix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _exponential(tokens: Tensor, keys: Tensor) -> Tensor:
    """Exp(1), float32, one for each token under its key. tokens: (…), int32; keys: (…, 2), int32."""
    x = _mix(tokens ^ keys[..., 0])
    x = _mix(x + keys[..., 1]) & 0x7FFFFFFF
    u = x.float().add_(0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
    return u.neg_().log1p_().neg_()  # small where u is, in full precision: it is the small ones that win


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit (Wellons' lowbias32); the masks make the shifts logical."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
