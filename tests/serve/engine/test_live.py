"""Sampling during training uses the adapter's current values.

The sampler returns the same log-probabilities that the trainer computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.serve.forward.test_runner import base_of, trained
from tests.tiny_base import VOCAB_SIZE
from veneer.core.attach import Attachment, attach
from veneer.errors import ConfigError
from veneer.models.text.base import TextBase
from veneer.models.text.fast import fast
from veneer.models.text.logprob_replay import replayed_logps
from veneer.models.text.loss import token_logps
from veneer.ops.quantized import quantize
from veneer.serve.engine.live import live_sampler
from veneer.train.checkpoint import seed_of
from veneer.train.text.prompts import collate_shared
from veneer.train.text.rollouts import CompletionRequest, Rollout, Sampler, SamplerSettings, SamplingParams

PROMPTS = [tuple(range(5, 45)), tuple(range(60, 67))]
HOW = SamplingParams(max_tokens=12)


@contextmanager
def drawing(
    dtype: torch.dtype = torch.float32, codes: str = "", **settings: Any
) -> Iterator[tuple[TextBase, Attachment, Sampler]]:
    """Yield a tiny base prepared for training, an attachment with the adapter "run", and a sampler."""
    model: Any = families.llama3(vocab_size=VOCAB_SIZE).to(dtype)
    for module in model.modules() if codes else ():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = nn.Parameter(quantize(module.weight.detach(), codes), requires_grad=False)
    base = base_of(model)
    with attach(model) as attachment:
        attachment.add("run", trained(model, 1), trainable=True)
        with live_sampler(base, attachment, SamplerSettings(rows=4, **settings)) as sampler, fast(model):
            attachment.use("run")
            yield base, attachment, sampler


def asked(adapter: str = "run", how: SamplingParams = HOW, each: int = 2) -> list[CompletionRequest]:
    return [CompletionRequest(p, seed_of(i, j), how, adapter) for i, p in enumerate(PROMPTS) for j in range(each)]


def rows(drawn: list[Rollout]) -> tuple[Tensor, list[int], Tensor]:
    ids = [t for r in drawn for t in (*r.prompt, *r.tokens)]
    said = [k >= len(r.prompt) for r in drawn for k in range(len(r.prompt) + len(r.tokens))]
    return torch.tensor(ids), [len(r.prompt) + len(r.tokens) for r in drawn], torch.tensor(said)


def logps(drawn: list[Rollout]) -> Tensor:
    return torch.tensor([x for r in drawn for x in r.logps])


@pytest.mark.parametrize(
    ("dtype", "codes"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "nf4"), ("float32", "nf4")]
)
def test_trainer_and_sampler_log_probabilities_are_bitwise_equal(dtype: str, codes: str) -> None:
    with drawing(getattr(torch, dtype), codes) as (base, attachment, sampler):
        drawn = sampler.sample(asked())
        ids, lengths, said = rows(drawn)
        replay = sampler.replay(ids, lengths, said, "run")
        found = replayed_logps(base.model, ids, lengths, said, replay)
        assert torch.equal(found, logps(drawn))
        parameters = list(attachment.parameters("run").values())
        gradients = torch.autograd.grad(found.sum(), parameters)
        batch, shared = collate_shared(drawn)  # the same batch, but each shared prompt is stored once
        assert len(batch.input_ids) == len(ids) - sum(map(len, PROMPTS))
        once = batch.input_ids, lengths, batch.trained
        replay = sampler.replay(*once, "run", shared)
        found = replayed_logps(base.model, *once, replay, shared)
        assert torch.equal(found, logps(drawn))
        for mine, theirs in zip(torch.autograd.grad(found.sum(), parameters), gradients, strict=True):
            assert float((mine - theirs).norm()) < (1e-5 if dtype == "float32" else 0.05) * float(theirs.norm())
        if dtype == "float32":  # float32 rounding is small enough for a comparison with the model's forward pass
            own = token_logps(base.model, ids, lengths, said)
            torch.testing.assert_close(own, found)
            for mine, theirs in zip(gradients, torch.autograd.grad(own.sum(), parameters), strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def test_recomputed_layers_have_the_same_gradient() -> None:
    with drawing() as (base, attachment, sampler):
        ids, lengths, said = rows(sampler.sample(asked()))
        parameters = list(attachment.parameters("run").values())
        base.model.train()

        def gradients() -> tuple[Tensor, ...]:
            found = replayed_logps(base.model, ids, lengths, said, sampler.replay(ids, lengths, said, "run"))
            return torch.autograd.grad(found.sum(), parameters)

        kept = gradients()
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        for a, b in zip(kept, gradients(), strict=True):
            torch.testing.assert_close(a, b)


def test_an_answer_depends_only_on_its_seed() -> None:
    with drawing() as (_, _, sampler):
        together = sampler.sample(asked(each=3))
        assert len({r.tokens for r in together[:3]}) > 1
        for wanted, r in zip(asked(each=3), together, strict=True):
            (alone,) = sampler.sample([wanted])
            assert (alone.tokens, alone.logps) == (r.tokens, r.logps)
        # the first row of each prompt's group computes the prompt; the others reuse all but its last token
        assert [r.cached for r in together] == [0, 39, 39, 0, 6, 6]
        base = sampler.sample(asked(""))
        assert [r.logps for r in base] != [r.logps for r in sampler.sample(asked())]


def test_sampling_uses_the_values_of_the_last_step() -> None:
    with drawing() as (_, attachment, sampler):
        before = sampler.sample(asked())
        assert [r.cached for r in sampler.sample(asked())][:2] == [39, 39]
        with torch.no_grad():
            for parameter in attachment.parameters("run").values():
                parameter += 0.05
        after = sampler.sample(asked())
        assert after[0].cached == 0
        assert after[0].logps != before[0].logps
        assert torch.equal(sampler.replay(*rows(after), "run").logps(), logps(after))


def test_sampled_and_model_log_probabilities_are_both_reported() -> None:
    with drawing() as (base, _, sampler):
        for how in (SamplingParams(12, temperature=0.6), SamplingParams(12, top_p=0.6), SamplingParams(12)):
            drawn = sampler.sample(asked(how=how))
            for r in drawn:
                with torch.no_grad():
                    scores = base.model(input_ids=torch.tensor([[*r.prompt, *r.tokens]])).logits[0].double()
                scores = scores[len(r.prompt) - 1 : -1] / how.temperature
                sorted_, order = scores.softmax(-1).sort(descending=True)
                beyond = (sorted_.cumsum(-1) - sorted_ >= how.top_p) & (how.top_p < 1)
                scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
                wanted = scores.log_softmax(-1).gather(-1, torch.tensor(r.tokens)[:, None])[:, 0]
                torch.testing.assert_close(
                    torch.tensor(r.sampling_logps, dtype=torch.float64), wanted, atol=1e-4, rtol=1e-4
                )
            assert (how == HOW) == all(r.sampling_logps == r.logps for r in drawn)


def test_grammars_limits_and_interruptions_are_obeyed() -> None:
    with drawing() as (_, _, sampler):
        pattern = "(yes|no) ?[0-9]{2}"
        for r in sampler.sample(asked(how=SamplingParams(12, grammar=("regex", pattern)))):
            assert re.fullmatch(pattern, r.text)
        assert all(r.cut == (len(r.tokens) == 12) for r in sampler.sample(asked()))
        assert sampler.sample(asked(how=SamplingParams(100)), lambda: True) is None
        assert len(sampler.sample(asked())) == 4


def test_a_base_the_engine_cannot_run_is_refused() -> None:
    model: Any = families.gemma3(vocab_size=VOCAB_SIZE)
    with (
        attach(model) as attachment,
        pytest.raises(ConfigError, match="Llama"),
        live_sampler(base_of(model), attachment),
    ):
        pass


def test_sampling_keeps_the_fast_paths_of_training() -> None:
    """Rows are not padded, and log-probabilities equal those of the training forward pass."""
    model: Any = families.llama3(vocab_size=VOCAB_SIZE)
    before = model.config._attn_implementation
    with attach(model) as attachment:
        attachment.add("run", trained(model, 1), trainable=True)
        settings = SamplerSettings(rows=4, exact=False)
        with live_sampler(base_of(model), attachment, settings) as sampler, fast(model) as how:
            assert "LlamaAttention" in how.summary()
            attachment.use("run")
            drawn = sampler.sample(asked())
            ids, lengths, said = rows(drawn)
            assert torch.allclose(token_logps(model, ids, lengths, said), logps(drawn), atol=1e-5)
    assert model.config._attn_implementation == before
