"""Tinker's routes, called with the SDK's requests, on a server with tenants.

docs/notes/tinker.md describes the requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.homes import home_with_kernels
from tests.jobs.tinker.small import ROWS, fields, forward_body, read_output
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import served, slowed
from tests.tiny_base import tiny_base_dir
from veneer.jobs.build import training
from veneer.jobs.http.tinker import TinkerRoutes
from veneer.jobs.tinker.service import FutureResult
from veneer.library.library import open_library
from veneer.serve.quota import Quotas
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

STEP = {"adam_params": {"learning_rate": 1e-2}}


class Tinker:
    """A tenant's client that sends the same requests as the SDK."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session = self.post("create_session", tags=[], user_metadata=None, sdk_version="0")["session_id"]
        self.seq = 0

    def post(self, route: str, **body: Any) -> Any:
        answer = self.http.post(f"/{route}", json=body)
        answer.raise_for_status()
        return answer.json()

    def result(self, promise: Any) -> httpx.Response:
        while True:
            answer = self.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
            if answer.status_code != 408:
                answer.raise_for_status()
                return answer

    def model(self, base: str, rank: int, seed: int = 1) -> str:
        config = {"rank": rank, "seed": seed, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {"session_id": self.session, "model_seq_id": 0, "base_model": base, "lora_config": config}
        promise = self.post("create_model", **body, optimizer_config={"type": "adamw"}, type="create_model")
        return str(self.result(promise).json()["model_id"])

    def forward(self, model: str, only: bool = False) -> httpx.Response:
        self.seq += 1
        headers = {"Content-Type": "application/x-protobuf"}
        body = forward_body(model, self.seq, ROWS, only=only)
        return self.http.post("/forward_backward", content=body, headers=headers)

    def numbered(self, route: str, model: str, **body: Any) -> Any:
        self.seq += 1
        return self.result(self.post(route, model_id=model, seq_id=self.seq, **body)).json()

    def sample(self, session: str, seq: int, **more: Any) -> httpx.Response:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": ROWS[0][:6]}]}
        params = {"max_tokens": 4, "seed": 1, "temperature": 0.7, "top_k": -1, "top_p": 1}
        promise = self.post(
            "asample", sampling_session_id=session, seq_id=seq, prompt=prompt, sampling_params=params, **more
        )
        assert len(promise["sample_sequence_ids"]) == more.get("num_samples", 1)
        return self.result(promise)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("tinker")
    (folder / "adapters").mkdir()
    tenants = str(folder / "tenants.sqlite")
    store = Store(tenants)
    keys = {name: new_tenant(store, name) for name in ("acme", "globex", "idle", "late")}
    tokens = sum(len(row) - 1 for row in ROWS)
    manage.change_settings(store, "globex", {"training_price": 10**6, "training_budget": 2 * tokens}, actor="test")
    manage.change_settings(store, "idle", {"training_jobs": 0}, actor="test")
    base = tiny_base_dir(folder)
    with pytest.MonkeyPatch.context() as patch, open_library(folder / "library") as library:
        patch.setenv("VENEER_HOME", str(home_with_kernels(folder / "home")))
        shop = SimpleNamespace(base_dir=base, adapters=folder / "adapters", library=library)
        settings: dict[str, Any] = {"tenants": tenants, "queue": 16}
        with served(shop, extend=training, **settings) as running:
            yield SimpleNamespace(
                url=running.url, base=str(base), keys=keys, store=store, running=running, tokens=tokens
            )
    store.close()


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[Callable[[str], Tinker]]:
    """Return a function that opens a session for a tenant."""
    with ExitStack() as closing:

        def made(tenant: str) -> Tinker:
            http = httpx.Client(
                base_url=f"{world.url}/api/v1", headers={"X-API-Key": f"tml-{world.keys[tenant]}"}, timeout=60
            )
            return Tinker(closing.enter_context(http))

        yield made


def test_server_folders_are_hidden_from_tenants(world: SimpleNamespace, client: Any) -> None:
    """The SDK loads the tokenizer from the name that the server returns.

    So the server returns the client's own folder, but never a folder of the server."""
    acme = client("acme")
    model = acme.model("tiny-base", 2)
    for answer in (acme.post("get_info", model_id=model), acme.http.get("/training_runs").json()):
        assert str(Path(world.base).parent) not in json.dumps(answer)
    assert acme.post("get_info", model_id=model)["model_data"]["tokenizer_id"] == "tiny-base"
    globex = client("acme")
    model = globex.model("/home/acme/tiny-base", 2)
    assert globex.post("get_info", model_id=model)["model_data"]["tokenizer_id"] == "/home/acme/tiny-base"


def test_training_client_from_session_to_checkpoints(world: SimpleNamespace, client: Any) -> None:
    acme = client("acme")
    assert acme.post("client/config", sdk_version="0")["pjwt_auth_enabled"] is False
    names = acme.http.get("/get_server_capabilities").json()["supported_models"]
    assert [each["model_name"] for each in names] == ["tiny-base"]
    model = acme.model("tiny-base", 4)
    assert model == f"{acme.session}:train:0"
    assert acme.post("get_info", model_id=model)["lora_rank"] == 4
    losses = []
    for _ in range(3):
        promise = acme.forward(model)
        again = acme.http.post("/forward_backward", content=promise.request.content, headers=promise.request.headers)
        assert promise.json() == again.json()
        logps, metrics = read_output(acme.result(promise.json()).content)
        assert [len(each) for each in logps] == [len(row) - 1 for row in ROWS]
        losses.append(metrics["loss:sum"])
        assert acme.numbered("optim_step", model, **STEP)["metrics"]["grad_norm"] > 0
    assert losses == sorted(losses, reverse=True)
    outputs, _ = read_output(acme.result(acme.forward(model, only=True).json()).content)

    live = acme.numbered("save_weights_for_sampler", model, sampling_session_seq_id=0)["sampling_session_id"]
    answer = acme.sample(live, 0, num_samples=2, prompt_logprobs=True)
    sampled = fields(answer.content)
    samples = [dict(fields(value)) for number, value in sampled if number == 1]
    assert [np.frombuffer(each[2], "<i4").shape for each in samples] == [(4,), (4,)]
    # the sampler uses the trainer's weights
    assert np.frombuffer(dict(sampled)[2], "<f4")[1:] == pytest.approx(outputs[0][:5], abs=1e-5)
    assert acme.sample(live, 0, num_samples=2).content == answer.content

    path = acme.numbered("save_weights", model, path="0001", type="save_weights")["path"]
    named = acme.numbered("save_weights_for_sampler", model, path="0001")["path"]
    session = acme.post(
        "create_sampling_session", session_id=acme.session, sampling_session_seq_id=1, model_path=named
    )["sampling_session_id"]
    assert dict(fields(fields(acme.sample(session, 0).content)[0][1]))[2] == samples[0][2]  # the same weights and seed
    assert acme.http.get(f"/samplers/{session}").json()["model_path"] == named
    loading = acme.post("load_weights", session_id=acme.session, model_seq_id=1, path=path, optimizer=True)
    assert acme.result(loading).json()["path"] == path
    listed = acme.http.get(f"/training_runs/{model}/checkpoints").json()["checkpoints"]
    assert [each["tinker_path"] for each in listed] == [path, named]
    assert acme.post("weights_info", tinker_path=path)["lora_rank"] == 4
    assert acme.http.delete(f"/training_runs/{model}/checkpoints/badkind/x").status_code == 404
    kind, name = path.rsplit("/", 2)[1:]
    assert acme.http.delete(f"/training_runs/{model}/checkpoints/{kind}/{name}").status_code == 204
    assert acme.http.get(f"/training_runs/{model}").json()["last_checkpoint"] is None
    mine = acme.http.get("/v1/models".replace("/v1", f"{world.url}/v1")).json()["data"]
    assert any(each["id"].startswith("acme/tinker-") for each in mine)
    assert acme.http.post(f"/sessions/{acme.session}/finish", json={}).status_code == 204


def test_runs_of_other_tenants_are_404(world: SimpleNamespace, client: Any) -> None:
    acme, globex = (client(name) for name in ("acme", "globex"))
    model = acme.model("tiny-base", 2)
    assert acme.result(acme.forward(model).json()).status_code == 200
    for path, body in (
        ("get_info", {"model_id": model}),
        ("optim_step", {"model_id": model, "seq_id": 2, **STEP}),
        ("session_heartbeat", {"session_id": acme.session}),
        ("retrieve_future", {"request_id": f"{model}:1"}),
    ):
        assert globex.http.post(f"/{path}", json=body).status_code == 404, path
    assert httpx.post(f"{world.url}/api/v1/get_info", json={"model_id": model}).status_code == 401
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        client("idle")


def test_many_samples_do_not_delay_other_tenants(world: SimpleNamespace, client: Any) -> None:
    """A tenant's single sample finishes before the last of another tenant's many samples."""
    tenants = [client(name) for name in ("acme", "globex")]
    promises: list[list[Any]] = []
    with slowed(world.running.engine):
        for tenant, count in zip(tenants, (24, 1), strict=True):
            session = sampler(tenant)
            prompt = {"chunks": [{"tokens": ROWS[0][:6]}]}
            params = {"max_tokens": 24, "stop": []}
            body = {"sampling_session_id": session, "num_samples": 4, "prompt": prompt, "sampling_params": params}
            promises.append([tenant.post("asample", seq_id=i, **body) for i in range(count)])
        (many, few), (acme, globex) = promises, tenants
        assert globex.result(few[0]).headers["content-type"] == "application/x-protobuf"
        with pytest.raises(httpx.ReadTimeout):
            acme.http.post("/retrieve_future", json={"request_id": many[-1]["request_id"]}, timeout=0.05)
    assert acme.result(many[-1]).headers["content-type"] == "application/x-protobuf"


def test_waiting_prompts_are_limited_per_tenant(world: SimpleNamespace, client: Any) -> None:
    late, globex, quotas = client("late"), client("globex"), world.running.built.service.quotas
    bodies = [{"seq_id": 0, **_sample_body(sampler(tenant))} for tenant in (late, globex)]
    full = quotas.take("late")
    full.set(memory=quotas.limits.memory - quotas.used("late", "memory") - 1000)
    refused = late.http.post("/asample", json=bodies[0])
    assert refused.status_code == 429
    assert "limit (memory)" in refused.text
    assert float(refused.headers["retry-after"]) > 0
    assert globex.http.post("/asample", json=bodies[1]).status_code == 200
    full.release()
    assert late.http.post("/asample", json=bodies[0]).status_code == 200


def sampler(client: Tinker) -> str:
    named = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": "tiny-base"}
    return str(client.post("create_sampling_session", **named)["sampling_session_id"])


@pytest.mark.parametrize(
    ("more", "named"),
    [({"num_samples": 4096}, "num_samples"), ({"prompt": {"chunks": []}}, "prompt"), ({"seq_id": 10**4000}, "seq_id")],
)
def test_invalid_samples_use_no_quota(world: SimpleNamespace, client: Any, more: dict[str, Any], named: str) -> None:
    acme = client("acme")
    quotas = world.running.built.service.quotas
    used = quotas.used("acme", "requests")
    body = {"seq_id": 1, "prompt": {"chunks": [{"tokens": [5]}]}, "sampling_params": {"max_tokens": 1}, **more}
    answer = acme.http.post("/asample", json={"sampling_session_id": sampler(acme), **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
    assert quotas.used("acme", "requests") == used


def test_fetched_results_are_dropped_first(world: SimpleNamespace, client: Any) -> None:
    """If the quota is full, fetched results are dropped before samples are refused."""
    globex, quotas = client("globex"), world.running.built.service.quotas
    session = sampler(globex)
    promises = [globex.post("asample", seq_id=i, **_sample_body(session)) for i in range(8)]
    for promise in promises[:4]:
        globex.result(promise)
    full = quotas.take("globex")
    full.set(requests=quotas.limits.requests - quotas.used("globex", "requests"))
    answers = [globex.http.post("/asample", json={"seq_id": i, **_sample_body(session)}) for i in range(8, 60)]
    full.release()
    taken = [answer.status_code for answer in answers].index(429)
    assert taken >= 4
    assert "limit (requests)" in answers[taken].json()["error"]["message"]
    for promise in promises[4:]:
        globex.result(promise)
    assert globex.http.post("/retrieve_future", json={"request_id": promises[0]["request_id"]}).status_code == 410


def _sample_body(session: str) -> dict[str, Any]:
    return {
        "sampling_session_id": session,
        "prompt": {"chunks": [{"tokens": [5]}]},
        "sampling_params": {"max_tokens": 1},
    }


@pytest.mark.parametrize("number", ["²", "9" * 400, "9" * 5000, "00", "-1", "0:1", "0\n"])
def test_malformed_ids_are_404(client: Any, number: str) -> None:
    """Each id has exactly one valid spelling."""
    acme = client("acme")
    acme.model("tiny-base", 2)
    for path, name, id in (
        ("get_info", "model_id", f"{acme.session}:train:{number}"),
        ("retrieve_future", "request_id", f"{acme.session}:train:{number}:1"),
        ("retrieve_future", "request_id", f"{acme.session}:train:0:{number}"),
        ("session_heartbeat", "session_id", acme.session + number),
        ("asample", "sampling_session_id", f"{acme.session}:sample:{number}"),
    ):
        more = {"seq_id": 1, "prompt": {"chunks": []}, "sampling_params": {}} if path == "asample" else {}
        answer = acme.http.post(f"/{path}", json={name: id, **more})
        assert answer.status_code == 404, (path, id, answer.text)


def test_training_budget_limits_forward_passes(client: Any) -> None:
    """The budget covers two passes; the third returns 402."""
    globex = client("globex")
    model = globex.model("tiny-base", 2)
    for _ in range(2):
        assert globex.result(globex.forward(model).json()).headers["content-type"] == "application/x-protobuf"
    for _ in range(200):  # the bill reaches the ledger shortly after the pass
        answer = globex.forward(model, only=True)
        if answer.status_code == 402:
            break
        time.sleep(0.05)
    assert answer.status_code == 402
    assert "budget" in answer.json()["error"]["message"]


def test_disabled_training_refuses_existing_sessions(world: SimpleNamespace, client: Any) -> None:
    """The session can still save and download its weights."""
    late = client("late")
    model = late.model("tiny-base", 2)
    assert late.result(late.forward(model).json()).status_code == 200
    manage.change_settings(world.store, "late", {"training_jobs": 0}, actor="test")
    try:
        answer = late.forward(model)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    finally:
        manage.change_settings(world.store, "late", {"training_jobs": None}, actor="test")


def test_stop_waits_until_requests_have_returned_their_budget() -> None:
    stopped: Future[None] = Future()
    given_back = []

    async def request() -> FutureResult:
        await asyncio.wrap_future(stopped)
        await asyncio.sleep(0.05)
        given_back.append(True)
        return FutureResult("failed", b"{}")

    async def live() -> None:
        service: Any = SimpleNamespace(close=lambda: stopped.set_result(None))
        call: Any = SimpleNamespace(tenant="acme")
        nothing: Any = None
        routes = TinkerRoutes(nothing, nothing, _service=service)
        routes.add(call, "1", Quotas().take("acme"), request())
        await routes.stop()

    asyncio.run(live())
    assert given_back == [True]


def test_an_ended_session_returns_410(client: Any) -> None:
    acme = client("acme")
    model = acme.model("tiny-base", 2)
    acme.post("session_heartbeat", session_id=acme.session)
    assert acme.http.post(f"/sessions/{acme.session}/finish", json={}).status_code == 204
    again = acme.http.post("/session_heartbeat", json={"session_id": acme.session})
    assert (again.status_code, again.json()["error"]["code"]) == (410, "gone")
    assert acme.forward(model).status_code == 410


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("create_model", {"base_model": "gpt-9"}, "The model 'gpt-9' is not served here"),
        ("create_model", {"lora_config": {"rank": 0}}, "rank 0 is not possible"),
        ("create_model", {"lora_config": None}, "this server trains only adapters"),
        ("create_model", {"optimizer_config": {"type": "dimuon"}}, "there is no optimizer 'dimuon' here"),
        ("create_sampling_session", {"model_path": "tinker://a/weights/b"}, "there is no training run 'a'"),
        ("create_sampling_session", {"model_path": "file:///etc"}, "is not a checkpoint path"),
        ("load_weights", {"model_seq_id": 7, "path": "tinker://a/weights/b"}, "there is no training run 'a'"),
        (
            "load_weights",
            {"model_seq_id": 7, "path": "tinker://a/weights/b", "optimizer_config": "adamw"},
            "not an object",
        ),
        ("create_model", {"model_seq_id": 10**300}, "model_seq_id"),
        ("create_model", {"lora_config": {"rank": 10**6}}, "rank 1000000 is not possible"),
        ("create_sampling_session", {"sampling_session_seq_id": 10**300}, "sampling_session_seq_id"),
        ("forward_backward", {}, "not a forward_backward request in protobuf"),
    ],
)
def test_invalid_request_names_the_reason(client: Any, path: str, body: dict[str, Any], message: str) -> None:
    acme = client("acme")
    defaults = {
        "create_model": {"model_seq_id": 5, "base_model": "tiny-base", "lora_config": {"rank": 2}},
        "create_sampling_session": {"sampling_session_seq_id": 5},
    }.get(path, {})
    answer = acme.http.post(f"/{path}", json={"session_id": acme.session, **defaults, **body})
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [0, -1, True, "1", 1.0, None, 10**30])
def test_invalid_request_number_is_400(client: Any, number: Any) -> None:
    acme = client("acme")
    answer = acme.http.post("/optim_step", json={"model_id": acme.model("tiny-base", 2), "seq_id": number, **STEP})
    assert answer.status_code == 400
    assert "seq_id is" in answer.json()["error"]["message"]


def test_unsupported_sample_options_are_refused(client: Any) -> None:
    acme = client("acme")
    id = sampler(acme)
    none = {"topk_prompt_logprobs": 0, "record_stability_info": False, "target_prompt_logprobs": None}
    assert acme.http.post("/asample", json={"seq_id": 0, **_sample_body(id), **none}).status_code == 200
    for name, value in {"topk_sample_logprobs": 5, "prompt_alt_tokens_k": 2, "prompt_logprobs_last_n": 3}.items():
        answer = acme.http.post("/asample", json={"seq_id": 1, **_sample_body(id), name: value})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
    expired = acme.http.post("/retrieve_future", json={"request_id": f"{id}:77"})
    assert expired.status_code == 410
