"""Trains clients' adapters on one base, in shared passes if possible.

    trainer = Trainer(base)                        the trainer's own modules, which share the base's tensors
    learner = trainer.create("a", Lora(rank=8))
    work = PassWork(learner, check_rows(rows, …), "cross_entropy", {}, backward=True)
    while not work.done: trainer.step([work, …])   one pass: rows of all works in one batch
    trainer.optimize(learner, Adam(1e-4))

    gradient of a client = Σ over its passes since its last optimizer step  ∇ Σ loss of its rows

Rows of clients with different ranks, targets and losses share a pass, as in runs that train together
(train/text/together.py): each row uses its own client's adapter, and gradients do not mix. A client whose
adapter cannot share a pass (span_problem) gets separate passes. If the base does not support shared passes
(reason_not_shared), all clients get separate passes.

A row of n tokens runs with its last target appended, as in veneer's own training. Training through Tinker and
`veneer train` therefore give bit-identical numbers. This module uses tensors and one base; other modules
handle requests and tenants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.core.selection import span_problem
from veneer.core.targets import base_modules, base_of, resolve_targets
from veneer.errors import CheckpointError, ConfigError, TrainingError
from veneer.jobs.tinker.losses import needed_inputs, row_loss
from veneer.jobs.tinker.wire import WireRow
from veneer.models.text.base import TextBase
from veneer.models.text.fast import fast
from veneer.models.text.loss import hidden_at, target_logps
from veneer.models.text.module_copy import copy_modules
from veneer.ops.cpu.sharing import shared
from veneer.ops.device_transfer import sent
from veneer.ops.lora_segments import LoraSegments
from veneer.serve.http.bodies import Strict
from veneer.train.checkpoint import Progress, latest, read_checkpoint, read_parameters, restore, rng_restore, rng_state
from veneer.train.checkpoint import save as save_checkpoint
from veneer.train.loop import Micro, memory_errors
from veneer.train.optim import make_optimizer
from veneer.train.preflight import trainable_parameters
from veneer.train.text.together import reason_not_shared

ALPHA = 32.0
"""Alpha of every adapter, for every rank, as in Tinker."""
_PASS, _PASS_ON_GPU = 2048, 8192
"""Maximum tokens per pass, on the CPU and on a GPU."""
_GRADIENT = "@gradient"
_WRAPPER = "~"
"""Name of an adapter that is attached only to wrap modules and is never active."""


TargetNames = Mapping[str, tuple[str, ...]]
"""Group of modules (a field of Lora) -> the names of the base's modules in this group."""


@dataclass(frozen=True)
class Lora:
    """A client's LoRA configuration. A `seed` of None means 0."""

    rank: int
    seed: int | None = None
    attention: bool = True
    mlp: bool = True
    unembed: bool = True

    def spec(self, names: TargetNames) -> LoraSpec:
        """Return the LoraSpec of the client's adapter.

        Raises ConfigError if the rank is invalid or the base lacks the modules."""
        if not 1 <= self.rank <= 4096:
            raise ConfigError(f"rank {self.rank} is not possible", where="lora_config.rank", fix="from 1 to 4096")
        targets = tuple(name for group, modules in names.items() if getattr(self, group) for name in modules)
        if not targets:
            message = "train_mlp, train_attn and train_unembed select no module of this base"
            raise ConfigError(message, where="lora_config")
        return LoraSpec(rank=self.rank, alpha=ALPHA, targets=targets)


def target_names(model: Any) -> TargetNames:
    head = base_of(model.get_output_embeddings())
    linear = [target.name for target in resolve_targets(model, LoraSpec())]
    attention = tuple(name for name in linear if "attn" in name or "attention" in name)
    mlp = tuple(name for name in linear if name not in attention)
    unembed = tuple(name for name, module in base_modules(model) if module is head)
    return {"attention": attention, "mlp": mlp, "unembed": unembed}


def state_bytes(model: Any, spec: LoraSpec) -> int:
    """Return the memory of a client's float32 weights, gradients and moments, in bytes.

    Allocates no tensors."""
    return 16 * trainable_parameters(model, resolve_targets(model, spec), spec)[0]


class Adam(Strict, strict=True):
    """The parameters of one AdamW step, with Tinker's defaults.

    The bounds keep the weights finite. The step is learning_rate * m / (√v + eps). eps must not round to 0 in
    float32, because the step of a parameter without a gradient is 0 / eps.

    grad_clip_norm: maximum gradient norm; 0: no clipping."""

    learning_rate: float = Field(default=1e-4, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, le=0.999999)
    beta2: float = Field(default=0.95, ge=0, le=0.999999)
    eps: float = Field(default=1e-12, ge=1e-30, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    grad_clip_norm: float = 0.0


@dataclass(eq=False)
class Learner:
    """An adapter that is being trained, in memory.

    separate_reason: why the adapter's rows cannot share a pass with other clients' rows; "" if they can."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    separate_reason: str

    @property
    def bytes(self) -> int:
        """Return the memory of the weights, gradients and both moments, in bytes."""
        return 4 * sum(parameter.nbytes for parameter in self.parameters.values())

    def forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


@dataclass(frozen=True, eq=False)
class TrainRow:
    """A checked row.

    ids: (n,), or (n + 1,) with the last target appended
    targets: (n, k)
    inputs: the loss's tensors: (n,) if the client's targets had one dimension (`flat`), else (n, k)"""

    ids: Tensor
    targets: Tensor
    inputs: Mapping[str, Tensor]
    flat: bool


def check_rows(
    rows: Sequence[WireRow], loss: str, options: Mapping[str, float | str], *, vocabulary: int, context: int
) -> list[TrainRow]:
    """Check and convert a client's rows. Raises ConfigError, which names the invalid row."""
    names = needed_inputs(loss, options)
    if not rows:
        raise ConfigError("there are no rows", where="data")
    return [_row(row, f"data[{i}]", loss, names, vocabulary, context) for i, row in enumerate(rows)]


def _row(row: WireRow, where: str, loss: str, names: Sequence[str], vocabulary: int, context: int) -> TrainRow:
    def wrong(message: str, fix: str | None = None) -> ConfigError:
        return ConfigError(message, where=where, fix=fix)

    ids, count = torch.from_numpy(row.tokens), len(row.tokens)
    if not row.text_only:
        raise wrong("the row's input has a part that is not text; only text can be used for training")
    if not 0 < count <= context:
        raise wrong(f"the row's input has {count} tokens", f"from 1 to {context}, the base's context")
    if "target_tokens" not in row.inputs:
        raise wrong("the row has no target_tokens")
    supported = {"target_tokens", *names}
    if more := [name for name in row.inputs if name not in supported]:
        raise wrong(f"{loss} has no input {more[0][:50]!r}", f"supported inputs: {', '.join(sorted(supported))}")
    target_tokens = row.inputs["target_tokens"]
    shape = target_tokens.shape
    if target_tokens.dtype.kind != "i" or len(shape) not in (1, 2) or shape[0] != count or 0 in shape:
        raise wrong(f"target_tokens has the shape {shape}", f"integers, ({count},) or ({count}, k)")
    for name, values in row.inputs.items():  # check all shapes before any values are copied
        if values.shape != shape:
            raise wrong(f"{name} has the shape {values.shape}, target_tokens {shape}")
    targets = torch.tensor(target_tokens)
    for name, ids_ in (("input", ids), ("target_tokens", targets)):
        if bool((ids_ < 0).any() or (ids_ >= vocabulary).any()):
            raise wrong(f"a token of the row's {name} is not in this base's vocabulary of {vocabulary:,}")
    inputs = {name: torch.tensor(row.inputs[name]).float() for name in names if name in row.inputs}
    if loss == "cross_entropy":
        inputs.setdefault("weights", torch.ones(targets.shape))
    for name in names:
        if name not in inputs:
            raise wrong(f"{loss} needs {name}, which the row lacks")
    for name, numbers in inputs.items():
        if not bool(numbers.isfinite().all()):
            raise wrong(f"{name} has a value that is not finite")
    flat = targets.ndim == 1
    targets = targets.long()[:, None] if flat else targets.long()
    return TrainRow(torch.cat([ids, targets[-1, :1]]) if count < context else ids, targets, inputs, flat)


@dataclass(eq=False)
class PassWork:
    """A forward or forward_backward request in progress.

    logps: the log-probabilities of finished rows, each (n,) or (n, k)."""

    learner: Learner
    rows: Sequence[TrainRow]
    loss: str
    options: Mapping[str, float | str]
    backward: bool
    logps: list[Tensor] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        parameters = self.learner.parameters.values()
        self._gradients = {p: None if p.grad is None else p.grad.clone() for p in parameters}

    def restart(self) -> None:
        """Discard the results so far, and restore the gradients from before the request."""
        self.logps, self.total = [], 0.0
        for parameter, gradient in self._gradients.items():
            parameter.grad = None if gradient is None else gradient.clone()

    @property
    def done(self) -> bool:
        return len(self.logps) == len(self.rows)


class Trainer:
    """Trains clients' adapters on its own modules, which share `base`'s tensors.

    Call all methods from the same thread."""

    def __init__(self, base: TextBase) -> None:
        self.base = copy_modules(base)
        model: Any = self.base.model
        self.model, self.names, self.learners = model, target_names(model), dict[str, Learner]()
        self._undo = ExitStack()
        self.attachment = self._undo.enter_context(attach(model))
        # Fast paths keep references to modules, so all modules that clients can train are wrapped first.
        self.attachment.add(_WRAPPER, create(model, Lora(1).spec(self.names), seed=0))
        self._undo.enter_context(fast(model))
        self.all_separate_reason = reason_not_shared(model)
        self.most = _PASS if self.base.device.type == "cpu" else _PASS_ON_GPU
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def close(self) -> None:
        self.learners.clear()
        self._undo.close()

    # -- clients -------------------------------------------------------------------------------------------------------

    def create(self, name: str, lora: Lora) -> Learner:
        """Create an adapter. The same seed gives the same initial weights.

        Raises ConfigError, TargetError."""
        adapter = create(self.model, lora.spec(self.names), seed=lora.seed or 0)
        self.attachment.add(name, adapter, trainable=True)
        parameters = self.attachment.parameters(name)
        # The head's pairs cannot prevent sharing, because the head runs separately on each client's rows.
        body_pairs = {key: pair for key, pair in adapter.pairs.items() if key not in self.names["unembed"]}
        separate_reason = self.all_separate_reason or span_problem(replace(adapter, pairs=body_pairs))
        optimizer = make_optimizer(parameters, name="adamw", learning_rate=1.0)
        self.learners[name] = learner = Learner(name, parameters, optimizer, separate_reason)
        return learner

    def drop(self, learner: Learner) -> None:
        """Remove an adapter from memory without saving its state."""
        del self.learners[learner.name]
        self.attachment.use()
        self.attachment.remove(learner.name)

    def adapter(self, learner: Learner) -> Adapter:
        """Return a copy of the adapter with its current weights."""
        return self.attachment.adapter(learner.name)

    # -- passes --------------------------------------------------------------------------------------------------------

    def step(self, works: Sequence[PassWork]) -> list[PassWork]:
        """Run one pass over the next rows of unfinished works.

        Each work has its own learner; the first work has priority. Returns the works that had rows in the
        pass. Raises ResourceError, and TrainingError if a loss is not finite; the gradients of all `works` must
        then not be used."""
        first, *rest = works
        if first.learner.separate_reason:
            rest = []
        parts = self._parts([first, *(work for work in rest if not work.learner.separate_reason)])
        tokens = sum(len(row.ids) for _, rows in parts for row in rows)
        grads = any(work.backward for work, _ in parts)
        with torch.set_grad_enabled(grads), shared(), memory_errors(Micro(tokens, 0, (), lambda: None)):
            results = self._pass(parts)
        for (work, _), (logps, loss) in zip(parts, results, strict=True):
            work.logps += logps
            work.total += loss
            if not math.isfinite(work.total):
                message, where = f"the {work.loss} loss is not finite", work.learner.name
                fix = "check the rows, use a lower learning rate, or use log-probabilities of the same model"
                raise TrainingError(message, where=where, fix=fix)
        return [work for work, _ in parts]

    def _parts(self, works: Sequence[PassWork]) -> list[tuple[PassWork, list[TrainRow]]]:
        """Return the rows of each work for the next pass.

        Takes one row of each work in turn, until the pass is full."""
        parts: list[tuple[PassWork, list[TrainRow]]] = [(work, []) for work in works]
        tokens, open_ = 0, [*parts]
        while open_:
            for part in [*open_]:
                work, rows = part
                at = len(work.logps) + len(rows)
                if at == len(work.rows) or (tokens and tokens + len(work.rows[at].ids) > self.most):
                    open_.remove(part)
                    continue
                rows.append(work.rows[at])
                tokens += len(work.rows[at].ids)
        return [part for part in parts if part[1]]

    def _pass(self, parts: Sequence[tuple[PassWork, list[TrainRow]]]) -> list[tuple[list[Tensor], float]]:
        """Run the forward pass and, for works that need it, the backward pass.

        Returns (log-probabilities of the rows, loss) for each part."""
        rows = [row for _, work_rows in parts for row in work_rows]
        device = self.base.device
        lengths = [len(row.ids) for row in rows]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
        positions = torch.cat([torch.arange(at, at + len(row.targets)) for at, row in zip(starts, rows, strict=True)])
        spans = None
        counts = [sum(len(row.targets) for row in work_rows) for _, work_rows in parts]
        if len(parts) > 1:
            generators = [torch.Generator() for _ in parts]
            spans = LoraSegments([sum(len(row.ids) for row in work_rows) for _, work_rows in parts], counts, generators)
            self.attachment.use_spans([work.learner.name for work, _ in parts], spans)
        else:
            self.attachment.use(parts[0][0].learner.name)
        ids = sent(torch.cat([row.ids for row in rows]), device)
        hidden = hidden_at(self.model, ids, lengths, sent(positions, device), spans)
        all_logps, losses, backward = [], [], []
        for (work, work_rows), part in zip(parts, hidden.split(counts), strict=True):
            acting: Callable[[], AbstractContextManager[Any]] = nullcontext
            if spans is not None:
                acting = partial(self.attachment.using, work.learner.name)
            logps = self._logps(work_rows, part, acting)
            inputs = [{name: sent(t, device) for name, t in row.inputs.items()} for row in work_rows]
            row_losses = [row_loss(work.loss, p, row, work.options) for p, row in zip(logps, inputs, strict=True)]
            loss = torch.stack(row_losses).sum()
            losses.append(loss)
            backward += [loss] if work.backward else []
            all_logps.append([p.detach() for p in logps])
        if backward:
            looking = [p for work, _ in parts if not work.backward for p in work.learner.parameters.values()]
            untouched = [p for p in looking if p.grad is None]
            torch.stack(backward).sum().backward()  # type: ignore[no-untyped-call]
            for parameter in untouched:  # remove the zero gradients that other clients' rows caused
                parameter.grad = None
        totals = torch.stack(losses).tolist()
        return [([p.cpu() for p in work_rows], total) for work_rows, total in zip(all_logps, totals, strict=True)]

    def _logps(
        self, rows: Sequence[TrainRow], hidden: Tensor, acting: Callable[[], AbstractContextManager[Any]]
    ) -> list[Tensor]:
        """Return log-probabilities of each row's targets, in the shape of the targets."""
        counts, device = [len(row.targets) for row in rows], hidden.device
        if len({row.targets.shape[1] for row in rows}) == 1:
            targets = sent(torch.cat([row.targets for row in rows]), device)
            parts = list(target_logps(self.model, hidden, targets, acting).split(counts))
        else:
            parts = [
                target_logps(self.model, part, sent(row.targets, device), acting)
                for row, part in zip(rows, hidden.split(counts), strict=True)
            ]
        return [part[:, 0] if row.flat else part for row, part in zip(rows, parts, strict=True)]

    def optimize(self, learner: Learner, adam: Adam) -> dict[str, float]:
        """Run an optimizer step with the gradients since the last step, and clear the gradients.

        Raises TrainingError if there are no gradients or a gradient is not finite; the weights then do not
        change, and the gradients are cleared."""
        parameters = [p for p in learner.parameters.values() if p.grad is not None]
        if not parameters:
            raise TrainingError("there is no gradient", fix="call forward_backward before optim_step")
        most = adam.grad_clip_norm if adam.grad_clip_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, most))
        if not math.isfinite(norm):
            learner.forget_gradients()
            raise TrainingError("the gradient is not finite", fix="check the rows, or use a lower learning rate")
        for group in learner.optimizer.param_groups:
            group["lr"], group["betas"] = adam.learning_rate, (adam.beta1, adam.beta2)
            group["eps"], group["weight_decay"] = adam.eps, adam.weight_decay
        learner.optimizer.step()
        learner.forget_gradients()
        return {"grad_norm": norm}

    # -- on disk -------------------------------------------------------------------------------------------------------

    def write(self, learner: Learner, folder: Path, number: int) -> None:
        """Save an adapter's whole state, including gradients, under a number.

        Removes the previous state after the new state is complete."""
        gradients = {f"{k}{_GRADIENT}": p.grad for k, p in learner.parameters.items() if p.grad is not None}
        state, metadata = {**learner.parameters, **gradients}, {"gradients": sorted(gradients)}
        options: dict[str, Any] = {"optimizer": learner.optimizer, "identity": {}, "keep": 1, "metadata": metadata}
        save_checkpoint(folder, parameters=state, progress=Progress(step=number), **options)

    def read(self, learner: Learner, folder: Path, optimizer: bool = True) -> None:
        """Load the newest state in `folder`.

        optimizer: whether to load moments and gradients too.

        Raises CheckpointError if there is no state, or if the state belongs to another kind of adapter."""
        path = latest(folder)
        if path is None:
            raise CheckpointError("there is no state", where=folder.name)
        names = list(read_checkpoint(path)["about"]["gradients"])
        gradients = {name: torch.empty_like(learner.parameters[name.removesuffix(_GRADIENT)]) for name in names}
        state = {**learner.parameters, **gradients}
        if not optimizer:
            read_parameters(path, state)
            return
        generators = rng_state()
        try:
            restore(path, parameters=state, optimizer=learner.optimizer, identity={})
        finally:
            rng_restore(generators)  # `restore` changes the global generators, which other code uses
        for name, gradient in gradients.items():
            learner.parameters[name.removesuffix(_GRADIENT)].grad = gradient
