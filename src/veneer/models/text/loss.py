"""The log-likelihood of rows that lie one after another, and with it the training loss of a language model.

    nll_i = −log p(token i | the tokens before it in its own row)      for each token with trained[i]

    text_loss    Σ nll over all rows                 what supervised training and evaluation call
    row_logps    −Σ nll of each row                  what preferences are made of
    token_logps  −nll of each token                  what reinforcement is made of
    hidden_at, target_logps    log p of any tokens after any places, whatever comes there in the rows
    of_logits                  what is made of whole distributions there
    compared_logits            the same, beside another model's: what distillation is made of

Inside `fast` rows run without padding; elsewhere, and for families that do not take such rows, they are padded:
the slow reference, and what the fast one is checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.models.swap import projection_of, report_of
from veneer.ops.attention import RowLayout, SharedRows
from veneer.ops.device_transfer import sent
from veneer.ops.lora_segments import LoraSegments
from veneer.ops.loss import likeliest, token_nll
from veneer.ops.step_sizes import HEAD_CHUNK, ROW_STEP, few_sizes, padded_tokens


def text_loss(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, right: Tensor | None = None
) -> Tensor:
    """Summed negative log-likelihood, float32. input_ids: (N,) with N = Σ lengths, trained: (N,) bool. `right`: a bool
    for each trained token, on the model's device, which is filled on the way: whether no other token is likelier there.

    `trained` is read by the host: on the CPU, wherever the model is, nobody waits for the device. Raises ValueError if
    the lengths do not add up, or a row's first token is to be trained: nothing predicts it."""
    return _text_nll(model, input_ids, lengths, trained, right).sum()


def row_logps(model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor) -> Tensor:
    """Σ log p of each row's trained tokens: (rows,), float32, 0 for a row without any. Otherwise as `text_loss`."""
    nll = _text_nll(model, input_ids, lengths, trained)
    counts = torch.stack([part.sum() for part in trained.split(list(lengths))]).tolist()
    return -torch.stack([part.sum() for part in nll.split(counts)])


def token_logps(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, shared: SharedRows | None = None
) -> Tensor:
    """log p of each trained token, in order: (M,), float32. Otherwise as `text_loss`. `shared`: rows that have tokens
    in common, which are computed once: input_ids and trained are then of those N, lengths of whole rows, and no token
    that is trained is another row's too."""
    return -_text_nll(model, input_ids, lengths, trained, shared=shared)


def _text_nll(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    trained: Tensor,
    right: Tensor | None = None,
    shared: SharedRows | None = None,
) -> Tensor:
    """(M,): one for each trained token, in order."""
    tokens = len(input_ids if shared is None else shared.places)
    if sum(lengths) != tokens or len(trained) != len(input_ids):
        raise ValueError(f"lengths add up to {sum(lengths)}, input_ids {tokens}, trained {len(trained)}")
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    starts = starts if shared is None else shared.places.to(starts.device)[starts]
    if trained[starts.to(trained.device)].any():
        raise ValueError("the first token of a row is marked as trained, but no token before it predicts it")
    if report_of(model).rows and not _beyond(model, lengths):
        return rows_nll(model, input_ids, lengths, trained, right=right, shared=shared)
    if shared is not None:
        input_ids, trained = (t[shared.places.to(t.device)] for t in (input_ids, trained))
    return padded_nll(model, input_ids, lengths, trained, right)


def _rounds(weight: Tensor) -> bool:
    """Whether products of this weight are oneDNN's, in 16 bits on the CPU."""
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)


def rows_nll(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    trained: Tensor,
    layout: RowLayout | None = None,
    rounded: bool | None = None,
    spans: LoraSegments | None = None,
    right: Tensor | None = None,
    shared: SharedRows | None = None,
) -> Tensor:
    """−log p of each trained token, (M,), without padding and with logits at trained positions alone; for models within
    `fast`. `layout`: of those lengths, to see afterwards which layers used it.

    `rounded`: padding makes the tokens, and those of them whose output is wanted, one of `few_sizes`; None: where that
    pays. Real tokens come first, so neither their dropout nor anything else of them changes. `spans`: those that the
    attachment has selected, of these tokens. `right`: as `text_loss` has it; `shared`: as `token_logps`."""
    trained_at = sent(trained.nonzero()[:, 0], input_ids.device)
    hidden, at = _rows_hidden(model, input_ids, lengths, trained_at, layout, rounded, spans, shared)
    seen = None if right is None else right.new_empty(len(at))
    nll = _head_nll(model, hidden, input_ids[at], seen)[: len(trained_at)]
    if right is not None and seen is not None:
        right.copy_(seen[: len(right)])
    return nll


def hidden_at(
    model: Any, input_ids: Tensor, lengths: Sequence[int], places: Tensor, spans: LoraSegments | None = None
) -> Tensor:
    """What the head is given after each of `places` of rows one after another: (M, d), M = len(places). places: indices
    into input_ids, ascending. Without padding within `fast` where the model takes it; `spans` then, as `rows_nll`."""
    if report_of(model).rows and not _beyond(model, lengths):
        return _rows_hidden(model, input_ids, lengths, places + 1, None, None, spans)[0][: len(places)]
    rows = nn.utils.rnn.pad_sequence(list(input_ids.split(list(lengths))), batch_first=True)
    mask = sent((torch.arange(rows.shape[1])[None] < torch.tensor(list(lengths))[:, None]).long(), rows.device)
    hidden = _decoder(model)(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
    wanted: Tensor = hidden[mask.bool()][places]
    return wanted


def target_logps(
    model: Any, hidden: Tensor, targets: Tensor, acting: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """log p of each of k tokens after a place, float32: (M, k). hidden: (M, d), as `hidden_at`; targets: (M, k).
    `acting`: what the head runs within, whenever it does; for an adapter that is not the one which acts elsewhere."""
    with acting():
        if targets.shape[1] == 1 and _plain_head(model, hidden) is not None:
            return -_head_nll(model, hidden, targets[:, 0])[:, None]

    def part(logits: Tensor, chosen: slice) -> Tensor:
        return logits.log_softmax(dim=-1).gather(1, targets[chosen])

    return of_logits(model, hidden, part, acting)


def compared_logits(
    model: Any, hidden: Tensor, other: Callable[[slice], Tensor], compare: Callable[[Tensor, Tensor, slice], Tensor]
) -> Tensor:
    """compare(logits, other logits, places), joined, where the logits of a few places exist at once. hidden: (M, d), as
    `hidden_at`; `other` gives those of a part of the places, without a gradient. They are made again for the gradient.

    Logits are float32 and have the ids that both vocabularies have: some bases pad theirs."""

    def part(ours: Tensor, chosen: slice) -> Tensor:
        with torch.no_grad():
            theirs = other(chosen).to(ours.device)
        shared = min(ours.shape[-1], theirs.shape[-1])
        return compare(ours[:, :shared], theirs[:, :shared], chosen)

    return of_logits(model, hidden, part)


def of_logits(
    model: Any,
    hidden: Tensor,
    made: Callable[[Tensor, slice], Tensor],
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """made(logits, places), joined, where the logits of a few places exist at once, in float32. hidden: (M, d), as
    `hidden_at`; `acting`: as `target_logps`. They are made again for the gradient.

    What `made` fills on its way (a mark for each place) it has by itself: arguments of a checkpoint are kept for the
    backward pass, which refuses what was filled since."""

    def part(chosen: slice, x: Tensor) -> Tensor:
        with acting():
            logits = head_logits(model, x)
        return made(logits, chosen)

    out = []
    for i in range(0, max(1, len(hidden)), HEAD_CHUNK):
        chosen = slice(i, i + HEAD_CHUNK)
        if torch.is_grad_enabled():
            out.append(torch.utils.checkpoint.checkpoint(part, chosen, hidden[chosen], use_reentrant=False))
        else:
            out.append(part(chosen, hidden[chosen]))
    return torch.cat(out)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """What the model's head makes of `hidden_at`: (M, vocabulary), float32."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


def _rows_hidden(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    at: Tensor,
    layout: RowLayout | None,
    rounded: bool | None,
    spans: LoraSegments | None,
    shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """What the head is given before each token of `at`, and `at`; both with padding at their ends where it is rounded.
    The last place of all may be the end of the rows."""
    device, count = input_ids.device, len(at)
    if rounded is None:
        rounded = layout is None and _rounds(model.get_input_embeddings().weight)
    if rounded:
        idle = padded_tokens(len(input_ids), count) - len(input_ids)
        input_ids = torch.cat([input_ids, input_ids[:1].expand(idle)])
        at = torch.cat([at, at[-1:].expand(few_sizes(count) - count)]) if count else at
        layout = RowLayout(lengths, device, step=ROW_STEP, idle=idle, shared=shared)
    layout = RowLayout(lengths, device, shared=shared) if layout is None else layout
    before = at - 1 if layout.shared is None else layout.shared.before[at]
    layout.keep = before if report_of(model).keeps else None
    if spans is not None:
        spans.sizes = len(input_ids), len(at)
    # A 4-d mask is passed on untouched by transformers; it keeps an N × N one from being made. The attention interface
    # of fast.py goes by the layout and does not read it.
    untouched = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    out = _decoder(model)(
        input_ids=input_ids[None],
        position_ids=layout.positions[None],
        attention_mask=untouched,
        use_cache=False,
        row_layout=layout,
    )
    hidden = out.last_hidden_state[0]
    # A last layer that an adapter replaces whole gives all positions: always more, as first tokens are not trained.
    return (hidden if len(hidden) == len(at) else hidden[before]), at


def _decoder(model: Any) -> Any:
    """The model below the head. Some families' get_decoder returns the whole model."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder


def padded_nll(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, right: Tensor | None = None
) -> Tensor:
    """−log p of each trained token, (M,), by the reference: padded rows, the model's own forward, float32. `right`: as
    `text_loss` has it."""
    rows = nn.utils.rnn.pad_sequence(list(input_ids.split(list(lengths))), batch_first=True)
    wanted = nn.utils.rnn.pad_sequence(list(trained.split(list(lengths))), batch_first=True)
    mask = torch.arange(rows.shape[1])[None] < torch.tensor(list(lengths))[:, None]
    mask = sent(mask.long(), rows.device)
    logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
    row, place = (sent(at, rows.device) for at in wanted[:, 1:].nonzero(as_tuple=True))
    return _logits_nll(logits[row, place], rows[row, place + 1], right)


def _logits_nll(logits: Tensor, targets: Tensor, right: Tensor | None) -> Tensor:
    if right is not None:
        right.copy_(likeliest(logits.detach(), targets))
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _head_nll(model: Any, hidden: Tensor, targets: Tensor, right: Tensor | None = None) -> Tensor:
    """−log softmax(head(hidden))[target]: (M,). hidden: (M, d), targets: (M,), right: (M,) or None."""
    if (weight := _plain_head(model, hidden)) is not None:
        return token_nll(hidden, weight, targets, copies=report_of(model).head, right=right)

    def part(logits: Tensor, chosen: slice) -> Tensor:
        return _logits_nll(logits, targets[chosen], None if right is None else right[chosen])

    return of_logits(model, hidden, part)


def _plain_head(model: Any, hidden: Tensor) -> Tensor | None:
    """The head's weight where its logits are a product with that and nothing else."""
    plain = projection_of(model.get_output_embeddings())
    weight = plain.weight if plain is not None and not plain.products and plain.bias is None else None
    return weight if weight is not None and not _head_is_more(model.config) and weight.dtype == hidden.dtype else None


def _head_is_more(config: Any) -> bool:
    """Whether the family does something to the logits after the head."""
    return bool(getattr(config, "final_logit_softcapping", None))


def _beyond(model: Any, lengths: Sequence[int]) -> bool:
    """Whether rows beside one another are more than Llama 4 takes: its chunked attention is plain causal attention only
    within one chunk, and its layers without positions scale by the place in the whole batch from `floor_scale` on."""
    config = model.config.get_text_config()
    chunk, floor = getattr(config, "attention_chunk_size", None), getattr(config, "floor_scale", None)
    if chunk is not None and max(lengths) > chunk:
        return True
    return floor is not None and bool(getattr(config, "attn_temperature_tuning", False)) and sum(lengths) >= floor
