"""The training loop on a linear model: micro-batches, stopping, evaluation, events."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.elsewhere import OnMps
from veneer.errors import Interrupted, PreflightError, ResourceError, TrainingError
from veneer.train.checkpoint import Progress
from veneer.train.events import Evaluated, Event, Probed, Saved, Stepped, Stopped
from veneer.train.loop import EvalResult, LazySteps, Learner, Loop, MetricMeans, Micro, Step, TrainingPlan, probe, train
from veneer.train.optim import Schedule, make_optimizer

ROWS, WIDTH = 24, 3


class Problem:
    """Squared error of a linear model, summed over tokens as an NLL is; rows have different token counts."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.counts = torch.randint(1, 6, (ROWS,), generator=g).tolist()
        self.x = torch.randn(ROWS, WIDTH, generator=g, dtype=dtype)
        self.y = torch.randn(ROWS, generator=g, dtype=dtype)
        self.parameters = {"w.A": nn.Parameter(torch.zeros(WIDTH, dtype=dtype))}

    @property
    def learner(self) -> Learner:
        return Learner(self.parameters, self.loss, score=self.score)

    def loss(self, batch: list[int]) -> Tensor:
        weight = torch.tensor([float(self.counts[r]) for r in batch], dtype=self.x.dtype)
        error = self.x[batch] @ self.parameters["w.A"] - self.y[batch]
        return (weight * error.square()).sum()

    def step(self, micros: list[list[int]]) -> Step:
        return Step(tuple(self.micro(rows) for rows in micros))

    def micro(self, rows: list[int]) -> Micro:
        trained = sum(self.counts[r] for r in rows)
        return Micro(2 * trained, trained, tuple(rows), lambda: rows)

    def score(self, interrupted: Callable[[], bool] = lambda: False) -> EvalResult | None:
        with torch.no_grad():
            return EvalResult(self.loss(list(range(ROWS))).item(), sum(self.counts), ROWS)


class Other(Problem):
    """The same problem, with another loss or another score."""

    def __init__(self, loss: Callable[[list[int]], Tensor] | None = None, score: Any = None) -> None:
        super().__init__()
        self._loss, self._score = loss, score

    def loss(self, batch: list[int]) -> Tensor:
        return super().loss(batch) if self._loss is None else self._loss(batch)

    def score(self, interrupted: Callable[[], bool] = lambda: False) -> EvalResult | None:
        found: EvalResult | None = self._score(interrupted)
        return found


class _DelayedTensor(torch.Tensor):
    """A tensor whose values arrive 0.2 s after they are requested, as if a GPU were still computing them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            time.sleep(0.2)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _train(
    problem: Problem,
    steps: list[Step],
    *,
    lr: float = 0.1,
    name: str = "sgd",
    save: Any = None,
    on_event: Any = None,
    clip: float | None = None,
    **plan: Any,
) -> Progress:
    optimizer = make_optimizer(problem.parameters, name=name, learning_rate=lr)
    planned = TrainingPlan(steps, Schedule.create("constant", len(steps)), clip, **plan)
    loop = Loop(problem.learner, planned, optimizer, save=save, emit=on_event or (lambda event: None))
    train([loop])
    return loop.progress


def _cut(rows: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(cuts), len(rows)]
    return [rows[a:b] for a, b in itertools.pairwise(bounds) if a < b]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, ROWS - 1), unique=True), seed=st.integers(0, 5))
def test_micro_batches_equal_one_large_batch(cuts: list[int], seed: int) -> None:
    rows = list(range(ROWS))
    whole, pieces = Problem(seed=seed), Problem(seed=seed)
    a = _train(whole, [whole.step([rows])] * 3, clip=1.0)
    b = _train(pieces, [pieces.step(_cut(rows, cuts))] * 3, clip=1.0)
    torch.testing.assert_close(whole.parameters["w.A"], pieces.parameters["w.A"], rtol=1e-12, atol=1e-14)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert (a.tokens, a.trained_tokens) == (b.tokens, b.trained_tokens)


def test_a_step_is_the_token_weighted_gradient() -> None:
    problem = Problem()
    rows = list(range(ROWS))
    c = torch.tensor(problem.counts, dtype=torch.float64)
    gradient = (2 * (c * -problem.y)[:, None] * problem.x).sum(0) / c.sum()
    _train(problem, [problem.step([rows[:5], rows[5:]])])
    torch.testing.assert_close(problem.parameters["w.A"].detach(), -0.1 * gradient)


def test_seconds_of_a_step_include_waiting_for_its_losses() -> None:
    problem = Other(lambda rows: Problem.loss(problem, rows).as_subclass(_DelayedTensor))
    seen: list[Event] = []
    progress = _train(problem, [problem.step([[0], [1]])] * 2, on_event=seen.append)
    assert all(event.seconds >= 0.2 for event in seen if isinstance(event, Stepped))
    assert progress.seconds >= 0.4


def test_clipping_bounds_the_norm_and_reports_the_unclipped_norm() -> None:
    free, bound = Problem(), Problem()
    seen: list[Event] = []
    steps = [free.step([list(range(ROWS))])]
    _train(free, steps)
    _train(bound, steps, clip=0.01, on_event=seen.append)
    moved = free.parameters["w.A"].detach().norm() / 0.1
    assert float(bound.parameters["w.A"].detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    stepped = next(e for e in seen if isinstance(e, Stepped))
    assert stepped.gradient_norm == pytest.approx(float(moved))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_the_optimizer(where: str, tmp_path: Path) -> None:
    saved: list[int] = []

    def loss(rows: list[int]) -> Tensor:
        value = Problem.loss(problem, rows)
        if 7 in rows and len(saved) >= 2:
            # sqrt has infinite slope at zero, so the loss is finite but its gradient is not
            bad = torch.tensor(math.nan) if where == "loss" else (problem.parameters["w.A"] * 0).sum().sqrt()
            return value + bad
        return value

    def save(progress: Progress) -> Path:
        saved.append(progress.step)
        return tmp_path

    problem = Other(loss)
    steps = [problem.step([[0, 1], [7, 8]])] * 4
    before: list[Tensor] = []

    def keep(event: Event) -> None:
        before.append(problem.parameters["w.A"].detach().clone())

    with pytest.raises(TrainingError) as error:
        _train(problem, steps, lr=0.01, clip=1.0, save=save, save_at=range(10), on_event=keep)
    assert "step 3" in str(error.value)
    assert where in error.value.what
    assert "7, 8" in str(error.value.where)
    assert ("0, 1" in str(error.value.where)) == (where == "gradient")
    assert saved == [1, 2]
    torch.testing.assert_close(problem.parameters["w.A"].detach(), before[-1], rtol=0, atol=0)


def test_a_step_without_tokens_in_the_loss_is_an_error() -> None:
    problem = Problem()
    with pytest.raises(TrainingError, match="no trained token"):
        _train(problem, [Step((Micro(5, 0, (3,), lambda: [3]),))])


def test_micro_batches_without_tokens_in_the_loss_are_not_run() -> None:
    problem = Problem()

    def never() -> list[int]:
        raise AssertionError

    _train(problem, [Step((problem.micro([0, 1]), Micro(5, 0, (3,), never)))])


def test_evaluations_run_at_start_when_due_and_at_end() -> None:
    problem, seen = Problem(), []
    steps = [problem.step([list(range(ROWS))])] * 5
    progress = _train(problem, steps, evaluate_at={0, 2, 4}, on_event=seen.append)
    scores = [e for e in seen if isinstance(e, Evaluated)]
    assert [e.step for e in scores] == [0, 2, 4, 5]
    assert [e.best for e in scores] == [False, True, True, True]
    score = problem.score()
    assert scores[-1].loss == pytest.approx(score.loss)
    assert scores[-1].perplexity == pytest.approx(math.exp(scores[-1].loss))
    assert (progress.best_step, progress.best_loss) == (5, scores[-1].loss)
    assert isinstance(seen[-1], Stopped)
    assert seen[-1].reason == "finished"


def test_early_stopping_waits_for_patience(tmp_path: Path) -> None:
    losses, seen = iter([9.0, 5.0, 3.0, 4.0, 3.5, 1.0]), []
    problem = Other(score=lambda stop: EvalResult(next(losses), 1, 1))
    steps = [problem.step([[0, 1]])] * 10
    progress = _train(
        problem, steps, evaluate_at=range(10), patience=2, save=lambda p: tmp_path / str(p.step), on_event=seen.append
    )
    assert (progress.step, progress.stopped) == (4, "early stopping")
    assert (progress.best_step, progress.best_loss) == (2, 3.0)
    assert [e.step for e in seen if isinstance(e, Saved)] == [1, 2, 4]


def test_evaluation_that_is_not_finite_stops() -> None:
    problem = Other(score=lambda stop: EvalResult(math.nan, 1, 1))
    with pytest.raises(TrainingError, match="validation loss"):
        _train(problem, [problem.step([[0]])], evaluate_at=())


def test_ctrl_c_drops_the_unfinished_step_and_saves(tmp_path: Path) -> None:
    """The saved state, including the random state, is that of step 2, although step 3 has already sampled
    dropout masks."""
    after: dict[int, tuple[Tensor, Tensor]] = {}
    calls = 0

    def loss(rows: list[int]) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return Problem.loss(problem, rows)

    problem = Other(loss)

    def keep(event: Event) -> None:
        if isinstance(event, Stepped):
            after[event.step] = (problem.parameters["w.A"].detach().clone(), torch.get_rng_state())

    saved: list[tuple[int, Tensor, Tensor]] = []

    def save(progress: Progress) -> Path:
        saved.append((progress.step, problem.parameters["w.A"].detach().clone(), torch.get_rng_state()))
        return tmp_path

    steps = [problem.step([[0, 1], [2, 3]])] * 5
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as error:
        _train(problem, steps, name="adamw", clip=1.0, save=save, on_event=keep)
    assert error.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    [(step, values, random)] = saved
    assert step == 2
    assert torch.equal(values, after[2][0])
    assert torch.equal(random, after[2][1])


def test_ctrl_c_during_an_evaluation_saves_too(tmp_path: Path) -> None:
    saved: list[tuple[int, int]] = []

    def score(stop: Callable[[], bool]) -> EvalResult | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return None if stop() else Problem().score()

    problem = Other(score=score)

    def save(progress: Progress) -> Path:
        saved.append((progress.step, progress.evaluated))
        return tmp_path

    with pytest.raises(Interrupted):
        _train(problem, [problem.step([[0]])], evaluate_at=[0], save=save)
    assert saved == [(0, -1)]


def test_probe_runs_the_longest_batch_and_leaves_no_trace() -> None:
    def loss(rows: list[int]) -> Tensor:
        torch.rand(2)
        return Problem.loss(problem, rows)

    problem, seen = Other(loss), list[Event]()
    micros = [problem.micro([0]), problem.micro([0, 1, 2]), problem.micro([1])]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    event = probe(problem.learner, micros, seen.append)
    assert event.rows == (0, 1, 2)
    assert event.peak_memory_bytes > 0
    assert seen == [event]
    assert isinstance(event, Probed)
    assert torch.equal(random, torch.get_rng_state())
    assert problem.parameters["w.A"].grad is None
    assert (problem.parameters["w.A"] == 0).all()


def test_probe_detects_losses_that_cannot_train() -> None:
    elsewhere = torch.zeros(1, requires_grad=True)
    micros = [Problem().micro([0])]
    with pytest.raises(PreflightError, match="no gradient"):
        probe(Other(lambda rows: elsewhere.sum() * 2).learner, micros, lambda e: None)
    with pytest.raises(PreflightError, match="nan"):
        probe(Other(lambda rows: torch.tensor(math.nan)).learner, micros, lambda e: None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_rows_and_a_fix(error: Exception) -> None:
    def loss(rows: list[int]) -> Tensor:
        raise error

    problem = Other(loss)
    with pytest.raises(ResourceError) as caught:
        probe(problem.learner, [problem.micro([4, 5])], lambda e: None)
    assert "4, 5" in str(caught.value)
    assert "activation_checkpointing" in str(caught.value.fix)


@pytest.mark.parametrize(("length", "count", "ends"), [({"epochs": 3}, 9, [2, 5, 9]), ({"steps": 6}, 6, [2, 5])])
def test_steps_are_planned_an_epoch_at_a_time(length: dict[str, int], count: int, ends: list[int]) -> None:
    planned: list[int] = []

    def plan(epoch: int) -> list[Step]:  # as with packed rows, the number of steps differs between epochs
        planned.append(epoch)
        return [Step((), epoch + (i + 1) / (epoch + 2)) for i in range(epoch + 2)]

    steps = LazySteps(plan, **length)
    whole = [step for epoch in range(3) for step in plan(epoch)][:count]
    planned.clear()
    assert (len(steps), steps.ends, list(steps)) == (count, ends, whole)
    assert planned == [0, 1, 2]
    assert (steps[-1], steps[1:4], steps[0]) == (whole[-1], whole[1:4], whole[0])
    with pytest.raises(IndexError):
        steps[count]
    assert len(LazySteps(lambda epoch: [], **length)) == 0


def test_means_work_on_devices_without_float64() -> None:
    values = torch.tensor([1.5, 2.0, -0.25])
    means = MetricMeans()
    means.add(margin=values.as_subclass(OnMps), share=(values > 0).as_subclass(OnMps))
    assert means.values() == {"margin": 3.25 / 3, "share": 2 / 3}
