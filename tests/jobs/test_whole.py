"""From an uploaded file to a completion of the tuned model, with OpenAI's client.

The server has tenants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.jobs.fakes import FixedTerms
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import asking, make_shop, said, served
from veneer.jobs.build import training
from veneer.jobs.process import run_job
from veneer.jobs.store import JobStore
from veneer.jobs.validate import validate_job
from veneer.models.home import veneer_home
from veneer.plan.tables import device_named
from veneer.serve.tenancy.store import Store

PROMPT = [5, 6, 7, 8, 9]
ASKED = [f"The printer number {n} {'still ' * (n % 3)}does not work." for n in range(12)]
ROWS = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": "it"}]} for a in ASKED]


def test_tuned_model_is_served_only_to_its_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, where = make_shop(tmp_path, []), str(tmp_path / "tenants.sqlite")
    tenants = Store(where)
    keys = {name: new_tenant(tenants, name) for name in ("acme", "globex")}
    tenants.close()
    monkeypatch.setenv("VENEER_LIBRARY", shop.library.location)
    monkeypatch.setenv("VENEER_TENANTS", where)
    jobs = JobStore(shop.library)

    def work() -> None:
        """Validate and train the waiting job, as a worker would."""
        new = jobs.acquire("here", 60, "validating")
        validate_job(jobs, new, FixedTerms(jobs), device_named("h100-80gb"))  # a fixed device: nothing is benchmarked
        if (lease := jobs.acquire("here", 600)) is not None:
            run_job(shop.library, lease.job.id, lease.token)

    with (
        served(shop, extend=training, tenants=where, folders=()) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["acme"], max_retries=0) as acme,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["globex"], max_retries=0) as globex,
    ):

        def sent(rows: Any) -> str:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            return acme.files.create(file=("tickets.jsonl", data), purpose="fine-tune").id

        file = sent(ROWS)
        hyper: Any = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 100}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
        after = {
            "evaluate": {"data": file, "metrics": ["loss"]},
            "route": {"name": "help"},
            "promote": {"metric": "loss", "against": "base"},
        }
        job = acme.fine_tuning.jobs.create(
            model="tiny", training_file=file, suffix="Support", method=method, seed=3, extra_body={"after": after}
        )
        work()
        job = acme.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        model = job.fine_tuned_model
        assert model.startswith("ft:tiny:acme:support:")
        points = acme.fine_tuning.jobs.checkpoints.list(job.id).data
        assert [point.step_number for point in points] == [9, 6, 3]
        names = ["tiny", *(point.fine_tuned_model_checkpoint for point in points[::-1])]
        answers = [said(acme.completions.create(**asking(name, PROMPT))).logprobs for name in names]
        assert len({tuple(answer) for answer in answers}) == 4  # the base and each checkpoint give different results
        whole = said(acme.completions.create(**asking(model, PROMPT)))
        # The result equals the last checkpoint, up to rounding: its prompt is cached by then, and its tokens drafted.
        assert whole.logprobs == pytest.approx(answers[-1], abs=1e-5)
        # the promotion rule has moved the route to the result
        assert said(acme.completions.create(**asking("help", PROMPT))).logprobs == pytest.approx(
            whole.logprobs, abs=1e-5
        )
        with pytest.raises(openai.NotFoundError):
            globex.completions.create(**asking("help", PROMPT))
        card = acme.models.retrieve(model)
        assert (card.id, card.object, card.owned_by) == (model, "model", "org-acme")
        listed = {card.id: card for card in acme.models.list()}
        assert [*listed] == ["tiny", f"acme/support-{model[-8:]}", "help", model]
        assert listed[model] == card
        assert [card.id for card in globex.models.list()] == ["tiny"]
        told = "".join(event.to_json() for event in acme.fine_tuning.jobs.list_events(job.id, limit=100))
        assert "started" in told
        assert "on 12 held-out rows: loss: base " in told
        assert f"`loss better than base by at least 0` is met: help points to acme/support-{model[-8:]}@10" in told
        assert not any(str(place) in told for place in (tmp_path, veneer_home()))  # no paths of the server
        assert "by here" not in told

        for name in (model, names[1], model.replace("ft:tiny:acme:", "ft:tiny:globex:")):
            for attack in (globex.models.retrieve, globex.models.delete):
                with pytest.raises(openai.NotFoundError):
                    attack(name)
            with pytest.raises(openai.NotFoundError) as refused:
                globex.completions.create(**asking(name, PROMPT))
            assert refused.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                globex.fine_tuning.jobs.create(model=name, training_file=file)

        # training continues from the first job's adapter
        second = acme.fine_tuning.jobs.create(model=model, training_file=file, method=method)
        assert jobs.get("acme", second.id).config["adapter"]["start"] == f"acme/support-{model[-8:]}@10"
        assert acme.fine_tuning.jobs.cancel(second.id).status == "cancelled"

        bad = acme.fine_tuning.jobs.create(model="tiny", training_file=sent([*ROWS, {"messages": "Hi"}]))
        work()
        error = acme.fine_tuning.jobs.retrieve(bad.id).error
        assert (error.code, error.param) == ("invalid_training_file", "training_file")
        assert "tickets.jsonl:13: `messages` should be a list" in error.message
        assert str(veneer_home()) not in error.message

        assert acme.models.delete(names[1]).deleted
        assert acme.models.delete(model).deleted
        with pytest.raises(openai.NotFoundError):
            acme.completions.create(**asking(model, PROMPT))
