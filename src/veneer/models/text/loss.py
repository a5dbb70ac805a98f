"""Log-likelihood of packed rows, and the training loss of a language model.

    nll_i = −log p(token i | the tokens before it in its own row)      for each token with trained[i]

    text_loss    Σ nll over all rows                 for supervised training and evaluation
    row_logps    −Σ nll of each row                  for preference losses
    token_logps  −nll of each token                  for reinforcement learning
    hidden_at, target_logps    log p of any tokens after given positions, not only the rows' next tokens
    chunked_logits             a function of the complete logits at given positions
    compared_logits            a function of these logits and another model's logits: for distillation

Inside `fast`, rows run without padding if the model's family supports packed rows. Otherwise, rows are
padded. The padded version is the slow reference for the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.models.patching import fast_report, projection_of
from veneer.ops.attention import RowLayout, SharedRows
from veneer.ops.device_transfer import sent
from veneer.ops.lora_segments import LoraSegments
from veneer.ops.loss import is_top_token, token_nll
from veneer.ops.step_sizes import HEAD_CHUNK, padded_tokens, rounded_sizes


def text_loss(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, correct: Tensor | None = None
) -> Tensor:
    """Return the summed negative log-likelihood in float32.

    input_ids: (N,) with N = Σ lengths. trained: (N,) bool, preferably on the CPU: the host reads `trained`
    and would otherwise wait for the device. `correct`: (trained tokens,) bool on the model's device, which
    the function fills: True if no other token has a higher probability. Raises ValueError if the lengths do
    not add up to N, or if a row's first token is trained, because no token predicts it."""
    return _text_nll(model, input_ids, lengths, trained, correct).sum()


def row_logps(model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor) -> Tensor:
    """Return Σ log p of each row's trained tokens, (rows,) float32.

    The sum is 0 for a row without trained tokens. Arguments: as in `text_loss`."""
    nll = _text_nll(model, input_ids, lengths, trained)
    counts = torch.stack([part.sum() for part in trained.split(list(lengths))]).tolist()
    return -torch.stack([part.sum() for part in nll.split(counts)])


def token_logps(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, shared: SharedRows | None = None
) -> Tensor:
    """Return log p of each trained token, in order: (M,), float32.

    Arguments are the same as for `text_loss`. `shared`: set for rows that share tokens; shared tokens are
    computed only once. In this case, `input_ids` and `trained` contain the N distinct tokens, `lengths`
    contains the lengths of the whole rows, and no trained token belongs to two rows."""
    return -_text_nll(model, input_ids, lengths, trained, shared=shared)


def _text_nll(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    trained: Tensor,
    correct: Tensor | None = None,
    shared: SharedRows | None = None,
) -> Tensor:
    """Return the NLL of each trained token, in order: (M,)."""
    tokens = len(input_ids if shared is None else shared.places)
    if sum(lengths) != tokens or len(trained) != len(input_ids):
        raise ValueError(f"lengths add up to {sum(lengths)}, input_ids {tokens}, trained {len(trained)}")
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    starts = starts if shared is None else shared.places.to(starts.device)[starts]
    if trained[starts.to(trained.device)].any():
        raise ValueError("the first token of a row is marked as trained, but no token before it predicts it")
    if fast_report(model).rows and not _exceeds_llama4_limits(model, lengths):
        return rows_nll(model, input_ids, lengths, trained, correct=correct, shared=shared)
    if shared is not None:
        input_ids, trained = (t[shared.places.to(t.device)] for t in (input_ids, trained))
    return padded_nll(model, input_ids, lengths, trained, correct)


def rows_nll(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    trained: Tensor,
    layout: RowLayout | None = None,
    rounded: bool | None = None,
    segments: LoraSegments | None = None,
    correct: Tensor | None = None,
    shared: SharedRows | None = None,
) -> Tensor:
    """Return −log p of each trained token, (M,), computed without padding.

    The model must be inside `fast`. Logits are computed only at trained positions. `layout`: a layout with
    the same lengths, which records the layers that used it. `rounded`: whether to pad the number of tokens,
    and the number of positions with an output, to one of `rounded_sizes`; None pads if padding is faster. The
    padding comes after the real tokens, so it does not change their dropout or results. `segments`: LoRA
    segments of these tokens, selected in the attachment. `correct`: as in `text_loss`; `shared`: as in
    `token_logps`."""
    trained_at = sent(trained.nonzero()[:, 0], input_ids.device)
    hidden, at = _rows_hidden(model, input_ids, lengths, trained_at, layout, rounded, segments, shared)
    row_correct = None if correct is None else correct.new_empty(len(at))
    nll = _head_nll(model, hidden, input_ids[at], row_correct)[: len(trained_at)]
    if correct is not None and row_correct is not None:
        correct.copy_(row_correct[: len(correct)])
    return nll


def hidden_at(
    model: Any, input_ids: Tensor, lengths: Sequence[int], positions: Tensor, segments: LoraSegments | None = None
) -> Tensor:
    """Return the head's input at each of `positions` in packed rows: (M, d).

    positions: M ascending indices into input_ids. Inside `fast`, the rows run without padding if the model
    supports it, and `segments` applies as in `rows_nll`."""
    if fast_report(model).rows and not _exceeds_llama4_limits(model, lengths):
        return _rows_hidden(model, input_ids, lengths, positions + 1, None, None, segments)[0][: len(positions)]
    rows = nn.utils.rnn.pad_sequence(list(input_ids.split(list(lengths))), batch_first=True)
    mask = sent((torch.arange(rows.shape[1])[None] < torch.tensor(list(lengths))[:, None]).long(), rows.device)
    hidden = _decoder(model)(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
    selected: Tensor = hidden[mask.bool()][positions]
    return selected


def target_logps(
    model: Any, hidden: Tensor, targets: Tensor, acting: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """Return log p of k target tokens after each position, (M, k) float32.

    hidden: (M, d), from `hidden_at`; targets: (M, k). `acting`: returns a context manager that is entered
    whenever the head runs, for example to use another adapter than the active one."""
    with acting():
        if targets.shape[1] == 1 and _plain_head(model, hidden) is not None:
            return -_head_nll(model, hidden, targets[:, 0])[:, None]

    def part(logits: Tensor, rows: slice) -> Tensor:
        return logits.log_softmax(dim=-1).gather(1, targets[rows])

    return chunked_logits(model, hidden, part, acting)


def compared_logits(
    model: Any,
    hidden: Tensor,
    their_logits: Callable[[slice], Tensor],
    compare: Callable[[Tensor, Tensor, slice], Tensor],
) -> Tensor:
    """Return compare(logits, their logits, rows), computed in chunks of rows.

    hidden: (M, d), from `hidden_at`. `their_logits`: returns the other model's logits for a slice of the
    rows, without a gradient. Logits are float32. They are limited to the token ids that exist in both models,
    because some bases pad their vocabulary. Only one chunk of logits exists at a time, and the backward pass
    recomputes the logits."""

    def part(ours: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            theirs = their_logits(rows).to(ours.device)
        shared = min(ours.shape[-1], theirs.shape[-1])
        return compare(ours[:, :shared], theirs[:, :shared], rows)

    return chunked_logits(model, hidden, part)


def chunked_logits(
    model: Any,
    hidden: Tensor,
    compute: Callable[[Tensor, slice], Tensor],
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return compute(logits, rows), computed in chunks of rows and concatenated.

    hidden: (M, d), from `hidden_at`. `acting`: as in `target_logps`. Logits are float32. Only one chunk of
    logits exists at a time, and the backward pass recomputes the logits. If `compute` fills a tensor, that
    tensor must be in the closure of `compute`: checkpointing saves arguments for the backward pass and fails
    if they have changed."""

    def part(rows: slice, x: Tensor) -> Tensor:
        with acting():
            logits = head_logits(model, x)
        return compute(logits, rows)

    out = []
    for i in range(0, max(1, len(hidden)), HEAD_CHUNK):
        rows = slice(i, i + HEAD_CHUNK)
        if torch.is_grad_enabled():
            out.append(torch.utils.checkpoint.checkpoint(part, rows, hidden[rows], use_reentrant=False))
        else:
            out.append(part(rows, hidden[rows]))
    return torch.cat(out)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the head's logits, (M, vocabulary) float32, for a result of `hidden_at`."""
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
    segments: LoraSegments | None,
    shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the head's inputs for predicting the tokens at indices `at`, `at` itself).

    If `rounded`, both results are padded at the end. The last index in `at` can be one past the last
    token."""
    device, count = input_ids.device, len(at)
    if rounded is None:
        weight = model.get_input_embeddings().weight  # On the CPU, oneDNN computes 16-bit products.
        rounded = layout is None and device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    if rounded:
        idle = padded_tokens(len(input_ids), count) - len(input_ids)
        input_ids = torch.cat([input_ids, input_ids[:1].expand(idle)])
        at = torch.cat([at, at[-1:].expand(rounded_sizes(count) - count)]) if count else at
        layout = RowLayout(lengths, device, idle=idle, shared=shared)
    layout = RowLayout(lengths, device, shared=shared) if layout is None else layout
    previous = at - 1 if layout.shared is None else layout.shared.before[at]
    layout.keep = previous if fast_report(model).keeps else None
    if segments is not None:
        segments.sizes = len(input_ids), len(at)
    # transformers leaves a 4-d mask unchanged, so passing one avoids building an N × N mask. The attention
    # interface of fast.py uses the layout and ignores the mask.
    untouched = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    out = _decoder(model)(
        input_ids=input_ids[None],
        position_ids=layout.positions[None],
        attention_mask=untouched,
        use_cache=False,
        row_layout=layout,
    )
    hidden = out.last_hidden_state[0]
    # If an adapter replaces the last layer completely, the layer returns all positions. Their number is
    # always greater than len(at), because first tokens are not trained.
    return (hidden if len(hidden) == len(at) else hidden[previous]), at


def _decoder(model: Any) -> Any:
    """Return the model without its head.

    In some families, `get_decoder` returns the whole model."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder


def padded_nll(
    model: Any, input_ids: Tensor, lengths: Sequence[int], trained: Tensor, correct: Tensor | None = None
) -> Tensor:
    """Compute −log p of each trained token, (M,), with the reference implementation.

    The reference uses padded rows, the model's original forward and a float32 loss. `correct`: as in
    `text_loss`."""
    rows = nn.utils.rnn.pad_sequence(list(input_ids.split(list(lengths))), batch_first=True)
    padded = nn.utils.rnn.pad_sequence(list(trained.split(list(lengths))), batch_first=True)
    mask = torch.arange(rows.shape[1])[None] < torch.tensor(list(lengths))[:, None]
    mask = sent(mask.long(), rows.device)
    logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
    row, column = (sent(at, rows.device) for at in padded[:, 1:].nonzero(as_tuple=True))
    return _logits_nll(logits[row, column], rows[row, column + 1], correct)


def _logits_nll(logits: Tensor, targets: Tensor, correct: Tensor | None) -> Tensor:
    if correct is not None:
        correct.copy_(is_top_token(logits.detach(), targets))
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _head_nll(model: Any, hidden: Tensor, targets: Tensor, correct: Tensor | None = None) -> Tensor:
    """Return −log softmax(head(hidden))[target], (M,).

    hidden: (M, d), targets: (M,), correct: (M,) or None."""
    if (weight := _plain_head(model, hidden)) is not None:
        return token_nll(hidden, weight, targets, copies=fast_report(model).head, correct=correct)

    def part(logits: Tensor, rows: slice) -> Tensor:
        return _logits_nll(logits, targets[rows], None if correct is None else correct[rows])

    return chunked_logits(model, hidden, part)


def _plain_head(model: Any, hidden: Tensor) -> Tensor | None:
    """Return the head's weight if the logits are a plain product with it, else None."""
    plain = projection_of(model.get_output_embeddings())
    if plain is None or plain.products or plain.bias is not None or plain.weight.dtype != hidden.dtype:
        return None
    return None if getattr(model.config, "final_logit_softcapping", None) else plain.weight


def _exceeds_llama4_limits(model: Any, lengths: Sequence[int]) -> bool:
    """Return whether the rows are too long for Llama 4 to run packed.

    Llama 4's chunked attention equals causal attention only within one chunk. Its layers without position
    embeddings scale queries by the position in the whole batch, starting at `floor_scale`."""
    config = model.config.get_text_config()
    chunk, floor = getattr(config, "attention_chunk_size", None), getattr(config, "floor_scale", None)
    if chunk is not None and max(lengths) > chunk:
        return True
    return floor is not None and bool(getattr(config, "attn_temperature_tuning", False)) and sum(lengths) >= floor
