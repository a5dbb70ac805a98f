"""Controllers load and unload adapters here as they do on the servers that they were written for."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.serve.conformance.consumers import accepts_load, aibrix_load, registrations
from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live
from tests.serve.whole import Whole, prompt


def models(whole: Whole) -> dict[str, Any]:
    found: dict[str, Any] = whole.http.get("/v1/models").json()
    return found


def test_production_stack_takes_loaded_and_already_loaded(whole: Whole) -> None:
    folder = str(whole.shop.adapters / "rs")
    for _ in range(2):  # the controller loads again on every reconciliation
        assert accepts_load(whole.load("from-crd", folder))
    assert "from-crd" in registrations(models(whole))
    assert whole.built.service.catalog.base not in registrations(models(whole))
    assert not accepts_load(whole.load("other", "no such adapter"))
    assert whole.unload("from-crd").status_code == 200
    assert "from-crd" not in registrations(models(whole))


def test_errors_are_nested_and_at_the_top(whole: Whole) -> None:
    """vLLM 0.32 nests the error; older versions and production-stack's controller do not."""
    body = whole.load("", "plain").json()
    assert {key: body[key] for key in body["error"]} == body["error"]
    assert body["error"]["type"] == "InvalidUserInput"


def test_aibrix_loads_through_its_runtime_and_directly(whole: Whole) -> None:
    def post(path: str, payload: dict[str, Any]) -> Any:
        return whole.http.post(path, json=payload)

    folder = f"file://{whole.shop.adapters / 'patterns'}"
    for name, more in {
        "by-url": {"artifact_url": folder, "credentials_secret": "s", "additional_config": {"api-key": "k"}},
        "by-reference": {"artifact_url": "patterns"},
        "direct": {"lora_path": "patterns"},
    }.items():
        assert aibrix_load(post, models(whole), lora_name=name, **more) == "loaded"
        assert aibrix_load(post, models(whole), lora_name=name, **more) == "exists"
        assert whole.ask(name, prompt(8), 1).text
        answer = post("/v1/lora_adapter/unload", {"lora_name": name, "cleanup_local": True})
        assert answer.status_code == 200
        assert name not in registrations(models(whole))
    refused = post("/v1/lora_adapter/load", {"lora_name": "x", "artifact_url": "rs", "credentials": {"token": "t"}})
    assert refused.status_code == 400
    assert "credentials" in refused.json()["error"]["message"]


def test_dynamos_loras(whole: Whole) -> None:
    """Replies as in dynamo docs/features/lora/README.md."""
    load = {"lora_name": "dyn", "source": {"uri": f"file://{whole.shop.adapters / 'rs'}"}}
    first = whole.http.post("/v1/loras", json=load).json()
    number = first.pop("lora_id")
    assert isinstance(number, int)
    assert 0 < number < 2**31
    message = "LoRA adapter 'dyn' loaded successfully"
    assert first == {"status": "success", "message": message, "lora_name": "dyn"}
    again = whole.http.post("/v1/loras", json=load)
    assert (again.status_code, again.json()["status"], again.json()["lora_id"]) == (200, "success", number)
    listed = whole.http.get("/v1/loras").json()
    assert listed == {"status": "success", "loras": {"dyn": number}, "count": 1}
    gone = whole.http.delete("/v1/loras/dyn").json()
    assert (gone["status"], gone["lora_id"]) == ("success", number)
    missing = whole.http.delete("/v1/loras/dyn")
    assert (missing.status_code, missing.json()["status"]) == (404, "error")
    assert whole.http.get("/v1/loras").json()["count"] == 0


@pytest.mark.parametrize("uri", ["s3://bucket/a", "hf://acme/a", "huggingface://acme/a", "file://host/a"])
def test_other_sources_are_refused_by_name(whole: Whole, uri: str) -> None:
    scheme = uri.partition(":")[0]
    for answer in (
        whole.http.post("/v1/loras", json={"lora_name": "x", "source": {"uri": uri}}),
        whole.http.post("/v1/lora_adapter/load", json={"lora_name": "x", "artifact_url": uri}),
        whole.load("x", uri),
    ):
        assert answer.status_code == 400
        assert re.search(rf"{scheme}://.*library", str(answer.json()["message"]))


def test_files_outside_the_allowed_folders_are_not_found(whole: Whole) -> None:
    for uri in (f"file://{whole.shop.base_dir}", "file:///etc", f"file://{whole.shop.adapters}/../tiny"):
        answer = whole.http.post("/v1/loras", json={"lora_name": "x", "source": {"uri": uri}})
        assert (answer.status_code, answer.json()["status"]) == (404, "error")


@pytest.fixture(scope="module")
def guarded() -> Any:
    text = ToyText()
    with live(ToyEngine(text), ToyCatalog(), ToyTenancy()) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/lora_adapter/load"),
        ("POST", "/v1/lora_adapter/unload"),
        ("GET", "/v1/loras"),
        ("POST", "/v1/loras"),
        ("DELETE", "/v1/loras/sql"),
    ],
)
def test_only_the_operator_changes_adapters(guarded: Live, method: str, path: str) -> None:
    bodies = {"POST": {"json": {"lora_name": "sql", "source": {"uri": "lib/cat"}}}}
    answers = {
        key: guarded.client.request(
            method, path, headers={"authorization": f"Bearer {key}"}, **bodies.get(method, {})
        ).status_code
        for key in ("wrong", "acme", "admin")
    }
    assert (answers["wrong"], answers["acme"]) == (401, 403)
    assert answers["admin"] not in (401, 403)
