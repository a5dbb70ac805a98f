"""Threads of a step: the faster number for each size, found by trying, tried again, and never left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from veneer.ops.cpu import compiled
from veneer.ops.weight_layouts import prepack_weight
from veneer.serve.forward.runner import use_threads
from veneer.serve.forward.threads import ALWAYS_ALL, ThreadTuner


class Machine:
    """Steps take a time by their tokens and the threads that are set, on a clock of its own."""

    def __init__(self, most: int = 4) -> None:
        self.now, self.threads, self.most = 0.0, most, most
        self.waking = 1.0
        self.tuner = ThreadTuner(self.use, most, lambda: self.now)

    def use(self, threads: int) -> None:
        self.threads = threads

    def step(self, tokens: int) -> int:
        """Runs a step; the threads it had."""
        with self.tuner.step(tokens):
            threads = self.threads
            self.now += tokens / threads + (self.waking if threads > 1 else 0)
        assert self.threads == self.most
        return threads


def test_each_size_gets_what_is_faster_for_it() -> None:
    machine = Machine()
    for _ in range(20):
        machine.step(1)
        machine.step(32)
    assert [machine.step(1) for _ in range(50)] == [1] * 50  # 1 against 1/4 + 1
    assert [machine.step(32) for _ in range(50)] == [4] * 50  # 32 against 8 + 1
    assert [machine.step(40) for _ in range(50)] == [4] * 50, "the same size"


def test_large_steps_are_not_tried_and_one_core_has_nothing_to_choose() -> None:
    machine, single = Machine(), Machine(most=1)
    assert {machine.step(ALWAYS_ALL) for _ in range(20)} == {4}
    assert {single.step(1) for _ in range(20)} == {1}


def test_a_machine_that_changes_is_noticed() -> None:
    machine = Machine()
    for _ in range(20):
        machine.step(1)
    machine.waking = 0.0
    assert [machine.step(1) for _ in range(3000)][-1] == 4


def test_one_slow_step_is_not_believed() -> None:
    machine = Machine()
    assert machine.step(1) == 4
    with machine.tuner.step(1):
        machine.now += 100  # something else ran
    for _ in range(20):
        machine.step(1)
    assert machine.step(1) == 1


def test_a_step_that_fails_leaves_all_threads_and_no_time() -> None:
    machine = Machine()
    for _ in range(20):
        with pytest.raises(RuntimeError), machine.tuner.step(1):
            raise RuntimeError
        assert machine.threads == 4
    assert sorted(machine.step(1) for _ in range(8)) == [1] * 4 + [4] * 4  # none of both was tried so far


@pytest.mark.skipif(compiled.kernels() is None, reason="set by a compiled function")
def test_threads_are_set_for_the_calling_thread_alone() -> None:
    found: list[int] = []

    def run(threads: int) -> None:
        use_threads(threads)
        found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    for n in (1, 3):
        thread = threading.Thread(target=run, args=(n,))
        thread.start()
        thread.join()
    assert found == [1, 3]
    assert torch.get_num_threads() == before


@pytest.mark.skipif(compiled.usable("panel_product") is None, reason="products by torch, whose bits depend on threads")
def test_products_have_the_same_bits_with_any_number_of_threads() -> None:
    found: dict[int, list[torch.Tensor]] = {1: [], 3: []}

    def run(threads: int) -> None:
        use_threads(threads)
        g = torch.Generator().manual_seed(0)
        for out, into in ((768, 576), (192, 1536), (1000, 64)):
            weight = torch.randn(out, into, generator=g).bfloat16()
            made = prepack_weight(weight)
            for rows in (1, 2, 5, 17, 40):
                x = torch.randn(rows, into, generator=g).bfloat16()
                found[threads] += [made(x), torch.nn.functional.linear(x, weight)]

    for n in found:
        thread = threading.Thread(target=run, args=(n,))
        thread.start()
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[3], strict=True))
