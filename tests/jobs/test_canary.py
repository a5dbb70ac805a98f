"""After a job: evaluation on held-out rows, promotion and rollback."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs.fakes import queued, taken
from tests.jobs.small import small_config
from tests.library.conftest import quick  # noqa: F401
from veneer.core.adapter import Adapter, Pair
from veneer.errors import ConfigError
from veneer.formats.card import read_card
from veneer.formats.peft import write_folder
from veneer.jobs.canary import promote_job, release_job, rollback_job
from veneer.jobs.post_training import parse_after
from veneer.jobs.process import run_job
from veneer.jobs.store import Job, JobStore, WrongState
from veneer.jobs.validate import submit_job
from veneer.library.database import reading
from veneer.library.library import Library, open_library
from veneer.models.text.base import TextBase
from veneer.plan.tables import device_named
from veneer.serve.tenancy import manage, routes
from veneer.serve.tenancy.store import Store
from veneer.train.config.load import config_from


@dataclass
class Shop:
    folder: Path
    library: Library
    jobs: JobStore
    tenants: Store

    def submit(self, after: Mapping[str, Any], **sections: Any) -> Job:
        config, _ = config_from(small_config(self.folder, **sections) | {"output": str(self.folder / "out")})
        job = {"tenant": "acme", "name": "support", "after": parse_after(after, self.folder)}
        return submit_job(self.jobs, config, **job, tenants=self.tenants, device=device_named("h100-80gb"))

    def work(self) -> Job:
        lease = taken(self.jobs, 600)
        assert run_job(self.library, lease.job.id, lease.token) == 0
        return self.jobs.get("acme", lease.job.id)

    def finished_job(
        self, reference: str, scores: Mapping[str, float] | None, after: Mapping[str, Any], serving: int | None = None
    ) -> Job:
        """Return a finished job with result `reference` and these evaluation scores.

        `serving`: the version with which the result was compared."""
        job = queued(self.jobs, about={"after": parse_after(after, self.folder).model_dump()})
        lease = taken(self.jobs)
        results = {who: {"exact_match": value} for who, value in (scores or {}).items()}
        compared = {"scores": results, "serving": None if serving is None else f"acme/support@{serving}"}
        for _ in range(2):  # the second time, as if the job was killed before it ended
            release_job(self.jobs, lease, self.tenants, reference, scores and compared)
        self.jobs.finish(lease, result={"reference": reference})
        return job

    def events(self, job: Job, kind: str) -> list[Any]:
        return [event for event in self.jobs.events("acme", job.id, limit=10_000)[0] if event.kind == kind]

    def targets(self, name: str = "support") -> dict[str, Any] | None:
        found = self.tenants.refresh().routes.get(("acme", name))
        return None if found is None else {"targets": dict(found.targets), "shadow": found.shadow}

    def revision(self, name: str = "support") -> int:
        with reading(self.tenants.engine) as c:
            return len(routes.route_history(c, name, tenant="acme"))


@pytest.fixture
def shop(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:  # noqa: F811
    monkeypatch.setenv("VENEER_TENANTS", str(quick / "tenants.sqlite"))
    tenants = Store(str(quick / "tenants.sqlite"))
    manage.add_tenant(tenants, "acme", actor="test")
    write_folder(Adapter({"layer": Pair(torch.ones(1, 4), torch.ones(4, 1), 1.0)}), quick / "made")
    with open_library(quick / "library") as library:
        for name in ("acme/old", "acme/new"):
            library.add(quick / "made", name)
        yield Shop(quick, library, JobStore(library), tenants)
    tenants.close()


RULE = {"evaluate": {"metrics": ["exact_match"]}, "promote": {"metric": "exact_match", "by": 0.01}}
BETTER, WORSE = {"base": 0.1, "serving": 0.5, "new": 0.51}, {"base": 0.1, "serving": 0.5, "new": 0.505}
OLD = {"targets": {"acme/old@1": 1}, "shadow": None}
NEW = {"targets": {"acme/new@1": 1}, "shadow": None}


@pytest.mark.parametrize(
    ("before", "route", "rule", "scores", "leads"),
    [
        (True, {}, {}, None, {"targets": {"acme/old@1": 9000, "acme/new@1": 1000}, "shadow": None}),
        (True, {"weight": 0.25, "shadow": True}, {}, None,
         {"targets": {"acme/old@1": 7500, "acme/new@1": 2500}, "shadow": "acme/new@1"}),
        (True, {"weight": 0, "shadow": True}, {}, None, {"targets": {"acme/old@1": 10000}, "shadow": "acme/new@1"}),
        (True, {}, RULE, BETTER, NEW), (True, {}, RULE, WORSE, OLD),
        (True, {"shadow": True}, RULE, WORSE, {"targets": {"acme/old@1": 10000}, "shadow": "acme/new@1"}),
        (True, {"shadow": True}, RULE, None, OLD), (True, {}, {"evaluate": {}}, None, OLD),  # the evaluation failed
        (False, {}, {}, None, NEW), (False, {}, RULE, BETTER, NEW), (False, {}, RULE, WORSE, None),
    ],
)  # fmt: skip
def test_route_follows_the_promotion_rule(shop, before, route, rule, scores, leads):
    """A resumed job moves the route only once; then a user promotes and rolls back."""
    if before:
        routes.set_route(shop.tenants, "support", [("acme/old@1", 1)], tenant="acme", actor="test")
    job = shop.finished_job("acme/new@1", scores, {"route": {"name": "support", **route}, **rule})
    assert shop.targets() == leads
    assert len(shop.events(job, "route")) == 1
    assert leads == (OLD if before else None) or shop.revision() == 1 + before
    promote_job(shop.jobs, shop.tenants, "acme", job.id)
    promote_job(shop.jobs, shop.tenants, "acme", job.id)
    assert shop.targets() == NEW
    rollback_job(shop.jobs, shop.tenants, "acme", job.id)
    assert shop.targets() == (OLD if before else None)
    with pytest.raises(ConfigError, match="is not where job") as refused:
        rollback_job(shop.jobs, shop.tenants, "acme", job.id)
    assert refused.value.fix == "veneer tenant route history support --tenant acme"


def test_route_moved_by_someone_else_is_unchanged(shop: Shop) -> None:
    routes.set_route(shop.tenants, "support", [("acme/old@1", 1)], tenant="acme", actor="test")
    after = {"route": {"name": "support"}}
    job = shop.finished_job("acme/new@1", None, after)
    waiting = shop.finished_job("acme/new@1", None, after)
    (event,) = shop.events(waiting, "route")
    assert (event.level, "already has several targets" in event.message) == ("warn", True)
    assert shop.jobs.get("acme", waiting.id).state == "succeeded"
    with pytest.raises(ConfigError, match="did not move support"):
        rollback_job(shop.jobs, shop.tenants, "acme", waiting.id)
    routes.set_route(shop.tenants, "support", [("acme/old@1", 5)], tenant="acme", actor="test")
    with pytest.raises(ConfigError, match="is not where job"):
        rollback_job(shop.jobs, shop.tenants, "acme", job.id)
    promote_job(shop.jobs, shop.tenants, "acme", job.id)
    rollback_job(shop.jobs, shop.tenants, "acme", job.id)  # restores the operator's target, not an earlier one
    assert shop.targets() == {"targets": {"acme/old@1": 5}, "shadow": None}


def test_job_is_compared_with_the_serving_version(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores equal those of separate evaluations, and the base is loaded only once.

    The scores are also on the card and in the events."""
    from veneer.models.text.base import load_text
    from veneer.train.text.evaluate import score_mixes
    from veneer.train.text.rows import read_rows

    held_out = shop.folder / "held.jsonl"
    small_config(shop.folder)
    held_out.write_text("".join((shop.folder / "rows.jsonl").read_text().splitlines(keepends=True)[:3]))
    after = {
        "evaluate": {"data": "held.jsonl", "metrics": ["loss"]},
        "route": {"name": "support"},
        "promote": {"metric": "loss"},
    }
    first = shop.submit(after)
    assert first.state == "queued", first.error
    with pytest.raises(WrongState, match="is queued"):
        promote_job(shop.jobs, shop.tenants, "acme", first.id)
    loaded: list[str] = []

    def counting(name: str, **more: Any) -> TextBase:
        loaded.append(name)
        return load_text(name, **more)

    for module in ("veneer.models.text.base", "veneer.train.text.task"):
        monkeypatch.setattr(f"{module}.load_text", counting)
    shop.work()
    assert loaded == [str(shop.folder / "tiny-base")]
    assert shop.targets() == {"targets": {"acme/support@1": 1}, "shadow": None}
    second = shop.submit(after, schedule={"steps": 6})
    shop.work()
    (event,) = shop.events(second, "evaluation")
    base = load_text(str(shop.folder / "tiny-base"))
    mixes: Any = {"base": [], "serving": ["acme/support@1"], "new": ["acme/support@2"]}
    mixes = {k: [(str(shop.library.resolve(x)), 1.0) for x in v] for k, v in mixes.items()}
    separate = score_mixes(base, read_rows(str(held_out))[0], mixes, generate=False)
    for side, scores in event.data["scores"].items():
        assert scores["loss"] == pytest.approx(separate[side].loss, rel=1e-5)
    assert event.data["serving"] == "acme/support@1"
    assert shop.targets() == {"targets": {"acme/support@2": 1}, "shadow": None}
    card_scores = read_card(shop.library.resolve("acme/support@2")).card.metrics["held_out"]
    assert (card_scores["adapter"], card_scores["served"]) == (event.data["scores"]["new"], "acme/support@1")
    assert json.dumps(card_scores["serving"]) == json.dumps(event.data["scores"]["serving"])
    rollback_job(shop.jobs, shop.tenants, "acme", second.id)
    assert shop.targets() == {"targets": {"acme/support@1": 1}, "shadow": None}
