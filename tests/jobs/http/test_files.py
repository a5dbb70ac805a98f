"""Uploading and reading files over HTTP, with OpenAI's clients."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.http.toy import Live, ToyCatalog, ToyEngine, ToyTenancy, ToyText, live, wait_for
from veneer.jobs.files import Files, open_files
from veneer.jobs.http.files import file_routes, large_bodies
from veneer.library.library import open_library
from veneer.serve.request import invalid
from veneer.serve.settings import HttpSettings

ROWS = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
LARGE = 3 << 20


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Files, Live]]:
    """Yield a server that limits all bodies except uploads to one megabyte."""
    with open_library(tmp_path_factory.mktemp("files") / "library") as library:
        files = open_files(library)
        files.max_bytes = LARGE
        more: dict[str, Any] = {"routers": [file_routes(files)], "large": large_bodies(files)}
        settings = HttpSettings(max_body=1 << 20, body_time=2)
        with live(ToyEngine(ToyText()), ToyCatalog(), ToyTenancy(), settings, **more) as server:
            yield files, server


@pytest.fixture
def files(_running: tuple[Files, Live]) -> Iterator[Files]:
    yield _running[0]
    for tenant in ("", "acme"):
        for file in _running[0].list(tenant)[0]:
            _running[0].delete(tenant, file.id)


@pytest.fixture
def server(_running: tuple[Files, Live]) -> Live:
    return _running[1]


@pytest.fixture
def client(server: Live, files: Files) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="acme", max_retries=0) as opened:
        yield opened


def sent(client: openai.OpenAI, data: bytes = ROWS, name: str = "rows.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, data), purpose="fine-tune", **more)


def test_openai_client_uploads_and_deletes_a_file(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "tickets.jsonl"
    path.write_bytes(ROWS)
    with path.open("rb") as opened:
        uploaded = client.files.create(file=opened, purpose="fine-tune")
    assert (uploaded.object, uploaded.filename, uploaded.bytes) == ("file", "tickets.jsonl", len(ROWS))
    assert (uploaded.purpose, uploaded.status, uploaded.expires_at) == ("fine-tune", "processed", None)
    assert client.files.retrieve(uploaded.id) == uploaded
    assert client.files.content(uploaded.id).read() == ROWS
    assert client.files.wait_for_processing(uploaded.id).id == uploaded.id
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        client.files.retrieve(uploaded.id)


def test_openai_client_lists_files_by_page(client: openai.OpenAI) -> None:
    ids = [sent(client, b"%d" % n).id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="fine-tune")] == ids
    assert client.files.list(purpose="fine-tune-results").data == []
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**wrong)
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


def test_file_expires_after_the_requested_time(client: openai.OpenAI) -> None:
    uploaded = sent(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert uploaded.expires_at == uploaded.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        sent(client, expires_after={"anchor": "created_at", "seconds": 60})


def test_files_of_other_tenants_are_404(client: openai.OpenAI, server: Live) -> None:
    uploaded = sent(client)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="admin", max_retries=0) as stranger:
        assert stranger.files.list().data == []
        for attack in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
            with pytest.raises(openai.NotFoundError):
                attack(uploaded.id)
    assert httpx.get(f"{server.url}/v1/files").status_code == 401
    assert client.files.retrieve(uploaded.id) == uploaded


def test_slow_uploads_delay_no_other_tenant(client, server, files, monkeypatch):
    go = threading.Event()

    def slow(*values: object, **options: object) -> None:
        go.wait(30)
        raise invalid("slow")

    monkeypatch.setattr(files, "add", slow)
    count = 8  # more uploads than threads that copy uploads

    def upload(_: int) -> None:
        with pytest.raises(openai.BadRequestError, match="slow"):
            sent(client)

    with ThreadPoolExecutor(count) as posting:
        answers = posting.map(upload, range(count))
        try:
            wait_for(lambda: server.service.inside == count)
            assert httpx.get(f"{server.url}/v1/files", headers={"authorization": "Bearer admin"}).status_code == 200
        finally:
            go.set()
        list(answers)


def test_only_file_uploads_can_be_large(client: openai.OpenAI, server: Live) -> None:
    data = bytes(2 << 20)
    assert client.files.content(sent(client, data).id).read() == data
    for size in (LARGE + 1, 2 * LARGE):
        with pytest.raises(openai.APIStatusError) as refused:
            sent(client, bytes(size))
        assert refused.value.status_code == 413
    head = {"authorization": "Bearer acme", "content-type": "application/json"}
    answer = server.client.post("/v1/chat/completions", content=bytes(2 << 20), headers=head)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("form", "status", "what"),
    [
        ({"files": {"file": ("a.jsonl", ROWS)}}, 400, "purpose"),
        ({"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "assistants"}}, 400, "fine-tune"),
        ({"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune", "colour": "red"}}, 400, "colour"),
        ({"files": {"file": ("a.jsonl", b"")}, "data": {"purpose": "fine-tune"}}, 400, "empty"),
        ({"files": {"data": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}, 400, "'file'"),
        ({"files": [("file", ("a", ROWS)), ("file", ("b", ROWS))], "data": {"purpose": "fine-tune"}}, 400, "files"),
        ({"files": {"file": ("a", ROWS)}, "data": {"purpose": "f" * 5000}}, 400, "4KB"),
        ({"json": {"purpose": "fine-tune"}}, 400, "multipart"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    ],
)
def test_invalid_form_is_refused(server: Live, files: Files, form: Any, status: int, what: str) -> None:
    headers = {"authorization": "Bearer acme", **form.pop("headers", {})}
    answer = server.client.post("/v1/files", headers=headers, **form)
    assert answer.status_code == status, answer.text
    assert what in answer.json()["error"]["message"]
    assert files.list("acme")[0] == []


def test_interrupted_uploads_leave_nothing(server: Live, files: Files) -> None:
    """Uploaded bytes are removed, and the upload's slot is free again."""

    def body(ends: bool) -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + bytes(100_000)
        if ends:
            raise ConnectionError
        threading.Event().wait(3)
        yield b"more"

    headers = {"authorization": "Bearer acme", "content-type": "multipart/form-data; boundary=x"}
    for _ in range(40):  # more uploads than slots
        with pytest.raises(ConnectionError):
            httpx.post(f"{server.url}/v1/files", content=body(True), headers=headers)
    answer = httpx.post(f"{server.url}/v1/files", content=body(False), headers=headers, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "too_slow")
    wait_for(lambda: not server.service.inside)
    form = {"files": {"file": ("a", io.BytesIO(ROWS))}, "data": {"purpose": "fine-tune"}}
    assert httpx.post(f"{server.url}/v1/files", **form, headers={"authorization": "Bearer acme"}).status_code == 200
    assert len(files.list("acme")[0]) == 1
