"""A small run that can be killed: `python -m tests.train.killable FOLDER[@KILL_AT] …`, each in a process of its own.

Trains a two-layer network with dropout, and with noise from Python's and numpy's generators, for twelve steps with a
checkpoint every second one; goes on from the newest checkpoint. Kills itself with SIGKILL at the KILL_AT-th
call that touches the disk or ends a step, so also in the middle of writing or pruning a checkpoint. At its end it
writes `final.bin`, the bytes of all parameters and optimizer tensors. Prints how each process ended, as a JSON list.

The processes are forks of one that has imported what they need, and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch._dynamo  # an optimizer imports it at its first step, which would be in each process
from torch import Tensor, nn

from veneer.train import checkpoint
from veneer.train.events import Event, Stepped
from veneer.train.loop import Learner, Loop, Micro, Score, Step, TrainingPlan, train
from veneer.train.optim import Schedule, make_optimizer
from veneer.train.report.log import JsonLog

STEPS = 12


class Net:
    """Two layers with dropout, and noise from Python's and numpy's generators."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.parameters = {f"{name}.A": p for name, p in self.net.named_parameters()}
        self.data = torch.randn(STEPS * 4, 4, generator=torch.Generator().manual_seed(0))

    def loss(self, batch: list[int]) -> Tensor:
        noise = random.random() + numpy.random.rand()
        return (self.net(self.data[batch]) - noise).square().sum()

    def score(self, interrupted: Callable[[], bool]) -> Score:
        self.net.eval()
        with torch.no_grad():
            value = (self.net(self.data) - 1).square().sum().item()
        self.net.train()
        return Score(value, len(self.data), len(self.data))


def main(folder: Path, kill_at: int | None) -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return wrapped

    os.fsync, os.rename, shutil.rmtree = killing(os.fsync), killing(os.rename), killing(shutil.rmtree)
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    net = Net()
    parameters = net.parameters

    def micro(rows: list[int]) -> Micro:
        return Micro(len(rows), len(rows), tuple(rows), lambda: rows)

    steps = [Step((micro([4 * i, 4 * i + 1]), micro([4 * i + 2, 4 * i + 3]))) for i in range(STEPS)]
    optimizer = make_optimizer(parameters, learning_rate=0.05, loraplus_ratio=2.0)
    progress = checkpoint.Progress()
    newest = checkpoint.latest(folder)
    if newest is not None:
        progress, notes, *_ = checkpoint.restore(
            newest, parameters=parameters, optimizer=optimizer, identity={"run": 1}
        )
        assert not notes
    log = JsonLog(folder / "log.jsonl", progress if newest is not None else None)

    def tell(event: Event) -> None:
        log(event)
        if isinstance(event, Stepped):
            count()

    def save(progress: checkpoint.Progress) -> Path:
        return checkpoint.save(
            folder, parameters=parameters, optimizer=optimizer, progress=progress, identity={"run": 1}, keep=2
        )

    plan = TrainingPlan(
        steps, Schedule.of("cosine", STEPS, 3), evaluate_at=range(0, STEPS, 3), save_at=range(0, STEPS, 2)
    )
    train([Loop(Learner(parameters, net.loss, score=net.score), plan, optimizer, progress, save, tell)])
    state = [p.detach() for p in parameters.values()]
    state += [optimizer.state[p][entry] for p in parameters.values() for entry in sorted(optimizer.state[p])]
    (folder / "final.bin").write_bytes(b"".join(t.numpy().tobytes() for t in state))


def forked(folder: Path, kill_at: int | None) -> int:
    """How a process of its own ends: 0, or minus the signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            main(folder, kill_at)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    runs = [argument.partition("@") for argument in sys.argv[1:]]
    print(json.dumps([forked(Path(folder), int(at) if at else None) for folder, _, at in runs]))
