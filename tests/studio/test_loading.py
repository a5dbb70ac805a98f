"""A server whose base takes long to load: its pages work from the start, and what needs the base waits for it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.serve.http.toy import wait_for
from tests.serve.test_whole_kill import is_ready
from tests.studio.conftest import Served
from tests.studio.windows import opened

KEY, ADMIN = "sk-0123456789abcdef", "an-admin-key-of-some-length"
ROWS = "".join(json.dumps({"prompt": f"Where is parcel {i}?", "completion": "On its way."}) + "\n" for i in range(8))


def page_is_there(client: httpx.Client) -> bool:
    try:
        return client.get("/studio/").status_code == 200
    except httpx.TransportError:
        return False


def test_pages_work_while_the_base_loads_and_go_on_when_it_is_loaded(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    gate, keys = tmp_path / "go", tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    options = ("--train", "--api-keys", str(keys), "--admin-key", ADMIN)
    served = Served(tmp_path, *tiny, *options, loads_after=gate)
    site, studio = served.address, f"{served.address}/studio"
    try:
        with (
            httpx.Client(base_url=site, cookies={"veneer_studio": ADMIN}) as page,
            httpx.Client(base_url=site, headers={"authorization": f"Bearer {ADMIN}"}) as api,
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
                assert refused.json()["error"]["code"] == "shutting_down"
            job = api.post("/v1/fine_tuning/jobs", json={"model": "tiny-base", "training_file": "x"})
            assert job.status_code == 503

            assert "support@2" not in httpx.get(f"{studio}/").text  # the sign-in form
            assert httpx.get(f"{site}/v1/adapters").status_code == 401
            assert api.get("/v1/adapters", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
            told = httpx.get(f"{studio}/compare", headers={"cookie": f"veneer_studio={KEY}"}).text
            assert "tiny-base is still loading" in told
            assert "waiting for the test" not in told  # what loading says can name paths of the server

            uploaded = page.post(
                "/studio/api/v1/files", files={"file": ("rows.jsonl", ROWS)}, data={"purpose": "fine-tune"}
            )
            assert uploaded.status_code == 200, uploaded.text
            with (
                opened(f"{studio}/compare?p=Hi", ADMIN) as compare,
                opened(f"{studio}/train?file={uploaded.json()['id']}", ADMIN) as train,
            ):
                compare.until("waiting for the test")
                train.press("Train")
                train.until("the server is loading")
                assert "Where is parcel 0?" in str(train.elements)
                gate.touch()
                compare.until("answered at the same time by the base")
                wait_for(lambda: is_ready(site), 60)
                answer = api.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                train.press("Train")
                train.until("is queued")
    finally:
        served.end()


def test_a_server_whose_base_cannot_be_loaded_ends(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    gate = tmp_path / "go"
    served = Served(tmp_path, *tiny, loads_after=gate)
    try:
        with httpx.Client(base_url=served.address) as page:
            wait_for(lambda: page_is_there(page), 60)
        with opened(f"{served.address}/studio/compare") as compare:
            compare.until("waiting for the test")
            (tmp_path / "new").write_text("the disk is full")
            (tmp_path / "new").rename(gate)
            wait_for(lambda: served.process.poll() is not None, 60)
        assert served.process.poll() == 2
        assert "the disk is full" in served.log.read_text()
    finally:
        served.end()
