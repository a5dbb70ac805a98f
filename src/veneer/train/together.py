"""Several runs at once, each as if it were alone: N generators of steps (`loop.stepping`), driven in step.

    results = in_step(members, make, asked)      make(wanted) does what all of them want, in as few passes as it can

Every run has its parameters, optimizer, schedule, evaluations, files and end, and its loop is the one loop. What they
share is when: each makes its step k of this command together with the others' step k. One that fails or ends leaves,
and the others go on without it.

Checkpoints are written by all when one of them is due, so that a group that was killed goes on bit for bit: from the
last step of which every run has its own, with the same runs beside one another as before (`resume_points`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from veneer.errors import CheckpointError, Interrupted, VeneerError, counted
from veneer.train import checkpoint
from veneer.train.loop import StepDone, Stepping, StepWanted, StopAsked, stop_signals
from veneer.train.run import AttachedTask, Run
from veneer.train.save import Outcome

_R = TypeVar("_R", bound=Outcome)

_ENDED = ("finished", "early stopping")


@dataclass(frozen=True)
class Member(Generic[_R]):
    """One run of a group: its adapter on the base they share, and its steps."""

    run: Run
    task: AttachedTask[_R]
    steps: Stepping[_R]


Leave = Callable[[Sequence[int]], Mapping[int, VeneerError | None]]
"""Given the places of those that go on after a step: which of them end there, and as what; None for one that saves its
state and ends as Interrupted."""

_MakeSteps = Callable[[Mapping[int, StepWanted]], Mapping[int, "StepDone | VeneerError | None"]]
"""Makes the steps that some members (by their place) want now. An error is that member's own; None, or nothing at all,
for one whose step was stopped: then nothing is kept of any."""


def in_step(
    members: Mapping[int, Member[_R]],
    make: _MakeSteps,
    asked: StopAsked,
    leave: Leave = lambda running: {},
    ended: Callable[[int, _R | VeneerError], None] = lambda place, outcome: None,
) -> dict[int, _R | VeneerError]:
    """Drives all of them to their ends; what came of each. Who is who is said by a number, its place, everywhere.
    `asked`: what their loops look at, which is true from here on as soon as a signal came. `leave`: see there.
    `ended`: hears what came of one at once.

    Raises Interrupted when all have saved their state because of one, and at once whatever is no VeneerError: a
    fault."""
    results: dict[int, _R | VeneerError] = {}
    wanted: dict[int, StepWanted] = {}
    stopped: list[Interrupted] = []

    def go_on(place: int, done: StepDone | VeneerError | None, *, alone: bool = False) -> None:
        """One run up to the next step it wants, or to its end. `alone`: the others stay, if it is interrupted."""
        member = members[place]
        first = wanted.pop(place, None) is None
        member.task.act()
        try:
            if isinstance(done, VeneerError):
                wanted[place] = member.steps.throw(done)
            else:
                wanted[place] = next(member.steps) if first else member.steps.send(done)
            return
        except StopIteration as end:
            results[place] = end.value
        except Interrupted as error:
            if not alone:
                stopped.append(error)
                return  # it goes on with the others, and is of their group until then
            results[place] = error
        except VeneerError as error:
            results[place] = error
            member.run.note(f"{error.what}; this run ends here, the others go on")
        member.run.group.remove(member.run.called)
        ended(place, results[place])

    try:
        for place in members:
            go_on(place, None)
        with stop_signals(asked):
            while wanted:
                failed = _saved(wanted)
                made = {} if asked() else make({place: w for place, w in wanted.items() if place not in failed})
                if any(done is None for done in made.values()):
                    made = {}
                for place in list(wanted):
                    go_on(place, failed.get(place, made.get(place)))
                for place, error in leave(list(wanted)).items():
                    go_on(place, error, alone=True)
    finally:
        for member in members.values():
            member.steps.close()
    if stopped:
        saved = f"stopped; the state of {counted(len(stopped), 'run')} is saved"
        raise Interrupted(saved, fix=stopped[0].fix, signal=stopped[0].signal)
    return results


def _saved(wanted: Mapping[int, StepWanted]) -> dict[int, VeneerError]:
    """A checkpoint of each where one is due of any; who could not write its own, and why."""
    failed: dict[int, VeneerError] = {}
    for place, want in wanted.items() if any(want.due for want in wanted.values()) else ():
        try:
            want.save()
        except VeneerError as error:
            failed[place] = error
    return failed


def resume_points(runs: Sequence[Run]) -> list[Path | CheckpointError | None]:
    """The checkpoint that each run goes on from; None for its beginning.

    Where some of them were trained together, it is for those the last step of which each has its checkpoint: they are
    then beside one another as they were. One that had ended by then is at its end; for one that had failed it is an
    error, since beside the others it would change their last bits. Where one has the first checkpoint of all, and those
    beside it have none yet, it begins again with them."""
    have = {run.called: checkpoint.by_step(run.folder / "checkpoints") for run in runs}
    group: set[str] = set()
    last = -1
    for step in sorted({step for found in have.values() for step in found}, reverse=True):
        for name, found in have.items():
            if step in found and last < 0:
                beside = _beside(name, found[step]) & have.keys()
                if all(step in have[other] for other in beside):
                    group, last = beside, step
    out: list[Path | CheckpointError | None] = []
    for run in runs:
        found = have[run.called]
        newest = found[max(found)] if found else None
        beside = set() if newest is None else _beside(run.called, newest) & have.keys()
        if run.called in group:
            out.append(found[last])
        elif len(found) == 1 and any(not have[other] for other in beside):
            out.append(None)
        elif newest is None or not beside & group or _ended(newest):
            out.append(newest)
        else:
            out.append(
                CheckpointError(
                    f"this run had ended early, after its step {max(found)}; those that it was trained together with "
                    f"are at step {last}",
                    where=str(run.folder),
                    fix="see to its data or settings, and go on with it by itself: veneer train CONFIG.yaml --resume",
                )
            )
    return out


def _beside(name: str, path: Path) -> set[str]:
    """The runs that a checkpoint's run was trained together with, itself among them."""
    about = checkpoint.read_checkpoint(path).get("about", {})
    return {name, *about.get("together", [])}


def _ended(path: Path) -> bool:
    return checkpoint.read_checkpoint(path)["progress"]["stopped"] in _ENDED
