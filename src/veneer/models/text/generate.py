"""Generate text from prompts: greedy or sampled, batched, streamed.

Prompts of similar length form a batch, padded on the left. The last token of every row is therefore in the
last column, and positions count real tokens only. The decoding loop is transformers' `generate`. Every
setting is given explicitly, so sampling settings in a base's generation config are ignored. If a mix of
adapters is active on the model, it applies to generation.

Sampling depends only on the seed and the prompt's index. Each row has its own random generator, so a prompt
gets the same completion whatever the batch size and the other prompts in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from veneer.core.adapter import mix_text
from veneer.core.attach import active_mix
from veneer.errors import AdapterError, BaseError, ConfigError, DataError
from veneer.models.patching import without_dropout
from veneer.models.text.base import TextBase
from veneer.models.text.chat_messages import template_turn
from veneer.models.text.incremental_decoding import Pieces, decode_text
from veneer.ops.cpu.sharing import forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompt = str | Sequence[Mapping[str, str]]
"""A text to continue, or the messages of a conversation.

A text is used unchanged; messages are rendered by the chat template."""


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt.

    `ids` includes the stop token; `text` does not. `finish`: "stop" at a stop token, "length" at the token
    limit or at the end of the base's context."""

    text: str
    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int


def complete(
    base: TextBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    on_token: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Return a completion for every prompt, in order.

    With a `temperature` of 0, decoding is greedy. Above 0, logits are divided by `temperature` and restricted
    to the `top_k` largest (0: all) and to the smallest set with probability `top_p`. `on_token(index, piece)`
    is called as text is generated; all pieces with the same index, joined, are that completion's text. The
    model is in eval mode during the call and returns to its previous mode afterwards.

    Raises ConfigError for a setting out of range, DataError for an empty prompt or a prompt longer than the
    base's context, and BaseError for messages on a base without a chat template. If no token has a finite
    score, raises an AdapterError that names the active adapters, or BaseError if no adapter is active."""
    _check(max_new_tokens, temperature, top_p, top_k, batch_size)
    encoded = encode_prompts(base, prompts)
    out: dict[int, Completion] = {}
    with _eval_without_defaults(base.model):
        for batch, budget in _batches([len(ids) for ids in encoded], base.context, max_new_tokens, batch_size):
            rows = {i: encoded[i] for i in batch}
            sampler = _RowSampler(batch, temperature, top_p, top_k, seed) if temperature > 0 else None
            out.update(_run(base, rows, budget, sampler, on_token))
    return [out[i] for i in range(len(prompts))]


def encode_prompts(base: TextBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt. Raises the same errors as `complete`."""
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list, not a single text", fix="[prompt]")
    encoded = [encode_prompt(base, prompt) for prompt in prompts]
    for i, ids in enumerate(encoded):
        if not 0 < len(ids) < base.context:
            problem = f"has {len(ids):,} tokens; this base takes {base.context:,}" if ids else "is empty"
            message = f"prompt {i + 1} of {len(prompts)} {problem}"
            raise DataError(message, fix="shorten it" if ids else "write something")
    return encoded


def encode_prompt(base: TextBase, prompt: Prompt, **variables: Any) -> list[int]:
    """Return the token ids of a prompt.

    For a text, the tokenizer adds special tokens. For messages, the chat template renders the messages and
    the beginning of the assistant's turn. `variables`: template variables (tools,
    add_generation_prompt=False, family-specific variables)."""
    tokenizer = base.tokenizer
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer(rendered(base, prompt, **variables), add_special_tokens=False)["input_ids"])


def rendered(base: TextBase, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Return the messages rendered by the chat template, including special tokens.

    `variables`: as in `encode_prompt`."""
    if not base.has_chat_template:
        message = f"{base.name} has no chat template, so it takes texts, not messages"
        raise BaseError(message, fix="give the prompt as plain text")
    turns = [template_turn(m) for m in messages]
    try:
        options = {"add_generation_prompt": True, **variables}
        text: str = base.tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # A template that rejects its input can raise any exception.
        raise DataError(f"the chat template of {base.name} rejects these messages: {error}") from error
    return text


def _check(max_new_tokens: int, temperature: float, top_p: float, top_k: int, batch_size: int) -> None:
    for name, value, valid, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (all) or more"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
    ):
        if not valid:
            raise ConfigError(f"{name} is {value}", fix=f"{name} must be {expected}")


def _batches(lengths: list[int], context: int, budget: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield (prompt indices, maximum number of new tokens), longest prompts first.

    A prompt forms its own batch if fewer than `budget` tokens fit between the prompt and the context
    limit."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    roomy = [i for i in order if context - lengths[i] >= budget]
    for i in order[: len(order) - len(roomy)]:
        yield [i], context - lengths[i]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], budget


@contextmanager
def _eval_without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Set eval mode and an empty generation config inside the with-block.

    With the base's generation config, transformers would use its values for unset options."""
    from transformers import GenerationConfig

    previous, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with without_dropout(model):
            yield
    finally:
        model.generation_config = previous


def _run(
    base: TextBase,
    rows: dict[int, list[int]],
    budget: int,
    sampler: _RowSampler | None,
    on_token: Callable[[int, str], None] | None,
) -> dict[int, Completion]:
    """Generate one batch. `rows`: prompt index -> token ids."""
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(map(len, rows.values()))
    ids = torch.full((len(rows), width), base.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows.values()):
        ids[r, width - len(row) :] = torch.tensor(row)
        mask[r, width - len(row) :] = 1
    settings = GenerationConfig(
        max_new_tokens=budget,
        do_sample=False,  # The sampler perturbs the scores so that the argmax is a sample.
        eos_token_id=list(base.stop_ids) or None,
        pad_token_id=base.pad_id,
        use_cache=True,
    )
    texts = [Pieces(base.tokenizer) for _ in rows]
    stream = _Stream(list(rows), texts, set(base.stop_ids), on_token)
    with torch.no_grad(), forwards(base.model):
        generated = base.model.generate(
            ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([partial(_check_scores, base), *([sampler] if sampler else [])]),
            streamer=stream if on_token else None,
        )
    new = generated[:, width:].tolist()
    return {i: completion_of(base, new[r], len(rows[i])) for r, i in enumerate(rows)}


def _check_scores(base: TextBase, input_ids: Tensor, scores: Tensor) -> Tensor:
    """Return `scores`; raise an error if a row's maximum is not finite.

    scores: (rows, vocabulary). Without this check, such a row would generate the vocabulary's first token."""
    if bool(scores.amax(-1).isfinite().all()):
        return scores
    dtype, mix = str(base.dtype).removeprefix("torch."), active_mix(base.model)
    wider = "" if dtype == "float32" else "use --dtype float32"
    if not mix:
        raise BaseError(f"no token has a finite score: {base.name} overflowed in {dtype}", fix=wider or None)
    message = f"no token has a finite score under {mix_text(mix)}: {base.name} overflowed in {dtype}"
    raise AdapterError(message, fix=(f"{wider}, or " if wider else "") + "lower strengths")


def completion_of(base: TextBase, new: list[int], prompt_tokens: int) -> Completion:
    """Return the completion for the generated tokens, up to the first stop token."""
    end = next((k for k, token in enumerate(new) if token in base.stop_ids), None)
    ids = new if end is None else new[: end + 1]
    body = new if end is None else new[:end]
    return Completion(decode_text(base.tokenizer, body), tuple(ids), "length" if end is None else "stop", prompt_tokens)


class _RowSampler:
    """A logits processor that samples with the Gumbel-max trick.

    argmax(log p + g) with g = −log(−log u) is a sample from p. Each row has its own random generator on the
    CPU, so a sample does not depend on the batch or the device."""

    def __init__(self, indices: list[int], temperature: float, top_p: float, top_k: int, seed: int) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.streams = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in indices]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map logits (rows, vocabulary) to perturbed log-probabilities."""
        scores = scores.float()
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        u = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.streams])
        gumbel = -torch.log(-torch.log(u.clamp_min(1e-300)))
        return scores + gumbel.to(scores)


class _Stream:
    """A streamer for one batch, with the interface of transformers' streamers.

    `put` receives the prompts first, and then one token per row at a time."""

    def __init__(
        self, indices: list[int], texts: list[Pieces], stops: set[int], on_token: Callable[[int, str], None] | None
    ) -> None:
        self.indices, self.texts, self.stops = indices, texts, stops
        self.tell = on_token or (lambda _i, _piece: None)
        self.going = [True] * len(indices)
        self.prompts_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompts_seen:
            self.prompts_seen = True
            return
        for r, token in enumerate(value.tolist()):
            if self.going[r]:
                if token in self.stops:
                    self._close(r)
                elif piece := self.texts[r].add(token):
                    self.tell(self.indices[r], piece)

    def end(self) -> None:
        for r in range(len(self.indices)):
            if self.going[r]:
                self._close(r)

    def _close(self, r: int) -> None:
        self.going[r] = False
        if piece := self.texts[r].rest():
            self.tell(self.indices[r], piece)
