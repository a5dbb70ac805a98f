"""Which waiting jobs a worker trains in one process with the job that it took: in one pass of their base.

    company(job, waiting, device)          the jobs that join it, and the bytes that all of them hold by their plan

**When it pays.** A pass of the base costs nearly the same for 128 tokens as for 256 or 512: its weights are read once,
whatever is in it, and products of few tokens use a processor badly (`benchmarks/together.py` measures how much). A pass
that is full (`batching.micro_tokens`) gains nothing by company, since a second one would follow it. So a job joins as
long as the largest micro-batches of all fit into *one* pass; what it adds to memory then is its adapter's state and the
activations of its rows, and the plan of the group has to fit. Who would have a pass of its own gains nothing, and is
left alone. That a base takes no rows beside one another (padded ones, experts) no plan sees: there they share its
memory alone. And who is compared when it is trained (`after.evaluate`) goes by itself, since the base is loaded once
more for that, and the others would wait.

**Who has begun keeps its company.** What is beside a run's rows changes the last bits of its sums. So a job that was
trained already goes on with those that it was with, if they wait too, else by itself; and by itself where one more loss
of its process would end it, so that nobody fails for what another one does to that process.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.errors import VeneerError
from veneer.jobs.store import Job
from veneer.jobs.validate import is_compared, job_config
from veneer.plan.memory import Load
from veneer.plan.plan import GroupPlan
from veneer.plan.tables import Device
from veneer.train.config.text import TrainConfig
from veneer.train.planning import plan_of_texts


def company(job: Job, waiting: Sequence[Job], device: Device) -> tuple[list[Job], int]:
    """Those of `waiting`, in their order, that are trained in one process with `job`, which was just taken; and what
    all of them hold of this machine's memory by their plan, 0 where that is of a GPU's."""
    others = [other for other in waiting if other.id != job.id]
    if job.attempt > 1:
        chosen = [other for other in others if other.place and other.place == job.place and not other.last_try]
        planned = _group([job, *chosen], device) if chosen and not job.last_try else None
        return (chosen, _held(planned)) if planned is not None else ([], 0)
    chosen, held = [], 0
    for other in others:
        if other.attempt == 0 and other.config.get("base") == job.config.get("base"):
            planned = _group([job, *chosen, other], device)
            if planned is None:
                continue
            if not (planned.fits and _in_one_pass(planned)):
                break  # smaller ones behind it do not overtake
            chosen.append(other)
            held = _held(planned)
    return chosen, held


def _held(planned: GroupPlan) -> int:
    return planned.memory.peak if planned.plans[0].device.name == "cpu" else 0


def _in_one_pass(planned: GroupPlan) -> bool:
    loads = [plan.planned[0] for plan in planned.plans if plan.planned is not None]
    return planned.tokens == sum(load.tokens for load in loads if isinstance(load, Load))


def _group(jobs: Sequence[Job], device: Device) -> GroupPlan | None:
    """The plan of jobs that can share a pass and gain by it; None where they do not."""
    counted = [(job.plan or {}).get("counted") for job in jobs]
    try:
        configs = [job_config(job, job.folder) for job in jobs]
        texts = [config for config in configs if isinstance(config, TrainConfig) and _has_share(config)]
        if len(texts) < len(jobs) or any(map(is_compared, jobs)) or not all(counted) or device.count > 1:
            return None
        planned = plan_of_texts(texts, [job.id for job in jobs], device, [own or {} for own in counted])
    except VeneerError:
        return None
    return planned if all(plan.device.count == 1 for plan in planned.plans) else None


def _has_share(config: TrainConfig) -> bool:
    """Whether its rows can go beside others', as far as its configuration tells: pairs on linear layers alone."""
    adapter = config.adapter
    other = adapter.kind != "lora" or adapter.dora or adapter.modules_to_save or adapter.token_rows
    return not other and config.preference.loss is None
