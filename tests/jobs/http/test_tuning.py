"""OpenAI's fine-tuning routes, called with OpenAI's client.

The tests act as the worker that trains the jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy.exc import OperationalError

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, fuzzed, live
from veneer.jobs.files import Files, open_files
from veneer.jobs.http.files import file_routes, large_bodies
from veneer.jobs.http.tuning import TuningQueue, tuning_routes
from veneer.jobs.store import UNFINISHED, JobCheckpoint, JobEvent, JobLease, JobStore, OverBudget
from veneer.jobs.validate import error_json
from veneer.library.library import Library, open_library
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.quota import Quotas
from veneer.serve.settings import QuotaLimits
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store
from veneer.train.config.load import config_from
from veneer.train.rewards.build import build_rewards, local_judge_models
from veneer.train.rewards.judge import Reply
from veneer.train.rewards.reward import Answer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "Hello, can you tell me how cold San Francisco is today?"}]},
    "preferred_output": [{"role": "assistant", "content": "Today in San Francisco, it is not quite cold."}],
    "non_preferred_output": [{"role": "assistant", "content": "It is not particularly cold today."}],
}


@dataclass
class Jobs:
    """A server and its job queue; tests act as the worker."""

    server: Live
    store: JobStore
    files: Files
    library: Library

    def client(self, key: str = "acme") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0)

    def taken(self, state: Any = "queued") -> JobLease:
        return self.store.acquire("worker", 60, state)

    def trained(self) -> JobLease:
        """Validate and start the next job; return its lease."""
        lease = self.taken("validating")
        self.store.queue(lease, {"tokens": 900, "steps": 9})
        return self.taken()


class Catalog(ToyCatalog):
    """A catalog whose adapters also have a name in the library."""

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        resolved = super().resolve(model, caller)
        return replace(resolved, adapters=(f"library/{resolved.target}@1",)) if resolved.mix else resolved


@contextmanager
def serving(folder: Path) -> Iterator[Jobs]:
    """Run a server with its own library."""
    with open_library(folder) as library, closing(Store(f"{folder}-tenants.sqlite")) as tenants:
        manage.add_tenant(tenants, "acme", actor="test")
        files, store = open_files(library), JobStore(library)
        routers = [file_routes(files), tuning_routes(TuningQueue(store, files, tenants))]
        more: dict[str, Any] = {"routers": routers, "large": large_bodies(files)}
        with live(ToyEngine(ToyText()), Catalog(), ToyTenancy(), **more) as server:
            yield Jobs(server, store, files, library)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_HOME", str(home))
        with serving(home / "library") as running:
            yield running


@pytest.fixture
def client(jobs: Jobs) -> Iterator[openai.OpenAI]:
    with jobs.client() as opened:
        yield opened
        for job in opened.fine_tuning.jobs.list(limit=100):
            if job.status not in ("succeeded", "failed", "cancelled"):
                opened.fine_tuning.jobs.cancel(job.id)


def sent(client: openai.OpenAI, rows: Any = (ROW,), name: str = "tickets.jsonl") -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=(name, data), purpose="fine-tune").id


def created(client: openai.OpenAI, **more: Any) -> Any:
    return client.fine_tuning.jobs.create(**{"model": "toy", "training_file": sent(client), **more})


def test_job_from_creation_to_result(jobs: Jobs, client: openai.OpenAI) -> None:
    """Follows a script that was written for OpenAI."""
    file = sent(client)
    job = client.fine_tuning.jobs.create(
        model="toy", training_file=file, suffix="My support!", seed=7, metadata={"team": "help"}
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "toy", 7)
    assert (job.training_file, job.validation_file, job.metadata) == (file, None, {"team": "help"})
    assert job.fine_tuned_model is job.error is job.finished_at is job.trained_tokens is None
    assert (job.result_files, job.integrations, job.organization_id) == ([], [], "org-acme")
    auto = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
    assert job.hyperparameters.to_dict() == auto
    client.files.delete(file)  # the job has its own copy
    lease = jobs.taken("validating")
    config, _ = config_from({**lease.job.config, "output": {"directory": "out"}})
    assert Path(str(config.data.train)).read_bytes() == json.dumps(ROW).encode() + b"\n"
    assert config.data.split == 0
    jobs.store.queue(lease, {"tokens": 900, "steps": 9})
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "queued"
    assert job.hyperparameters.to_dict() == {"batch_size": 1, "learning_rate_multiplier": 1.0, "n_epochs": 10}
    lease = jobs.taken()
    accuracy = {"token_accuracy": 0.75, "validation_token_accuracy": 0.5}
    point = JobCheckpoint(4, {"loss": 1.25, "validation_loss": 1.5, **accuracy}, "acme/x@1")
    metrics_data: list[dict[str, Any]] = [
        {"step": 4, "steps": 9, "tokens": 400, "loss": 1.25, "token_accuracy": 0.75},
        {"step": 4, "validation_loss": 1.5, "token_accuracy": 0.5},
    ]
    events = [JobEvent("info", kind, "", d) for kind, d in zip(("metrics", "validation"), metrics_data, strict=True)]
    jobs.store.record(lease, events, [point, JobCheckpoint(8)], trained=(4, 9, 400))
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "running"
    assert job.estimated_finish is not None
    jobs.store.finish(lease, result={"reference": "acme/x@2"})
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.trained_tokens) == ("succeeded", 400)
    assert job.finished_at is not None
    ft, base, organisation, suffix, id = job.fine_tuned_model.split(":")
    assert (ft, base, organisation, suffix) == ("ft", "toy", "acme", "my-support")
    assert jobs.store.get("acme", job.id).name == f"acme/my-support-{id}"
    (results,) = job.result_files
    assert client.fine_tuning.jobs.retrieve(job.id).result_files == [results]
    assert client.files.retrieve(results).purpose == "fine-tune-results"
    assert client.files.content(results).text == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n4,1.25,0.75,1.5,0.5\n"
    )
    (only,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert only.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4"
    assert (only.step_number, only.metrics.train_loss, only.metrics.full_valid_loss) == (4, 1.25, 1.5)
    assert only.metrics.train_mean_token_accuracy == 0.75
    assert only.metrics.valid_mean_token_accuracy == only.metrics.full_valid_mean_token_accuracy == 0.5
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # pages
    assert len(events) == len({event.id for event in events}) == len(jobs.store.events("acme", job.id)[0])
    assert [event.message for event in events][-1].startswith("created")
    validation, metrics = (event.data for event in events if event.type == "metrics")
    trained = {"train_loss": 1.25, "train_mean_token_accuracy": 0.75}
    assert metrics == {"step": 4, "total_steps": 9, "tokens": 400, **trained}
    full = {"full_valid_loss": 1.5, "full_valid_mean_token_accuracy": 0.5}
    assert validation == {"step": 4, "valid_loss": 1.5, "valid_mean_token_accuracy": 0.5, **full}


def test_dpo_job_has_the_requested_configuration(jobs: Jobs, client: openai.OpenAI) -> None:
    file, held_out = sent(client, [PAIR] * 50), sent(client, [PAIR], "held.jsonl")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "learning_rate_multiplier": 2, "n_epochs": 4}}}
    job = created(client, training_file=file, validation_file=held_out, method=method)
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.2
    config, _ = config_from({**jobs.store.get("acme", job.id).config, "output": {"directory": "out"}})
    plain, _ = config_from({"base": "toy", "data": {"train": "x"}, "output": "o", "preference": {"loss": "dpo"}})
    assert config.preference.loss == "dpo"
    assert config.preference.beta == 0.2
    assert config.optimizer.learning_rate == 2 * plain.optimizer.learning_rate
    assert (config.schedule.epochs, config.batching.rows) == (4, 2)
    assert Path(str(config.data.validation)).name == "held.jsonl"


GRADER: dict[str, Any] = {
    "type": "string_check", "name": "same", "operation": "eq", "input": "{{ sample.output_text }}",
    "reference": "{{ item.wanted }}",
}  # fmt: skip
SCORED: dict[str, Any] = {
    "type": "score_model", "name": "taste", "model": "toy", "range": [0, 1],
    "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
}  # fmt: skip


def reinforced(grader: Any = GRADER, **more: Any) -> dict[str, Any]:
    return {"method": {"type": "reinforcement", "reinforcement": {"grader": grader, **more}}}


def test_reinforcement_job_has_the_requested_configuration(jobs: Jobs, client: openai.OpenAI) -> None:
    graders = {"a": GRADER, "b": SCORED, "c": {**SCORED, "model": "sql"}}
    both = {"type": "multi", "name": "both", "graders": graders, "calculate_output": "a + b"}
    schema = {"type": "object", "properties": {"total": {"type": "number"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    numbers = {"compute_multiplier": 0.5, "eval_interval": 7, "learning_rate_multiplier": 2}
    numbers |= {"n_epochs": 2, "batch_size": 4}
    rows = [{"messages": [{"role": "user", "content": f"{n} + 1?"}], "wanted": str(n + 1)} for n in range(50)]
    file, held_out = sent(client, rows), sent(client, rows, "held.jsonl")
    request = reinforced(both, hyperparameters=numbers, response_format=form)
    job = created(client, training_file=file, validation_file=held_out, **request)
    # OpenAI's class has a single grader, but the request has several, by name
    method = job.method.reinforcement.to_dict(warnings=False)
    assert job.method.type == "reinforcement"
    assert method["grader"] == both
    assert method["response_format"] == form
    assert method["hyperparameters"] == numbers
    config, _ = config_from({**jobs.store.get("acme", job.id).config, "output": {"directory": "out"}})
    reinforcement = config.reinforcement
    assert (reinforcement.loss, reinforcement.group, reinforcement.grammar) == ("grpo", 4, {"json_schema": schema})
    (reward,) = reinforcement.rewards
    assert local_judge_models([reward]) == {"base", "library/sql@1"}
    assert reward.sandbox  # type: ignore[attr-defined]
    with build_rewards([reward], ask=lambda questions: [Reply("1")] * len(questions)) as rewards:
        assert rewards.judge([Answer([], "3", {"wanted": "3"})]).values == [2]
    assert (config.schedule.epochs, config.batching.rows, config.evaluation.every) == (2, 4, 7)
    values = {"base": "toy", "data": {"train": "x"}, "output": "o", "reinforcement": reinforcement.model_dump()}
    plain, _ = config_from(values)
    assert config.optimizer.learning_rate == 2 * plain.optimizer.learning_rate


def test_grader_needs_a_visible_model_and_the_right_to_run_python(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="polite"):
        created(client, **reinforced({**SCORED, "model": "polite"}))
    with pytest.raises(openai.PermissionDeniedError, match="--python-graders"):
        created(client, **reinforced({"type": "python", "name": "mine", "source": "def grade(sample, item): return 1"}))


EXAMPLES: list[dict[str, Any]] = [
    {},
    {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
    {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}},
    {"validation_file": "same"},
    {"hyperparameters": {"n_epochs": 2}},
    {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": "auto", "n_epochs": "auto"}}}},
    {"suffix": "custom-model-name", "seed": 105},
    {"metadata": None, "suffix": None, "integrations": None, "seed": None},
]
"""Request bodies from OpenAI's reference and guides, without rewards and W&B."""


def after(**section: Any) -> dict[str, Any]:
    """Return the arguments with which OpenAI's client sends a section `after`."""
    return {"extra_body": {"after": section}}


@pytest.mark.parametrize("body", EXAMPLES, ids=str)
def test_bodies_of_openais_guides_are_accepted(client: openai.OpenAI, body: dict[str, Any]) -> None:
    file = sent(client)
    body = {key: file if value == "same" else value for key, value in body.items()}
    assert created(client, training_file=file, **body).status == "validating_files"


INVALID: list[tuple[dict[str, Any], str | None, str]] = [
    ({"training_file": ""}, "training_file", "training_file"),
    ({"suffix": "x" * 65}, "suffix", "64"),
    ({"seed": -1}, "seed", "seed"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters", "50"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters", "epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters", "n_epochs must be a number or 'auto'"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method", "supervised does not belong"),
    ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 2}}, None, "method.dpo"),
    ({"method": {"type": "reinforcement"}}, "method", "grader is required"),
    ({"method": {"type": "reinforced"}}, "method", "supervised"),
    (reinforced({**GRADER, "operation": "is"}), "method.reinforcement.grader.operation", "eq"),
    (reinforced({**GRADER, "input": "{{ x }}"}), "method.reinforcement.grader", "path"),
    (reinforced(hyperparameters={"reasoning_effort": "high"}), "method", "effort"),
    (reinforced(hyperparameters={"eval_samples": 4}), "method", "eval_samples"),
    (reinforced(hyperparameters={"compute_multiplier": 11}), "method", "10"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "at most 0"),
    ({"extra_body": {"colour": "red"}}, "colour", "colour"),
    (after(rout={}), "after", "rout"),
    (after(alias="prod"), "after", "alias"),
    (after(route={"name": "globex/x"}), "after.route.name", "not in the namespace of tenant acme"),
    (after(evaluate={}, promote={"metric": "loss"}), "after", "needs a route"),
    (after(evaluate={"metrics": ["exact_mach"]}), "after.evaluate.metrics", "exact_match"),
    (after(evaluate={"limit": 5000}), "after.evaluate.limit", "1,000"),
]
MISSING: list[tuple[dict[str, Any], str, str, str]] = [
    ({"model": "gpt-4o-mini"}, "model", "model_not_available", "'toy'"),
    ({"model": "sql"}, "model", "model_not_available", "tuned from it"),
    ({"training_file": "file-none"}, "training_file", "file_not_found", "upload it first"),
    ({"validation_file": "file-none"}, "validation_file", "file_not_found", "upload it first"),
    (after(evaluate={"data": "/etc/passwd"}), "after.evaluate.data", "file_not_found", "upload it first"),
]


@pytest.mark.parametrize(
    ("body", "param", "code", "what"),
    [*MISSING, *((body, param, "invalid_request", what) for body, param, what in INVALID)],
    ids=str,
)
def test_invalid_request_names_parameter_and_reason(client, body, param, code, what):
    with pytest.raises(openai.BadRequestError, match=what) as refused:
        created(client, **body)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert not [job for job in client.fine_tuning.jobs.list() if job.status == "validating_files"]


def test_missing_objects_return_openais_errors(client: openai.OpenAI) -> None:
    requests: list[tuple[Any, str | None, str]] = [
        (lambda: client.files.retrieve("file-none"), None, "No such File object: file-none"),
        (lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), "fine_tune_not_found", "fine tune: ftjob-none"),
        (lambda: client.models.delete("ft:toy:acme::none"), "model_not_found", "does not exist"),
    ]
    for request, code, what in requests:
        with pytest.raises(openai.NotFoundError, match=what) as refused:
            request()
        assert (refused.value.type, refused.value.code) == ("invalid_request_error", code)


def test_training_file_must_be_jsonl(client: openai.OpenAI) -> None:
    file = client.files.create(file=("tickets.pdf", b"%PDF"), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError, match="jsonl") as refused:
        created(client, training_file=file)
    assert (refused.value.param, refused.value.code) == ("training_file", "invalid_file_format")


def test_failed_job_names_file_and_line(jobs: Jobs, client: openai.OpenAI) -> None:
    job = created(client, validation_file=sent(client, name="held.jsonl"))
    lease = jobs.taken("validating")
    where = f"{lease.job.config['data']['validation']}:3"
    error = {"kind": "data", "message": f"1 of 9 rows are not usable:\n  {where}: no `messages`", "fix": "correct it"}
    jobs.store.finish(lease, error=error)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert (failed.error.param, failed.error.code) == ("validation_file", "invalid_validation_file")
    assert "held.jsonl:3: no `messages`" in failed.error.message
    assert "correct it" in failed.error.message
    assert str(lease.job.folder.parent) not in failed.to_json()


def test_section_after_is_stored_with_copied_files(jobs: Jobs, client: openai.OpenAI) -> None:
    """The job shows the section, and keeps its own copy of the held-out file."""
    section = {
        "evaluate": {"data": sent(client, name="held.jsonl"), "metrics": ["exact_match"]},
        "route": {"name": "support", "weight": 0.2},
        "promote": {"metric": "exact_match", "against": "serving", "by": 0.01},
    }
    job = created(client, **after(**section))
    client.files.delete(section["evaluate"]["data"])
    assert job.to_dict()["after"] == section
    stored = jobs.store.get("acme", job.id).about["after"]
    (path,) = stored["evaluate"]["data"]
    assert Path(path).read_text() == json.dumps(ROW) + "\n"
    assert (stored["route"], stored["promote"]) == ({**section["route"], "shadow": False}, section["promote"])
    lease = jobs.taken("validating")
    jobs.store.finish(lease, error={"kind": "data", "message": "no `messages`", "where": f"{path}:1"})
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.error.param, failed.error.code) == ("after.evaluate.data", "invalid_data")
    assert failed.error.message == "held.jsonl:1: no `messages`"


@pytest.mark.parametrize("kind", ["internal", "died", "lost"])
def test_internal_errors_are_hidden_from_clients(jobs: Jobs, client: openai.OpenAI, kind: str) -> None:
    """Neither the job nor its events show host names or paths."""
    secret = 'OperationalError: connection to "db.internal" failed: /srv/secret'
    job = created(client)
    lease = jobs.trained()
    if kind == "died":
        jobs.store.died(lease, secret)
        jobs.store.release(jobs.taken(), "could not be started", secret)
        lease = jobs.taken()
    jobs.store.finish(lease, error={"kind": kind, "message": secret, "fix": f"see {secret}"})
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.error.code == "server_error"
    texts = [failed.to_json(), *(event.to_json() for event in client.fine_tuning.jobs.list_events(job.id))]
    assert "failed: " in "".join(texts)
    assert "db." not in "".join(texts)
    assert "secret" not in "".join(texts)


def test_job_over_the_budget_fails(jobs: Jobs, client: openai.OpenAI) -> None:
    job = created(client)
    lease = jobs.taken("validating")
    with pytest.raises(OverBudget) as over:
        jobs.store.queue(lease, {"tokens": 900, "steps": 9}, price=10**9, budget=1)
    jobs.store.finish(lease, error=error_json(over.value))
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert (error.code, error.param) == ("budget_exceeded", None)
    assert "0.90" in error.message
    assert "raise the budget" in error.message


def test_database_outage_is_503(jobs: Jobs, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error contains no part of the database driver's message."""

    def away(*given: object, **named: object) -> None:
        raise OperationalError("SELECT secret", {}, Exception("host db.internal"))

    monkeypatch.setattr(jobs.store, "get", away)
    monkeypatch.setattr(jobs.files, "get", away)
    for request in (client.fine_tuning.jobs.retrieve, client.files.retrieve):
        with pytest.raises(openai.InternalServerError) as refused:
            request("ftjob-x")
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
        assert "internal" not in refused.value.message
        assert "secret" not in refused.value.message


def test_pause_resume_cancel(jobs: Jobs, client: openai.OpenAI) -> None:
    id = created(client).id
    with pytest.raises(openai.BadRequestError, match="validating") as refused:
        client.fine_tuning.jobs.pause(id)
    assert refused.value.code == "wrong_state"
    jobs.trained()
    assert client.fine_tuning.jobs.pause(id).status == "paused"
    assert client.fine_tuning.jobs.resume(id).status == "queued"
    done = client.fine_tuning.jobs.cancel(id)
    assert done.status == "cancelled"
    assert done.fine_tuned_model is None
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.fine_tuning.jobs.resume(id)
    name = jobs.store.get("acme", id).about["openai"]["tuned"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert missing.value.code == "model_not_found"


def test_jobs_are_listed_by_page(client: openai.OpenAI) -> None:
    earlier = [job.id for job in client.fine_tuning.jobs.list()]
    ids = [created(client).id for _ in range(5)][::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids + earlier
    with pytest.raises(openai.BadRequestError, match="cannot filter"):
        client.fine_tuning.jobs.list(metadata={"n": "1"})


def test_jobs_of_other_tenants_are_404(jobs: Jobs, client: openai.OpenAI) -> None:
    """Covers the routes with a job's id, and requests that name files."""
    id = created(client).id
    file = sent(client)
    with jobs.client("admin") as stranger:
        own_file = sent(stranger)
        jobs_of = stranger.fine_tuning.jobs
        changes = (jobs_of.cancel, jobs_of.pause, jobs_of.resume)
        for attack in (jobs_of.retrieve, jobs_of.list_events, jobs_of.checkpoints.list, *changes):
            with pytest.raises(openai.NotFoundError) as refused:
                attack(id)
            assert refused.value.code == "fine_tune_not_found"
        with pytest.raises(openai.NotFoundError):
            stranger.fine_tuning.jobs.list(after=id)
        assert stranger.fine_tuning.jobs.list().data == []
        held_out = {"training_file": own_file, **after(evaluate={"data": [own_file, file]})}
        for more in ({"training_file": file}, {"training_file": own_file, "validation_file": file}, held_out):
            with pytest.raises(openai.BadRequestError) as wrong:
                stranger.fine_tuning.jobs.create(model="toy", **more)
            assert wrong.value.code == "file_not_found"
    assert client.fine_tuning.jobs.retrieve(id).status == "validating_files"


def test_unfinished_jobs_of_a_tenant_are_limited(jobs, client, monkeypatch):
    unfinished, _ = jobs.store.jobs("acme", limit=1000, states=UNFINISHED)
    monkeypatch.setattr(jobs.files, "quotas", Quotas(QuotaLimits(jobs=len(unfinished) + 2)))
    first = created(client)
    created(client)
    with pytest.raises(openai.RateLimitError, match=r"and that is the limit \(jobs\)"):
        client.with_options(max_retries=0).fine_tuning.jobs.create(model="toy", training_file=sent(client))
    client.fine_tuning.jobs.cancel(first.id)
    assert created(client).id


def test_unknown_event_id_is_400(jobs: Jobs, client: openai.OpenAI) -> None:
    """Includes numbers that are too large for SQL."""
    id = created(client).id
    first = client.fine_tuning.jobs.list_events(id).data[0].id
    for after in (f"{first.rpartition('-')[0]}-{'9' * 50}", f"{first}x", "ftevent-x-1", ""):
        with pytest.raises(openai.BadRequestError, match="no event"):
            client.fine_tuning.jobs.list_events(id, after=after)


def test_inputs_of_unfinished_jobs_are_limited(jobs, client, monkeypatch):
    """Inputs of unfinished jobs count even after the uploaded files are deleted."""
    monkeypatch.setattr(jobs.files, "quotas", Quotas(QuotaLimits(disk=1_000_000)))
    large = {"messages": [*ROW["messages"], {"role": "user", "content": "x" * 400_000}]}

    def one_more() -> Any:
        file = sent(client, [large])
        try:
            return client.fine_tuning.jobs.create(model="toy", training_file=file)
        finally:
            client.files.delete(file)

    first, _ = one_more(), one_more()
    with pytest.raises(openai.BadRequestError) as refused:
        one_more()
    assert (refused.value.code, refused.value.param) == ("storage_full", "training_file")
    client.fine_tuning.jobs.cancel(first.id)
    one_more()


@pytest.mark.slow
def test_no_generated_request_returns_5xx(jobs: Jobs) -> None:
    """Schemathesis calls every route of files and jobs, with random and existing ids."""
    statuses: dict[str, set[int]] = {}
    with jobs.client() as client:
        file = sent(client)
        job = client.fine_tuning.jobs.cancel(created(client, training_file=file).id).id
    ids = {"/v1/files": file, "/v1/fine_tuning": job}

    def ask(case: Any) -> None:
        codes = statuses.setdefault(f"{case.method} {case.path}", set())
        case.headers["authorization"] = "Bearer acme"
        codes.add(case.call(timeout=20).status_code)
        if "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = next(id for start, id in ids.items() if case.path.startswith(start))
            codes.add(case.call(timeout=20).status_code)
        assert max(codes) < 500, (case.path, case.body)

    fuzzed(jobs.server.url, ask, tuple(ids))
    assert len(statuses) == 13
    assert sum(200 in codes for codes in statuses.values()) > 6
