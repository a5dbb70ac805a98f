"""Sampling: turns the logits of many rows into one token each, with per-row settings.

    row = SampledRow(request.sampling, request.prompt, vocabulary=n, ends=stop_ids)    once per request
    for choice in sample(logits, rows): …                                              once per step

A greedy row without other settings costs only its share of one argmax. For other rows, the order is: grammar,
logit bias, penalties, temperature, top-k, min-p, top-p. The sample is a function of (seed, number of
generated tokens, scores), without generator state. So a row samples the same tokens in any batch, on any
device, and after it resumes on another server. Sampling uses the Gumbel trick: argmax(score − log e) with
e ~ Exp(1) samples from softmax(score). Unlike inverting the distribution function, the Gumbel trick seldom
changes the token because of rounding in the scores.

Depends only on torch and `request`, not on a tokenizer or a model.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.errors import quoted
from veneer.ops.device_transfer import put_numbers, sent
from veneer.serve.request import Refused, Sampling, invalid
from veneer.serve.transient import internal_error

if TYPE_CHECKING:
    from veneer.serve.engine.grammar import Matcher

_NEAR = 1 << 18
"""Number of scores that a CPU processes at a time, so that intermediate results fit in the L2 cache."""
NUCLEUS = 1024
"""Number of most likely tokens that top-p checks first.

If their total probability is below top_p, all tokens are sorted."""


@dataclass(frozen=True)
class SampledToken:
    """A sampled token.

    `logprob` and `top` ((id, logprob), best first) are from the model's own distribution. `sampled_logprob`
    is from the distribution that the token was sampled from. Each is present only if the row requests it.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    sampled_logprob: float | None = None


class SampledRow:
    """The sampling state of one request: settings, seed, and tokens so far.

    `ends`: the base's stop ids. These and the request's own stop ids are not sampled before `min_tokens`.
    `seed`: the seed in use, even if the server chose it. `under`: the client's name for the mix that produces
    the scores. Raises Refused for ids outside the vocabulary.
    """

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
        self.generated = 0
        ending = {*sampling.stop_ids} | (set() if sampling.ignore_eos else {*ends})
        self._ends = sorted(ending if sampling.min_tokens else ())
        self._penalizes_counts = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._penalizes_repeats = sampling.repetition_penalty != 1
        self.counts: Counter[int] = Counter()
        """Token -> number of times it was generated; empty without a presence or frequency penalty."""
        self.seen = dict.fromkeys(prompt) if self._penalizes_repeats else {}
        """Tokens to which the repetition penalty applies."""
        self._changes = bool(grammar or sampling.logit_bias or self._penalizes_counts or self._penalizes_repeats)
        self._mask: Future[Tensor] | None = None

    @property
    def unmodified(self) -> bool:
        """Whether the next token is sampled from the model's own distribution, unmodified."""
        s = self.sampling
        cut = s.top_k or s.top_p < 1 or s.min_p
        return not (self._changes or cut or s.temperature != 1 or self.generated < s.min_tokens)

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the model's own scores."""
        return not (self.sampling.temperature or self._changes or self.generated < self.sampling.min_tokens)

    def prefetch_mask(self, submit: Callable[[Callable[[], Tensor]], Future[Tensor]]) -> None:
        """Start computing the grammar mask of the next token, in parallel with the model."""
        if self.grammar is not None and self._mask is None:
            self._mask = submit(self.grammar.mask)

    def take(self, token: int) -> None:
        """Record a generated token; `sample` calls this for each token that it chooses."""
        self.generated += 1
        if self._penalizes_counts:
            self.counts[token] += 1
        if self._penalizes_repeats:
            self.seen[token] = None
        if self.grammar is not None:
            self.grammar.advance(token)

    def force(self, most: int) -> list[int]:
        """Record and return the next tokens that the grammar forces, at most `most`.

        `sample` would choose the same tokens. Raises the grammar's errors.
        """
        forced: list[int] = []
        while self.grammar is not None and len(forced) < most:
            done, tokens = self.grammar.done, self.grammar.forced()[: most - len(forced)]
            for token in tokens:
                self.take(token)
            forced += tokens
            if done or not tokens:
                break
        return forced

    def mask(self) -> Tensor | None:
        """Return which tokens the grammar allows next, as a mask on the CPU; None without a grammar.

        Raises the grammar's errors.
        """
        if self.grammar is None:
            return None
        begun, self._mask = self._mask, None
        return self.grammar.mask() if begun is None else begun.result()

    @property
    def forbidden(self) -> Sequence[int]:
        """Return tokens that must not come next, unless the grammar allows nothing else."""
        return self._ends if self.generated < self.sampling.min_tokens else ()


_NOTHING_ALLOWED, _NOT_FINITE = -1, -2
"""Placeholder ids for rows in which no token can be chosen."""


def _no_token(row: SampledRow, why: int) -> Refused:
    message = "no token has a finite score"
    if why == _NOT_FINITE and row.under:  # the request is the cause, so a retry cannot help
        message = f"{message} with adapters {quoted(row.under)}: the output overflowed"
        return Refused(message, status=400, code="adapter_unusable", param="model", fix="lower strengths")
    return Refused(message, status=500, code="internal")


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | Refused]:
    """Choose the next token of every row, and record it in the row.

    logits: (rows, vocabulary), any float type; not changed. A row with non-finite scores or a failing grammar
    gets a Refused; the other rows get their tokens.
    """
    if len(rows) != len(logits):
        raise ValueError(f"{len(rows)} rows for logits {tuple(logits.shape)}")
    part_rows = max(1, _NEAR // logits.shape[-1]) if logits.is_cpu else len(rows)
    parts = (slice(at, at + part_rows) for at in range(0, len(rows), max(1, part_rows)))
    return [choice for part in parts for choice in _sample(logits[part], rows[part])]


def _sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | Refused]:
    device = logits.device
    best, ids = logits.max(-1)
    finite = best.isfinite()
    failed: dict[int, Exception] = {}
    unmodified = [row.unmodified for row in rows]
    sampled_logprobs = torch.zeros(len(rows), device=device)  # 0 for greedy rows, whose token is certain
    changed = [i for i, row in enumerate(rows) if not row.plain]
    if changed:
        changed_rows = [rows[i] for i in changed]
        at = put_numbers(device, changed)[0]
        scores = logits.index_select(0, at).float()
        failed = {changed[k]: error for k, error in adjust(scores, changed_rows).items()}
        top, best_ids = scores.max(-1)
        finite.index_copy_(0, at, top.isfinite())
        warm = [k for k, row in enumerate(changed_rows) if row.sampling.temperature]
        if warm:
            some = put_numbers(device, warm)[0]
            tokens, logprobs = _sample_warm(scores.index_select(0, some), [changed_rows[k] for k in warm])
            best_ids.index_copy_(0, some, tokens)
            sampled_logprobs.index_copy_(0, at.index_select(0, some), logprobs)
        ids.index_copy_(0, at, best_ids)
    ids = torch.where(finite, ids, _NOTHING_ALLOWED)
    ids = torch.where(best.isfinite(), ids, _NOT_FINITE)
    with_logprobs = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    counts = [rows[i].sampling.logprobs or 0 for i in with_logprobs]
    logprob_parts: tuple[Tensor, ...] = ()
    if with_logprobs:
        some = put_numbers(device, with_logprobs)[0]
        logprob_parts = _logprobs(logits.index_select(0, some), ids.index_select(0, some).clamp_min(0), max(counts))
    numbers, under, *parts = _read(ids, sampled_logprobs, *logprob_parts)
    chosen_ids = [int(n) for n in numbers]
    reported: dict[int, SampledToken] = {}
    if with_logprobs:
        reporting = _sampled([chosen_ids[i] for i in with_logprobs], counts, *parts)
        reported = dict(zip(with_logprobs, reporting, strict=True))
    for i, sampled in reported.items():
        if rows[i].sampling.sampled_logprob:  # for unmodified rows, both log-probabilities are equal
            reported[i] = replace(sampled, sampled_logprob=sampled.logprob if unmodified[i] else under[i])
    out: list[SampledToken | Refused] = []
    for i, (row, token) in enumerate(zip(rows, chosen_ids, strict=True)):
        try:
            if i in failed:
                raise failed[i]
            if token < 0:
                raise _no_token(row, token)
            row.take(token)
            out.append(reported[i] if i in reported else SampledToken(token))
        except Exception as error:  # fail only this row: earlier rows have recorded their tokens
            out.append(error if isinstance(error, Refused) else internal_error("the answer", error))
    return out


def adjust(scores: Tensor, rows: Sequence[SampledRow]) -> dict[int, Exception]:
    """Apply, in place, all adjustments that precede temperature.

    Returns the errors of failed grammars by row index.

    scores: (rows, vocabulary), float32
    """
    failed: dict[int, Exception] = {}
    masks: dict[int, Tensor] = {}
    for k, row in enumerate(rows):
        try:
            if (mask := row.mask()) is not None:
                masks[k] = mask
        except Exception as error:
            failed[k] = error
    if masks:
        indices = put_numbers(scores.device, list(masks))[0]
        allowed = sent(torch.stack(list(masks.values())), scores.device)
        scores.index_copy_(0, indices, scores.index_select(0, indices).masked_fill_(~allowed, -math.inf))
    if (at := _entries(scores, [row.forbidden for row in rows])) is not None:
        original = scores[at]
        scores[at] = -math.inf
        if masks:  # allow stop ids before `min_tokens` if the grammar allows nothing else
            over = (scores.amax(-1) == -math.inf).index_select(0, at[0])
            scores[at] = torch.where(over, original, -math.inf)
    if (at := _entries(scores, [row.sampling.logit_bias for row in rows])) is not None:
        scores[at] += _numbers(scores, [bias for row in rows for bias in row.sampling.logit_bias.values()])
    if (at := _entries(scores, [row.seen for row in rows])) is not None:
        x, penalty = scores[at], _numbers(scores, [row.sampling.repetition_penalty for row in rows for _ in row.seen])
        scores[at] = torch.where(x > 0, x / penalty, x * penalty)
    if (at := _entries(scores, [row.counts for row in rows])) is not None:
        settings = [(row.sampling, n) for row in rows for n in row.counts.values()]
        scores[at] -= _numbers(scores, [s.frequency_penalty * n + s.presence_penalty for s, n in settings])
    return failed


def _entries(scores: Tensor, columns: Sequence[Collection[int]]) -> tuple[Tensor, Tensor] | None:
    """Return (row indices, column indices) of the entries that `columns` names, or None.

    columns: for each row, a collection of column indices; None is returned if all are empty
    """
    rows = [row for row, row_columns in enumerate(columns) for _ in row_columns]
    if not rows:
        return None
    at, where = put_numbers(scores.device, rows, [column for row_columns in columns for column in row_columns])
    return at, where


def _numbers(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return the values as a tensor with the dtype and device of `like`."""
    return sent(torch.tensor(values, dtype=like.dtype), like.device)


def _sample_warm(scores: Tensor, rows: Sequence[SampledRow]) -> tuple[Tensor, Tensor]:
    """Sample a token per row from softmax(scores / temperature), limited by top-k, min-p and top-p.

    Returns the tokens and their log-probabilities in that distribution. All log-probabilities are 0 unless
    some row requests `sampled_logprob` for a modified distribution.

    scores: (rows, vocabulary), float32
    """
    heat = _numbers(scores, [r.sampling.temperature for r in rows])[:, None].clamp_min(1e-20)
    scores = (scores - scores.amax(-1, keepdim=True)) / heat  # the maximum becomes 0, so that no score overflows
    cut = [k for k, r in enumerate(rows) if r.sampling.top_k or r.sampling.top_p < 1 or r.sampling.min_p]
    keys = sent(torch.tensor([draw_key(r.seed, r.generated) for r in rows], dtype=torch.int32), scores.device)
    floor = None
    if cut:
        at = put_numbers(scores.device, cut)[0]
        floor = scores.new_full((len(rows), 1), -math.inf)
        floor.index_copy_(0, at, lowest_kept(scores.index_select(0, at), [rows[k].sampling for k in cut]))
    token_ids = _noisy(scores, floor, keys).argmax(-1)
    if not any(r.sampling.sampled_logprob and not r.unmodified for r in rows):
        return token_ids, scores.new_zeros(len(rows))
    remaining = scores if floor is None else scores.masked_fill(scores < floor, -math.inf)
    return token_ids, remaining.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def _noisy(scores: Tensor, floor: Tensor | None, keys: Tensor) -> Tensor:
    """Return score − log e for scores at or above the row's floor, otherwise −∞."""
    if floor is None:
        tokens = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        return scores - exponential(tokens, keys[:, None]).log_()
    row, token = ((scores >= floor) & (scores > -math.inf)).nonzero(as_tuple=True)
    noisy = torch.full_like(scores, -math.inf)
    noisy[row, token] = scores[row, token] - exponential(token.to(torch.int32), keys[row]).log_()
    return noisy


def lowest_kept(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Return the lowest score that each row keeps, (rows, 1).

    The limit is a score, not a rank: equal scores are kept or removed together, and the result does not
    depend on how a sort breaks ties.

    scores: (rows, vocabulary), with a maximum of 0
    """
    vocabulary = scores.shape[-1]
    floor = _numbers(scores, [math.log(s.min_p) if s.min_p else -math.inf for s in settings])[:, None]
    ks = [min(s.top_k or vocabulary, vocabulary) for s in settings]
    nucleus = [r for r, s in enumerate(settings) if s.top_p < 1]
    count = max([k for k in ks if k < vocabulary] + [min(NUCLEUS, vocabulary) if nucleus else 1])
    best = scores.topk(count).values
    if few := [r for r, k in enumerate(ks) if k < vocabulary]:
        at, rank = put_numbers(scores.device, few, [ks[r] - 1 for r in few])
        lowest = best.index_select(0, at).gather(1, rank[:, None])
        floor.index_copy_(0, at, torch.maximum(floor.index_select(0, at), lowest))
    if not nucleus:
        return floor
    at = put_numbers(scores.device, nucleus)[0]
    row_scores, least = scores.index_select(0, at), floor.index_select(0, at)
    total = row_scores.masked_fill(row_scores < least, -math.inf).logsumexp(-1, keepdim=True)
    share = sent(torch.tensor([[settings[r].top_p] for r in nucleus], dtype=torch.float64), scores.device)
    lowest, complete = _nucleus(best.index_select(0, at), least, total, share)
    if count < vocabulary and not complete.all():  # seldom, because most nuclei are small
        some = (~complete).nonzero().flatten()
        order = row_scores[some].sort(descending=True).values
        lowest[some] = _nucleus(order, least[some], total[some], share[some])[0]
    floor.index_copy_(0, at, torch.maximum(least, lowest))
    return floor


def _nucleus(order: Tensor, floor: Tensor, total: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest score in the nucleus, and whether `order` contains the whole nucleus.

    A token is in the nucleus if all better tokens together have less than `share` of the probability of the
    scores at or above `floor`.

    order: the best scores, descending
    """
    order = order.masked_fill(order < floor, -math.inf)
    p = (order - total).double().exp_()
    stays = p.cumsum(-1).sub_(p) < share
    stays[:, 0] = True
    all_of_it = share >= 1
    lowest = order.masked_fill(~stays, math.inf).amin(-1, keepdim=True).masked_fill(all_of_it, -math.inf)
    return lowest, ~stays[:, -1] | (order[:, -1] == -math.inf) | all_of_it[:, 0]


def scored(logits: Tensor, ids: Tensor, counts: Sequence[int]) -> list[SampledToken]:
    """Return the log-probabilities of given tokens, with `counts[i]` alternatives for token i.

    logits: (n, vocabulary), n > 0; ids: (n,)
    """
    numbers, *parts = _read(ids, *_logprobs(logits, ids, max(counts)))
    return _sampled([int(n) for n in numbers], counts, *parts)


def _logprobs(logits: Tensor, ids: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens' log-probabilities, and the `most` best tokens.

    Shapes: log-probabilities (n,); log-probabilities and ids of the best tokens (n, most).
    """
    logits = logits.float()
    tokens = _best(logits, min(most, logits.shape[-1])) if most else ids.new_empty(len(ids), 0)
    p = logits.log_softmax(-1)
    return p.gather(-1, ids[:, None])[:, 0], p.gather(-1, tokens), tokens


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` best scores, best first.

    Of tied scores, the lower id comes first, as in argmax. Ties are common in 16-bit scores, and `topk`
    returns different tied tokens for different k.

    scores: (n, vocabulary), float32
    """
    least = scores.topk(max(1, count)).values[:, -1:]
    row, token = (~(scores < least)).nonzero(as_tuple=True)  # at least `count` per row, including nan
    order = scores[row, token].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row_counts = row.bincount(minlength=len(scores))
    first = (row_counts.cumsum(0) - row_counts)[:, None]
    return token[order][first + torch.arange(count, device=scores.device)]


def _read(*tensors: Tensor) -> list[list[float]]:
    """Return the values of each tensor. Reads the device once.

    The values are float32, which represents every token id below 2²⁴ exactly.
    """
    flat: list[float] = torch.cat([t.flatten().float() for t in tensors]).cpu().tolist()
    out, at = [], 0
    for tensor in tensors:
        out.append(flat[at : at + tensor.numel()])
        at += tensor.numel()
    return out


def _sampled(
    ids: Sequence[int],
    counts: Sequence[int],
    logprobs: Sequence[float],
    values: Sequence[float],
    tokens: Sequence[float],
) -> list[SampledToken]:
    """Build the results. `values` and `tokens` have the same number of entries for every row."""
    each = len(values) // max(1, len(ids))
    out = []
    for r, (token, n, logprob) in enumerate(zip(ids, counts, logprobs, strict=True)):
        best = slice(r * each, r * each + min(n, each))
        out.append(
            SampledToken(token, logprob, tuple((int(t), v) for t, v in zip(tokens[best], values[best], strict=True)))
        )
    return out


# -- randomness: a hash of (seed, position, token) ---------------------------------------------------------------------


def draw_key(seed: int, position: int) -> tuple[int, int]:
    """Return two signed 32-bit words, computed with splitmix64 (Steele and others 2014).

    Hashes the seed, then the sum of the result and the position.
    """
    z = _splitmix(_splitmix(seed) + position)
    low, high = z & 0xFFFFFFFF, z >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def _splitmix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def exponential(tokens: Tensor, keys: Tensor) -> Tensor:
    """Return Exp(1) noise, float32, one value per token and key.

    tokens: (…), int32; keys: (…, 2), int32
    """
    x = _mix_(tokens ^ keys[..., 0])
    x = _mix_(x.add_(keys[..., 1])).bitwise_and_(0x7FFFFFFF)
    u = x.float().add_(0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
    return u.neg_().log1p_().neg_()  # accurate for small values, which win the argmax


def _mix_(x: Tensor) -> Tensor:
    """Mix every bit of 32-bit words, in place, with a bijection (Wellons' lowbias32).

    The masks make the shifts logical.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
