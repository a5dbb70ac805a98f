"""A training step of a text run followed on a GPU that is not there, beside what the plan counts for it.

    found = traced_training(config, load, device)
    found.trace.peak, found.counted.peak · found.trace.waits

The base is made of its config alone (models/text/bare.py); the step is the run's own: the loop's forward, loss,
backward pass, clipping and optimizer over micro-batches of `load`. Two steps are taken, since the optimizer's state
comes with the first; the second is what is told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import ConfigError
from veneer.models.text.bare import bare_text, config_of, twin
from veneer.models.text.fast import fast
from veneer.plan.memory import Load, text_memory
from veneer.plan.plan import Plan
from veneer.plan.shape import model_shape
from veneer.plan.tables import Device
from veneer.plan.trace import Trace, traced
from veneer.plan.traced import TracedStep
from veneer.train.loop import Learner, Micro, Step, TrainingPlan, train
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.text.batches import Batch
from veneer.train.text.task import batch_loss, recompute_activations


def traced_plan(made: Plan, fields: Mapping[str, Any]) -> TracedStep:
    """A step of a plan, with the change that makes it fit, followed on its GPU. `fields`: the base's config.json."""
    if made.device.kind != "cuda":
        raise ConfigError("a trace is of a step on a GPU", fix="--gpu h100-80gb, or another of --list")
    if made.planned is None or made.planned[0].offload:
        raise ConfigError("what does not fit on one GPU is not traced", fix="a smaller base, or quantise it")
    load, device = made.planned
    if not isinstance(load, Load):
        raise ConfigError("steps on pictures are not traced yet", fix="leave --trace out")
    return traced_training(fields, load, device)


def traced_training(fields: Mapping[str, Any], load: Load, device: Device) -> TracedStep:
    """One step of `load` on a base of this config.json. Raises ConfigError for a family that is not known, and what
    torch raises where two devices meet."""
    config = config_of(fields)
    dtype: torch.dtype = getattr(torch, load.dtype)
    how = twin(config, dtype, load.quantise)
    with traced() as trace:
        model = bare_text(config, dtype=dtype, device="cuda", quantise=load.quantise)
        trace.hold("weights", [*model.parameters(), *model.buffers()])
        spec = load.spec or LoraSpec(rank=load.rank)
        with attach(model) as attachment:
            with torch.device("cuda"):
                attachment.add("traced", create(model, spec, seed=0), trainable=True)
            attachment.use("traced")
            parameters = attachment.parameters("traced")
            trace.hold("adapter", parameters.values())
            model.train()
            if load.checkpointing:
                recompute_activations(model)
            optimizer = make_optimizer(parameters, name=load.optimizer, learning_rate=1e-4)
            optimizer.register_step_pre_hook(lambda *_: _name(trace, parameters))
            with fast(model, like=how) as report:
                trace.hold("weights", model.parameters())  # some lie together now
                steps = [Step(tuple(_micro(load, config.vocab_size) for _ in range(min(load.micros, 2))))] * 2
                learner = _Traced(model, parameters, optimizer, trace)
                train(learner, TrainingPlan(steps, Schedule.of("constant", 2)), optimizer)
                ways = report.ways()
        shape = model_shape(model)
    return TracedStep(trace, text_memory(shape, load, device), ways, ends=("veneer/train/loop.py",))


def _name(trace: Trace, parameters: Mapping[str, nn.Parameter]) -> None:
    trace.hold("gradients", [p.grad for p in parameters.values()])


def _micro(load: Load, vocabulary: int) -> Micro:
    """A micro-batch of `load`: rows whose last tokens are trained, as answers are."""
    trained = torch.cat([torch.arange(n) >= max(1, round(n * (1 - load.trained))) for n in load.lengths])
    batch = Batch(torch.arange(load.tokens) % vocabulary, list(load.lengths), trained)
    return Micro(load.tokens, batch.trained_tokens, (0,), lambda: batch)


class _Traced(Learner):
    def __init__(
        self, model: Any, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, trace: Trace
    ) -> None:
        self.model, self.parameters, self.optimizer, self.trace = model, parameters, optimizer, trace

    def loss(self, batch: Batch) -> Tensor:
        return batch_loss(self.model, batch, torch.device("cuda"))

    def score(self, interrupted: Callable[[], bool]) -> None:
        """There is nothing held out."""
        return None

    def end_step(self, number: int) -> None:
        """After the first step the optimizer's state is there."""
        if number == 1:
            states = (t for state in self.optimizer.state.values() for t in state.values())
            self.trace.hold("optimizer", (t for t in states if isinstance(t, Tensor)))
            self.trace.begin()
