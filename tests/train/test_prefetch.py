"""Batches prefetched in a thread: equal order and bits, at most two in memory, errors raised in order."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.stopping import interrupt_at
from veneer.errors import Interrupted, ResourceError
from veneer.train.checkpoint import Progress
from veneer.train.events import Event, Stepped
from veneer.train.loop import LazySteps, Learner, Loop, Micro, Step, TrainingPlan, train
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.prefetch import Prefetcher
from veneer.train.text.batches import Batch, collate
from veneer.train.text.encode import Example
from veneer.train.text.preference import AnswerBatch, Item, collate_items

STEPS, MICROS = 4, 3


class Rows:
    """A batch of rows that tests can track with weak references."""

    def __init__(self, number: int) -> None:
        self.x = torch.randn(2, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


class Fitted:
    """Squared error with dropout.

    `ahead`: prefetch batches in a thread; a copy stands for the transfer to a device. `made`, `used`: the
    batches that were created and those that were used, in order. `most`: maximum number of batches that were
    alive at once."""

    def __init__(self, ahead: bool, failing: Callable[[int], None] = lambda number: None) -> None:
        self.parameters = {"w.A": nn.Parameter(torch.ones(3, dtype=torch.float64))}
        self._ahead, self.failing = ahead, failing
        self.made: list[int] = []
        self.used: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.alive: weakref.WeakSet[Rows] = weakref.WeakSet()
        self.most = 0

    def micro(self, number: int) -> Micro:
        def make() -> Rows:
            self.failing(number)
            rows = Rows(number)
            self.made.append(number)
            self.threads.add(threading.current_thread())
            self.alive.add(rows)
            self.most = max(self.most, len(self.alive))
            return rows

        return Micro(2, 2, (number,), make, items=(number,))

    @property
    def learner(self) -> Learner:
        def send(rows: Rows) -> Rows:
            rows.x = rows.x.clone()
            return rows

        return Learner(self.parameters, self.loss, send=send if self._ahead else None)

    def loss(self, batch: Rows) -> Tensor:
        kept = torch.nn.functional.dropout(batch.x, 0.5)
        value: Tensor = (kept @ self.parameters["w.A"] - 1).square().sum()
        self.used.append(round(float(batch.x[0, 0]) * 1e6))
        return value

    def steps(self, epochs: int = 2) -> LazySteps:
        """Return the steps of `epochs` epochs, with two steps in each."""

        def plan(epoch: int) -> list[Step]:
            first = epoch * 2 * MICROS
            return [Step(tuple(self.micro(first + i * MICROS + k) for k in range(MICROS))) for i in range(2)]

        return LazySteps(plan, epochs=epochs)


def _run(
    learner: Fitted, *, progress: Progress | None = None, steps: Any = None, on_event: Any = None
) -> tuple[Progress, list[Event]]:
    events: list[Event] = []
    optimizer = make_optimizer(learner.parameters, learning_rate=0.1)
    steps = learner.steps() if steps is None else steps
    plan = TrainingPlan(steps, Schedule.create("constant", len(steps)), seed=5)
    loop = Loop(learner.learner, plan, optimizer, progress or Progress(), emit=on_event or events.append)
    train([loop])
    return loop.progress, events


def test_prefetching_keeps_order_and_bits() -> None:
    plain, ahead = Fitted(False), Fitted(True)
    _, told = _run(plain)
    _, also = _run(ahead)
    assert ahead.made == plain.made == list(range(STEPS * MICROS))
    assert ahead.used == plain.used
    assert torch.equal(plain.parameters["w.A"], ahead.parameters["w.A"])
    losses, others = ([e.loss for e in seen if isinstance(e, Stepped)] for seen in (told, also))
    assert losses == others
    assert len(losses) == STEPS
    assert plain.threads == {threading.current_thread()}
    (thread,) = ahead.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    assert ahead.most <= 2
    assert not ahead.alive


@pytest.mark.parametrize("number", [0, 1, MICROS, 3 * MICROS - 1])
def test_an_error_while_prefetching_is_raised_in_order(number: int) -> None:
    """All batches before the error are used first."""

    def failing(made: int) -> None:
        if made == number:
            raise ValueError(f"batch {made}")

    learner = Fitted(True, failing)
    with pytest.raises(ValueError, match=f"batch {number}"):
        _run(learner)
    assert len(learner.used) == number
    assert all(not thread.is_alive() for thread in learner.threads)


def test_out_of_memory_while_prefetching_names_the_rows() -> None:
    def failing(made: int) -> None:
        if made == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(ResourceError) as error:
        _run(Fitted(True, failing))
    assert error.value.where == "rows 4"


def test_ctrl_c_ends_the_prefetcher() -> None:
    learner = Fitted(True)

    with pytest.raises(Interrupted):
        _run(learner, on_event=interrupt_at(2))
    assert len(learner.used) <= 3 * MICROS
    assert all(not thread.is_alive() for thread in learner.threads)
    assert not learner.alive


def test_an_unexpected_request_gets_its_own_batch() -> None:
    made: list[str] = []

    def maker(name: str) -> Callable[[], str]:
        def make() -> str:
            made.append(name)
            return name

        return make

    a, b, c = map(maker, "abc")
    with Prefetcher(str.upper) as ahead:
        assert ahead.get(a, b) == "A"
        assert ahead.get(c, a) == "C"
        assert ahead.get(a) == "A"
    assert [name for name in made if name != "b"] == ["a", "c", "a"]


def test_a_sent_batch_has_its_tokens_on_the_device() -> None:
    there = torch.device("meta")
    answers = (Example([1, 2, 3], [False, True, True], 0), Example([1, 4], [False, True], 0))
    plain, pairs = collate(answers), collate_items([Item(answers, 0)])
    for batch in (plain, pairs):
        sent: Batch = batch.sent(there)
        assert type(sent) is type(batch)
        assert (sent.input_ids.device, sent.input_ids.shape) == (there, batch.input_ids.shape)
        assert sent.trained is batch.trained
        assert (sent.lengths, sent.tokens, sent.trained_tokens) == ([3, 2], 5, 3)
    moved = pairs.sent(there)
    assert isinstance(moved, AnswerBatch)
    assert moved.items == pairs.items


@pytest.mark.gpu
def test_a_busy_gpu_computes_on_the_right_batch() -> None:
    """While the GPU is busy with matrix products, copies wait in its queue and their batches are released."""
    device, n = torch.device("cuda"), 4096
    makers = [lambda i=i: collate([Example([i] * n, [False] + [True] * (n - 1), 0)]) for i in range(30)]
    busy, sums = torch.randn(4096, 4096, device=device), []
    with Prefetcher(lambda batch: batch.sent(device)) as ahead:
        for i, make in enumerate(makers):
            batch = ahead.get(make, makers[i + 1] if i + 1 < len(makers) else None)
            busy = (busy @ busy).clamp(-1, 1)
            sums.append(batch.input_ids.sum())
            del batch
    assert torch.stack(sums).tolist() == [i * n for i in range(30)]
