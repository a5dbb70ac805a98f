"""Job validation: the plan, and errors that name the input and a fix."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fakes import FixedTerms, taken
from tests.jobs.small import small_config
from veneer.jobs.store import Job, JobStore
from veneer.jobs.validate import validate_job
from veneer.models.text.base import text_without_weights
from veneer.plan.tables import cpu_device
from veneer.serve.engine.offline import answering_bytes
from veneer.serve.request import Refused

in_sqlite = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


FREE: dict[str, Any] = {}


def looked_at(store: JobStore, config: dict[str, Any], terms: Mapping[str, Any] = FREE, **device: Any) -> Job:
    store.create("acme", config, name="support")
    lease = taken(store, state="validating")
    return validate_job(store, lease, FixedTerms(store, **terms), replace(cpu_device(), **device))


@in_sqlite
def test_plan_counts_the_jobs_rows(store: JobStore, folder: Path) -> None:
    from veneer.models.text.base import load_text
    from veneer.train.config.load import config_from
    from veneer.train.text.data import planned_steps, read_data

    config = small_config(folder)
    job = looked_at(store, config, {"price": 4_000_000})
    chosen, _ = config_from(config | {"output": str(folder / "x")})
    data = read_data(chosen, load_text(config["base"]))
    steps = [*planned_steps(data.train.items, chosen)]
    assert (job.state, job.steps) == ("queued", len(steps))
    assert job.plan["rows"] == len(data.train.items) == 8
    mean = sum(item.tokens for item in data.train.items) / 8
    assert job.plan["tokens"] == pytest.approx(3 * 2 * mean, abs=1)
    assert job.planned == 4 * job.plan["tokens"]
    assert job.plan["seconds"] > 0
    assert not job.folder.exists()  # validation leaves no files behind


@in_sqlite
def test_sampled_completions_are_planned_once(store: JobStore, folder: Path) -> None:
    from veneer.train.config.load import config_from
    from veneer.train.inspect import inspect_run

    drawn = {"loss": "grpo", "group": 3, "max_tokens": 40, "rewards": [{"kind": "exact_match"}]}
    config = small_config(folder, reinforcement=drawn)
    job = looked_at(store, config)
    chosen, _ = config_from(config | {"output": str(folder / "x")})
    tokenizer = text_without_weights(config["base"]).tokenizer
    asked = [json.loads(line)["messages"][:1] for line in Path(config["data"]["train"]).read_text().splitlines()]
    lengths = [len(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in asked]
    assert job.plan["counted"]["longest"] in lengths
    answers = 3 * 2 * 3  # steps · prompts · completions per prompt
    assert answers * (min(lengths) + 40) <= job.plan["tokens"] <= answers * (max(lengths) + 40)
    assert job.plan["rows"] == 8
    look = inspect_run(chosen, device=cpu_device()).plan.to_dict()
    assert (look["tokens"], look["peak_bytes"]) == (job.plan["tokens"], job.plan["peak_bytes"])


@in_sqlite
def test_plan_includes_the_evaluations_completions(store, folder, monkeypatch):
    """On a CPU, the plan's peak is the larger of training's and sampling's.

    A peak that exceeds the memory is refused."""

    def asked(*metrics: str) -> Job:
        about = {"after": {"evaluate": {"metrics": metrics}}}
        store.create("acme", small_config(folder), name="support", about=about)
        return validate_job(store, taken(store, state="validating"), FixedTerms(store), cpu_device())

    scored, answered = (job.plan or {} for job in (asked("loss"), asked("loss", "exact_match")))
    memory, base = answered["memory"], text_without_weights(str(folder / "tiny-base"))
    beside = answering_bytes(base, memory["weights"])
    assert beside > memory["weights"]
    assert scored["peak_bytes"] == sum(bytes for part, bytes in scored["memory"].items() if part != "host")
    assert answered["peak_bytes"] == max(scored["peak_bytes"], memory["context"] + memory["weights"] + beside)
    monkeypatch.setattr("veneer.serve.engine.offline.answering_bytes", lambda *given: 1 << 50)
    assert asked("loss").state == "queued"
    failed = asked("exact_match")
    assert failed.state == "failed"
    assert "metrics: [loss]" in str(failed.error)


def bad_rows(folder: Path, *lines: str) -> dict[str, Any]:
    file = folder / f"bad-{abs(hash(lines))}.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return {"data": {"train": str(file)}}


def no_room(folder: Path) -> dict[str, Any]:
    drawn = {"loss": "grpo", "max_tokens": 19, "rewards": [{"kind": "exact_match"}]}
    data = {"train": str(folder / "rows.jsonl"), "max_length": 20, "long_rows": "drop"}
    return {"data": data, "reinforcement": drawn}


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
NOT_LEARNED = json.dumps({"messages": [{"role": "user", "content": "a"}]})
BAD: dict[str, tuple[Any, str, str]] = {
    "a broken line": (lambda f: bad_rows(f, GOOD, "{"), "data", r".jsonl:2"),
    "no rows": (lambda f: bad_rows(f), "data", "no rows|empty"),
    "nothing to learn": (lambda f: bad_rows(f, NOT_LEARNED), "(preflight|data)", "learn|assistant"),
    "a file that is not there": (lambda f: {"data": {"train": str(f / "none.jsonl")}}, "data", "none.jsonl"),
    "a base that is not there": (lambda f: {"base": str(f / "no-base")}, "(base|config)", "no-base"),
    "a key that is none": (lambda f: {"adapter": {"rang": 8}}, "config", "rang"),
    "a value of another kind": (lambda f: {"adapter": {"rank": "big"}}, "config", "rank"),
    "no data": (lambda f: {"data": {}}, "config", "data.train"),
    "no room for an answer": (no_room, "preflight", "no prompt is left"),
}


@in_sqlite
@pytest.mark.parametrize("case", BAD)
def test_invalid_input_fails_the_job_with_its_location(store: JobStore, folder: Path, case: str) -> None:
    change, kind, said = BAD[case]
    job = looked_at(store, small_config(folder) | change(folder))
    assert job.state == "failed"
    assert re.fullmatch(kind, job.error["kind"]), job.error
    assert re.search(said, job.error["message"] + job.error.get("where", "")), job.error
    events, _ = store.events("acme", job.id)
    assert (events[-1].level, events[-1].data) == ("error", {"state": "failed"})
    bill = store.bill("acme", job.id)
    assert bill.cost == 0


@in_sqlite
def test_job_that_does_not_fit_is_refused(store: JobStore, folder: Path) -> None:
    job = looked_at(store, small_config(folder), memory=10_000_000)
    assert "does not fit" in job.error["message"]
    assert job.error["fix"]
    job = looked_at(store, small_config(folder), {"price": 10**9, "budget": 1000})
    assert (job.error["kind"], "budget of" in job.error["message"]) == ("overbudget", True)


@in_sqlite
def test_refused_tenant_is_named_with_the_reasons(store: JobStore, folder: Path) -> None:
    error = looked_at(store, small_config(folder), {"jobs": 0}).error
    assert error == {
        "kind": "config",
        "where": "tenant",
        "message": "acme is not allowed to train: the tenant does not exist, is disabled, or has a job limit of 0",
        "fix": "see veneer tenant list",
    }
    with pytest.raises(Refused, match="acme is not allowed to train") as refused:
        FixedTerms(store, jobs=0).check_allowed("acme")
    assert "veneer" not in str(refused.value)


@in_sqlite
def test_unknown_key_in_a_stored_section_is_named(store: JobStore, folder: Path) -> None:
    store.create("acme", small_config(folder), name="support", about={"after": {"alias": "prod", "route": None}})
    job = validate_job(store, taken(store, state="validating"), FixedTerms(store), cpu_device())
    assert job.error["kind"] == "config"
    assert "unknown key `after.alias`" in job.error["message"]
