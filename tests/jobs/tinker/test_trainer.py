"""A client's steps equal those of `veneer train` and of PEFT.

Shared passes equal separate passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.jobs.tinker.small import ROWS, small_base
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import ConfigError, TrainingError
from veneer.jobs.tinker.losses import needed_inputs, row_loss
from veneer.jobs.tinker.trainer import ALPHA, Adam, Lora, PassWork, Trainer, check_rows, target_names
from veneer.jobs.tinker.wire import WireRow
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss
from veneer.models.text.module_copy import copy_modules
from veneer.train.optim import make_optimizer


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    made = Trainer(small_base())
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_learners(trainer: Trainer) -> Iterator[None]:
    """Remove learners that a failed test left behind."""
    yield
    for learner in list(trainer.learners.values()):
        trainer.drop(learner)


def work(trainer: Trainer, learner: Any, rows: list[list[int]], weight: float = 1.0, backward: bool = True) -> PassWork:
    given = []
    for row in rows:
        inputs = {"target_tokens": np.array(row[1:]), "weights": np.full(len(row) - 1, weight, "f4")}
        given.append(WireRow(np.array(row[:-1]), inputs))
    made = check_rows(given, "cross_entropy", {}, vocabulary=trainer.vocabulary, context=small_base().context)
    return PassWork(learner, made, "cross_entropy", {}, backward)


def done(trainer: Trainer, *works: PassWork) -> None:
    while left := [each for each in works if not each.done]:
        trainer.step(left)


def test_step_equals_veneer_train_bit_for_bit(trainer: Trainer) -> None:
    """Covers the forward pass, the backward pass and AdamW.

    The loss of `veneer train` is a mean over n trained tokens, so cross_entropy gets the weight 1/n for each
    token."""
    lora = Lora(4, seed=3, unembed=False)
    learner = trainer.create("one", lora)
    count = sum(len(row) - 1 for row in ROWS)
    for _ in range(2):
        done(trainer, work(trainer, learner, ROWS, 1 / count))
        trainer.optimize(learner, Adam(learning_rate=1e-2, beta2=0.999, eps=1e-8))
    own = copy_modules(small_base())
    with ExitStack() as undo:
        attachment = undo.enter_context(attach(own.model))
        attachment.add("own", create(own.model, lora.spec(target_names(own.model)), seed=3), trainable=True)
        attachment.use("own")
        undo.enter_context(fast(own.model))
        parameters = attachment.parameters("own")
        optimizer = make_optimizer(parameters, learning_rate=1e-2, eps=1e-8)
        ids, lengths = torch.tensor([token for row in ROWS for token in row]), [len(row) for row in ROWS]
        trained = torch.cat([torch.arange(n) > 0 for n in lengths])
        for _ in range(2):
            (text_loss(own.model, ids, lengths, trained) / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, learner.parameters[name]), name
    trainer.drop(learner)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
@pytest.mark.parametrize("unembed", [False, True])
def test_gradients_equal_transformers_with_peft(trainer: Trainer, unembed: bool) -> None:
    """Compares log-probabilities, the loss, and the gradient of every A and B."""
    learner = trainer.create("one", Lora(3, seed=1, unembed=unembed))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(learner.parameters.items()):
            if name.endswith(".B"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(i))
    one = work(trainer, learner, ROWS)
    done(trainer, one)
    model = AutoModelForCausalLM.from_pretrained(small_base().directory, dtype=torch.float32)
    targets = sorted({name.rpartition(".")[0] for name in learner.parameters})
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=ALPHA, target_modules=targets))
    theirs = dict(peft.named_parameters())
    pairs = {
        name: theirs[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"] for name in learner.parameters
    }
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(learner.parameters[name])
    total = torch.zeros(())
    for row, logps in zip(ROWS, one.logps, strict=True):
        logits = peft(input_ids=torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        found = logits.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        assert torch.allclose(found, logps, atol=1e-5)
        total = total - found.sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(one.total, rel=1e-5)
    for name, parameter in pairs.items():
        mine, theirs_ = learner.parameters[name].grad, parameter.grad
        assert torch.allclose(mine, theirs_, atol=1e-5 * float(theirs_.abs().max())), name
    trainer.drop(learner)


def test_shared_pass_equals_separate_passes(trainer: Trainer) -> None:
    """Log-probabilities and gradients are equal; a pass without backward has no gradients."""
    kinds = {"a": Lora(2, 1), "b": Lora(8, 2, mlp=False), "c": Lora(3, 3, attention=False, unembed=False)}
    separately: dict[str, Any] = {}
    for name, lora in kinds.items():
        learner = trainer.create(name, lora)
        one = work(trainer, learner, ROWS)
        done(trainer, one)
        separately[name] = one, {key: p.grad.clone() for key, p in learner.parameters.items() if p.grad is not None}
        trainer.drop(learner)
    learners = {name: trainer.create(name, lora) for name, lora in kinds.items()}
    assert all(not learner.separate_reason for learner in learners.values())
    works = [work(trainer, learner, ROWS, backward=name != "c") for name, learner in learners.items()]
    assert trainer.step(works) == works
    for (name, learner), one in zip(learners.items(), works, strict=True):
        before, gradients = separately[name]
        assert one.total == pytest.approx(before.total, rel=1e-6)
        for mine, theirs in zip(one.logps, before.logps, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
        for key, parameter in learner.parameters.items():
            if name == "c":
                assert parameter.grad is None
            else:
                assert torch.allclose(parameter.grad, gradients[key], atol=1e-5 * float(gradients[key].abs().max()))
        trainer.drop(learner)


def test_state_is_restored_bit_for_bit(trainer: Trainer, tmp_path: Any) -> None:
    """The state includes moments, and the gradient since the last optimizer step."""
    learner = trainer.create("one", Lora(2, 5))
    done(trainer, work(trainer, learner, ROWS))
    trainer.optimize(learner, Adam(learning_rate=1e-2))
    done(trainer, work(trainer, learner, ROWS[:1]))
    trainer.write(learner, tmp_path, 3)
    trainer.optimize(learner, Adam(learning_rate=1e-2))
    kept = {name: p.detach().clone() for name, p in learner.parameters.items()}
    trainer.drop(learner)
    again = trainer.create("one", Lora(2, 5))
    trainer.read(again, tmp_path)
    trainer.optimize(again, Adam(learning_rate=1e-2))
    assert all(torch.equal(kept[name], p) for name, p in again.parameters.items())
    with pytest.raises(TrainingError, match="no gradient"):
        trainer.optimize(again, Adam(learning_rate=1e-2))
    trainer.drop(again)


def _reference(name: str, p: Any, q: Any, a: Any, w: Any) -> float:
    """Return the loss in float64, by the formula on Tinker's page."""
    ratio = np.exp(p - q)
    clipped = np.clip(ratio, 0.7, 1.1)
    losses = {
        "cross_entropy": -(w * p),
        "importance_sampling": -(ratio * a),
        "cispo": -(clipped * a * p),
        "ppo": -np.minimum(ratio * a, clipped * a),
        "dro": -(p * a - 0.05 * (p - q) ** 2),
    }
    return float(losses[name].sum())


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_loss_and_gradient_equal_the_formula(name: str) -> None:
    """Gradients are compared with finite differences, except for cispo.

    cispo's formula treats the clipped ratio as a constant."""
    draw = np.random.default_rng(4)
    p, q, a, w = (draw.normal(size=9) * scale for scale in (0.3, 0.3, 1.0, 1.0))
    options: dict[str, float | str] = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}
    options = {"ppo": options, "cispo": options, "dro": {"beta": 0.1}}.get(name, {})
    everything = {"weights": w, "logprobs": q, "advantages": a}
    row = {key: torch.tensor(everything[key]) for key in needed_inputs(name, options)}
    logps = torch.tensor(p, requires_grad=True)
    loss = row_loss(name, logps, row, options)
    assert float(loss.detach()) == pytest.approx(_reference(name, p, q, a, w))
    loss.backward()
    if name == "cispo":  # the clipped ratio is a constant
        wanted = -np.clip(np.exp(p - q), 0.7, 1.1) * a
    else:
        step = 1e-6 * np.eye(9)
        up = np.array([_reference(name, p + each, q, a, w) for each in step])
        down = np.array([_reference(name, p - each, q, a, w) for each in step])
        wanted = (up - down) / 2e-6
    assert logps.grad.numpy() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": []}, "the row's input has 0 tokens"),
        ({"tokens": [1, 2, 3]}, r"target_tokens has the shape \(2,\)"),
        ({"tokens": [1, 9999]}, "a token of the row's input is not in this base's vocabulary of 384"),
        ({"targets": [1, -2]}, "a token of the row's target_tokens is not"),
        ({"weights": [1.0]}, r"weights has the shape \(1,\), target_tokens \(2,\)"),
        ({"weights": [1.0, float("nan")]}, "weights has a value that is not finite"),
        ({"text_only": False}, "the row's input has a part that is not text"),
        ({"loss": "ppo"}, "ppo has no input 'weights'"),
        ({"loss": "importance"}, "'importance' is not a loss"),
        ({"options": {"beta": 1.0}}, "cross_entropy has no option 'beta'")
    ],
)  # fmt: skip
def test_invalid_row_is_named(row: dict[str, Any], said: str) -> None:
    wire = WireRow(
        np.array(row.get("tokens", [1, 2]), np.int64),
        {
            "target_tokens": np.array(row.get("targets", [2, 3])),
            "weights": np.array(row.get("weights", [1.0, 1.0]), "f4"),
        },
        row.get("text_only", True),
    )
    with pytest.raises(ConfigError, match=said):
        check_rows([wire], row.get("loss", "cross_entropy"), row.get("options", {}), vocabulary=384, context=256)


def test_trainer_shares_the_bases_tensors(trainer: Trainer) -> None:
    """The weights use no additional memory, and the base's modules do not change."""
    base = small_base()
    mine = {id(p) for p in base.model.parameters()}
    assert all(id(p) not in mine for p in trainer.model.parameters())
    assert not any("Lora" in type(module).__name__ for module in base.model.modules())
    other = copy_modules(base)
    for (name, a), (_, b) in zip(base.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
