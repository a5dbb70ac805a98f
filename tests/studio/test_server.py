"""The Studio page on a real server: the socket, paths outside the API, errors, loading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.serve.http.toy import wait_for
from tests.serve.whole import is_ready
from tests.studio.conftest import OPERATOR, StudioServer
from tests.studio.page_socket import open_page, page_html
from veneer.jobs.store import JobStore
from veneer.library.library import open_library

KEY = "sk-0123456789abcdef"
ROWS = "".join(json.dumps({"prompt": f"Where is parcel {i}?", "completion": "On its way."}) + "\n" for i in range(8))


def test_page_answers_events(studio: StudioServer) -> None:
    with open_page(f"{studio.address}/studio/") as page:
        page.type("tone")
        assert "support@2" not in page.until("globex/tone", "q=tone")


def test_api_is_the_same_with_the_page(studio: StudioServer) -> None:
    with httpx.Client(base_url=studio.address) as client:
        assert client.get("/v1/nope").json()["error"]["type"] == "invalid_request_error"
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.get("/studio").headers["location"].endswith("/studio/")
        assert client.get("/studio/nope").status_code == 404
        page = client.get("/studio/")
        for path in set(re.findall(r'"(/studio/_nicegui/[^"]+\.(?:js|css))"', page.text)):
            asset = client.get(path)
            assert (asset.status_code, "immutable" in asset.headers["cache-control"]) == (200, True), path


def test_failing_view_shows_an_internal_error(studio: StudioServer, tiny: tuple[Path, Path]) -> None:
    with open_library(tiny[1]) as library:
        job = JobStore(library).create("", {}, name="odd")  # a job without a configuration
    page = httpx.get(f"{studio.address}/studio/run?job={job.id}")
    assert page.status_code == 500
    for words in ("Run", "Internal error", "the server&#39;s log has"):
        assert words in page_html(page)
    assert "KeyError" in studio.log.read_text()
    assert httpx.get(f"{studio.address}/studio/train").status_code == 200


# -- while the base loads ----------------------------------------------------------------------------------------------


def page_is_there(client: httpx.Client) -> bool:
    try:
        return client.get("/studio/").status_code == 200
    except httpx.TransportError:
        return False


def test_pages_work_while_the_base_loads(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    gate, keys = tmp_path / "go", tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    options = ("--train", "--api-keys", str(keys), "--admin-key", OPERATOR)
    server = StudioServer(tmp_path, *tiny, *options, loads_after=gate)
    site, studio = server.address, f"{server.address}/studio"
    try:
        with (
            httpx.Client(base_url=site, cookies={"veneer_studio": OPERATOR}) as page,
            httpx.Client(base_url=site, headers={"authorization": f"Bearer {OPERATOR}"}) as api,
        ):
            wait_for(lambda: page_is_there(page), 60)
            assert "support@2" in page.get("/studio/").text
            for view in ("adapter?ref=support@2", "doctor", "train"):
                assert page.get(f"/studio/{view}").status_code == 200, view

            assert api.get("/ready").json() == {"status": "loading"}
            body = {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            for refused in (api.get("/v1/models"), api.post("/v1/chat/completions", json=body)):
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "5"
                assert refused.json()["error"]["code"] == "unavailable"
            job = api.post("/v1/fine_tuning/jobs", json={"model": "tiny-base", "training_file": "x"})
            assert job.status_code == 503

            assert "support@2" not in httpx.get(f"{studio}/").text  # without a key, the page is the sign-in form
            assert httpx.get(f"{site}/v1/adapters").status_code == 401
            assert api.get("/v1/adapters", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
            compare = httpx.get(f"{studio}/compare", headers={"cookie": f"veneer_studio={KEY}"}).text
            assert "tiny-base is still loading" in compare
            assert "waiting for the test" not in compare  # loading steps can name paths on the server

            files = {"file": ("rows.jsonl", ROWS)}
            uploaded = page.post("/studio/api/v1/files", files=files, data={"purpose": "fine-tune"})
            assert uploaded.status_code == 200, uploaded.text
            with (
                open_page(f"{studio}/compare?p=Hi", OPERATOR) as compare,
                open_page(f"{studio}/train?file={uploaded.json()['id']}", OPERATOR) as train,
            ):
                compare.until("waiting for the test")
                train.press("Train")
                train.until("the server is loading")
                assert "Where is parcel 0?" in str(train.elements)
                gate.touch()
                compare.until("One prompt for the base")
                wait_for(lambda: is_ready(site), 60)
                answer = api.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                train.press("Train")
                train.until("is queued")
    finally:
        server.end()


def test_server_ends_if_the_base_cannot_load(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    gate = tmp_path / "go"
    server = StudioServer(tmp_path, *tiny, loads_after=gate)
    try:
        with httpx.Client(base_url=server.address) as page:
            wait_for(lambda: page_is_there(page), 60)
        with open_page(f"{server.address}/studio/compare") as compare:
            compare.until("waiting for the test")
            (tmp_path / "new").write_text("the disk is full")
            (tmp_path / "new").rename(gate)
            wait_for(lambda: server.process.poll() is not None, 60)
        assert server.process.poll() == 2
        assert "the disk is full" in server.log.read_text()
    finally:
        server.end()
