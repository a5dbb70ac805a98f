"""A training step followed on a GPU that is not there, beside what the plan counts for it.

    found = traced_training(config, load, device)            of a language model
    found = traced_together(config, loads, device)           of several runs on it, in one pass
    found = traced_pictures(config, load, device)            of a denoiser
    found.trace.peak, found.counted.peak · found.trace.waits

Large bases take minutes, so `say` is told of each phase as it begins. A signal stops it at once.

The base is made of its config alone (models/text/bare.py, models/image/bare.py); the step is the run's own: the loop's
forward, loss, backward pass, clipping and optimizer over micro-batches of `load`. Two steps are taken, since the
optimizer's state comes with the first; the second is what is told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import LoraSpec
from veneer.core.attach import Attachment, attach
from veneer.core.init import create
from veneer.errors import ConfigError, VeneerError
from veneer.models.config import check_words
from veneer.models.image.bare import bare_image, twin_denoiser
from veneer.models.image.base import ImageBase
from veneer.models.image.fast import fast_denoiser
from veneer.models.image.memory import recomputing
from veneer.models.image.predict import Conditioning
from veneer.models.text.bare import bare_text, config_of, twin
from veneer.models.text.fast import fast
from veneer.models.text.offload import HostStore, InOrder
from veneer.plan.fit import AnyLoad
from veneer.plan.image import ImageLoad, image_counts, image_memory
from veneer.plan.memory import Load, memory_together, text_memory
from veneer.plan.plan import GroupPlan, Plan
from veneer.plan.shape import model_shape
from veneer.plan.tables import Device
from veneer.plan.trace import Trace, traced
from veneer.plan.traced import TracedStep
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import config_from
from veneer.train.image.batches import ImageBatch, PlannedRow
from veneer.train.image.encode import ImageLoss
from veneer.train.image.preflight import parts_of
from veneer.train.image.samples import training_layers
from veneer.train.loop import Learner, Micro, Step, StopAsked, TrainingPlan, by_itself, stepping
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.text.batches import Batch
from veneer.train.text.task import batch_loss, recompute_activations
from veneer.train.text.together import Passes, why_apart

_Say = Callable[[str], None]


def _unsaid(line: str) -> None:
    """For callers that show no progress."""


def traced_plan(made: Plan, fields: Mapping[str, Any], say: _Say = _unsaid) -> TracedStep:
    """A step of a plan, with the change that makes it fit, followed on its GPU. `fields`: the base's config.json."""
    load, device = _traceable(made)
    check_words(fields, made.base)
    of = traced_training if isinstance(load, Load) else traced_pictures
    return of(fields, load, device, say)  # type: ignore[arg-type]


def traced_group(group: GroupPlan, fields: Mapping[str, Any], say: _Say = _unsaid) -> TracedStep:
    """A step of runs that share a base, in one pass, as `traced_plan`."""
    check_words(fields, group.plans[0].base)
    made = [_traceable(plan) for plan in group.plans]
    return traced_together(fields, [load for load, _ in made if isinstance(load, Load)], made[0][1], say)


def _traceable(made: Plan) -> tuple[AnyLoad, Device]:
    if made.device.kind != "cuda":
        raise ConfigError(
            "a trace is of a step on a GPU",
            where=f"device {made.device.name}",
            fix="--gpu h100-80gb, or another of --list",
        )
    if made.planned is None or (isinstance(made.planned[0], ImageLoad) and made.planned[0].offload):
        raise ConfigError(
            "what does not fit on one GPU is not traced", where=made.device.name, fix="a smaller base, or quantise it"
        )
    return made.planned


def traced_training(fields: Mapping[str, Any], load: Load, device: Device, say: _Say = _unsaid) -> TracedStep:
    """One step of `load` on a base of this config.json. Raises ConfigError for a family that is not known, and what
    torch raises where two devices meet."""
    return traced_together(fields, [load], device, say)


def traced_together(
    fields: Mapping[str, Any], loads: Sequence[Load], device: Device, say: _Say = _unsaid
) -> TracedStep:
    """One step of a run for each of `loads` on one base, whose dtype, codes and memory the first has, their rows in one
    pass as `veneer train` of several configurations makes it. Raises as `traced_training`."""
    config, load, most = config_of(fields), loads[0], sum(own.tokens for own in loads)
    dtype: torch.dtype = getattr(torch, load.dtype)
    say("a small model of this family is tried, to know what runs")
    how = twin(config, dtype)
    with traced() as trace:
        say("the base is made of its configuration, without weights")
        model = bare_text(config, dtype=dtype, device="cuda", quantise=load.quantise)
        trace.hold("weights", [*model.parameters(), *model.buffers()])
        with attach(model) as attachment:
            runs: dict[int, _TracedText] = {}
            for place, own in enumerate(loads):
                name = f"run {place + 1}"
                with torch.device("cuda"):
                    attachment.add(name, create(model, own.spec or LoraSpec(rank=own.rank), seed=0), trainable=True)
                attachment.use(name)
                runs[place] = _TracedText(
                    own, _Base(model, torch.device("cuda")), attachment, name, trace, say, place == len(loads) - 1
                )
            model.train()
            if load.checkpointing:
                recompute_activations(model, HostStore(InOrder()) if load.inputs_on_host else None)
            with fast(model, like=how) as report:
                trace.hold("weights", model.parameters())  # some lie together now
                if len(loads) > 1 and (why := why_apart(model)):
                    raise ConfigError(f"rows of several runs have passes of their own on this base: {why}")
                _take_steps(runs, Passes(runs, frozenset(runs), most, StopAsked()), config.vocab_size)
                ways = report.ways()
        shape = model_shape(model)
    counted = text_memory(shape, load, device) if len(loads) == 1 else memory_together(shape, loads, device, most)[0]
    return TracedStep(trace, counted, ways, ends=_ends(*loads))


def _take_steps(runs: Mapping[int, _TracedText], make: Passes, vocabulary: int) -> None:
    """Two of each, all runs' at once."""
    going = {}
    for place, run in runs.items():
        steps = [Step(tuple(_micro(run.load, vocabulary) for _ in range(min(run.load.micros, 2))))] * 2
        going[place] = stepping(run, _twice(steps), run.optimizer, asked=StopAsked())
    wanted = {place: next(steps) for place, steps in going.items()}
    while wanted:
        made = make(wanted)
        for place in list(wanted):
            done = made[place]
            if isinstance(done, VeneerError):
                raise done
            try:
                wanted[place] = going[place].send(done)
            except StopIteration:
                del wanted[place]


def _twice(steps: list[Step]) -> TrainingPlan:
    """Two steps at one rate."""
    return TrainingPlan(steps, Schedule.of("constant", 2))


def _ends(*loads: Load | ImageLoad) -> dict[str, int]:
    """What the loop reads at the end of each run's step: the losses of its micro-batches, and the gradient's norm."""
    losses = sum(min(load.micros, 2) for load in loads)
    return {"veneer/train/loop.py read_losses": losses, "veneer/train/loop.py _one_step": len(loads)}


def _name(trace: Trace, parameters: Mapping[str, nn.Parameter]) -> None:
    trace.hold("gradients", [p.grad for p in parameters.values()])


def _micro(load: Load, vocabulary: int) -> Micro:
    """A micro-batch of `load`: rows whose last tokens are trained, as answers are."""
    trained = torch.cat([torch.arange(n) >= max(1, round(n * (1 - load.trained))) for n in load.lengths])
    batch = Batch(torch.arange(load.tokens) % vocabulary, list(load.lengths), trained)
    return Micro(load.tokens, batch.trained_tokens, (0,), lambda: batch)


class _Told:
    """What encoders say of captions, as it comes out of the caches: on the CPU."""

    def __init__(self, base: ImageBase, tokens: int) -> None:
        own, self.base = base.denoiser.config, base
        wide = next(own[key] for key in ("joint_attention_dim", "cross_attention_dim", "cap_feat_dim") if own.get(key))
        pooled = own.get("pooled_projection_dim")
        if base.row.time_ids:
            pooled = own["projection_class_embeddings_input_dim"] - 6 * own["addition_time_embed_dim"]
        vector = None if pooled is None else torch.zeros(1, pooled, dtype=base.dtype)
        self.one = Conditioning(torch.zeros(1, tokens, wide, dtype=base.dtype), vector)

    def text(self, captions: Sequence[str], rows: Sequence[PlannedRow] = ()) -> Conditioning:
        return Conditioning.cat([self.one] * len(captions)).to(self.base.device)


def traced_pictures(fields: Mapping[str, Any], load: ImageLoad, device: Device, say: _Say = _unsaid) -> TracedStep:
    """One step of `load` on a denoiser of this config, with cached latents and texts. Raises as `traced_training`."""
    dtype: torch.dtype = getattr(torch, load.dtype)
    counts = image_counts(
        fields,
        height=load.height,
        width=load.width,
        rank=load.rank,
        targets=load.targets,
        before=load.before,
        form=load.form,
    )
    form = {"kind": load.form.kind, "factor": load.form.factor, "decompose_both": load.form.both}
    config, _ = config_from(
        {
            "base": "traced",
            "data": {"pictures": "."},
            "output": {"directory": "traced", "layout": "kohya"},
            "adapter": {"rank": load.rank, "targets": load.targets, **form},
        }
    )
    assert isinstance(config, ImageTrainConfig)
    say("a small denoiser of this family is tried, to know what runs")
    how = twin_denoiser(fields, dtype)
    with traced() as trace:
        say("the denoiser is made of its configuration, without weights")
        base = bare_image(fields, dtype=dtype, device="cuda", quantise=load.quantise)
        trace.hold("weights", [*base.denoiser.parameters(), *base.denoiser.buffers()])
        with attach(base.model) as attachment:
            with torch.device("cuda"):
                module, spec = parts_of(base, config)[base.row.denoiser]
                made = create(module, spec, seed=0).renamed(lambda name: f"{base.row.denoiser}.{name}")
                attachment.add("traced", made, trainable=True)
                del made
            attachment.use("traced")
            parameters = attachment.parameters("traced")
            trace.hold("adapter", parameters.values())
            optimizer = make_optimizer(parameters, learning_rate=1e-4)
            optimizer.register_step_pre_hook(lambda *_: _name(trace, parameters))
            loss = ImageLoss(base, config, _Told(base, counts.text))  # type: ignore[arg-type]
            with training_layers(base, True), fast_denoiser(base.denoiser, like=how) as report:
                trace.hold("weights", base.denoiser.parameters())
                with recomputing(base) if load.checkpointing else nullcontext():
                    steps = [Step(tuple(_pictures(base, load) for _ in range(min(load.micros, 2))))] * 2
                    learner = _Traced(loss, parameters, optimizer, trace, say)
                    by_itself(stepping(learner, _twice(steps), optimizer, asked=StopAsked()))
                    ways = report.summary()
    return TracedStep(trace, image_memory(counts, load, device), ways, ends=_ends(load))


def _pictures(base: ImageBase, load: ImageLoad) -> Micro:
    """A micro-batch of `load`."""
    n, channels = load.pictures, int(base.denoiser.config["in_channels"])
    side = base.vae_scale * (base.row.patch if base.row.patched else 1)
    channels = channels // base.row.patch**2 if base.row.packed else channels
    latents = torch.zeros(n, channels, load.height // side, load.width // side)
    view: Any = None
    rows = [PlannedRow(view, view, "", 1.0, (0, 0, slot)) for slot in range(n)]
    batch = ImageBatch(latents, None, torch.zeros(n, 6), torch.ones(n), rows, [latents] * load.before)
    return Micro(n, n, (0,), lambda: batch, "pictures")


class _Traced(Learner):
    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        trace: Trace,
        say: _Say,
        last: bool = True,
    ) -> None:
        self._loss, self.parameters, self.optimizer, self.trace, self._say = loss, parameters, optimizer, trace, say
        self._step, self._micros, self._at, self._last = 0, 1, 0, last

    def begin_step(self, step: Step) -> None:
        self._step, self._micros, self._at = self._step + 1, len(step.micros), 0

    def loss(self, batch: Any) -> Tensor:
        self._at += 1
        one = "" if self._micros == 1 else f", micro-batch {self._at} of {self._micros}"
        self._say(f"step {self._step} of 2{one}: forward")
        out = self._loss(batch)
        self._say(f"step {self._step} of 2{one}: backward ({self.trace.operations:,} operations so far)")
        return out

    def score(self, interrupted: Callable[[], bool]) -> None:
        """There is nothing held out."""
        return None

    def end_step(self, number: int) -> None:
        """After the first step the optimizer's state is there, after the second it is over."""
        if number == 1:
            states = (t for state in self.optimizer.state.values() for t in state.values())
            self.trace.hold("optimizer", (t for t in states if isinstance(t, Tensor)))
        if self._last:
            self.trace.begin() if number == 1 else self.trace.end()


@dataclass(frozen=True)
class _Base:
    model: Any
    device: torch.device


class _TracedText(_Traced):
    """A run on text: what `Passes` asks of it. `last`: of those that share a base."""

    def __init__(
        self, load: Load, base: _Base, attachment: Attachment, name: str, trace: Trace, say: _Say, last: bool
    ) -> None:
        self.load, self.base, self.attachment, self.name = load, base, attachment, name
        parameters = attachment.parameters(name)
        trace.hold("adapter", parameters.values())
        optimizer = make_optimizer(parameters, name=load.optimizer, learning_rate=1e-4)
        optimizer.register_step_pre_hook(lambda *_: _name(trace, parameters))
        super().__init__(self._nll, parameters, optimizer, trace, say, last)

    def act(self) -> None:
        self.attachment.use(self.name)

    def saw(self, right: Tensor) -> None:
        """What is right is nobody's; in a run it is summed."""
        right.sum()

    def _nll(self, batch: Batch) -> Tensor:
        right = torch.empty(batch.trained_tokens, dtype=torch.bool, device=self.base.device)
        nll = batch_loss(self.base.model, batch, self.base.device, right=right)
        self.saw(right)
        return nll
