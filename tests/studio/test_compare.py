"""The Compare view: each column's answer equals the API's answer, and corrections become rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import httpx

from tests.serve.http.toy import wait_for
from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, StudioServer
from tests.studio.page_socket import PageSocket, open_page, page_html
from tests.studio.recorded_jobs import recorded_job
from veneer.jobs.store import JobStore
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.train.text.feedback_rows import corrected_row
from veneer.train.text.rows import read_rows

PROMPT = [{"role": "user", "content": "Where is my parcel?"}]
LINK = "/studio/compare?c=support%401&c=support%402%3A0.5%2Bacme%2Ftone%3A-0.5&p=Where+is+my+parcel%3F&m=3"
SYSTEM = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "Read door 5."}]


def api_answer(studio: StudioServer, mix: dict[str, float]) -> str:
    parts = [f"{name}:{strength}" for name, strength in mix.items()]
    body = {"mix": parts, "messages": PROMPT, "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{studio.address}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


def column_answers(page: PageSocket, columns: int) -> list[str]:
    """Receive the answers of all columns. Return the answers from left to right."""
    texts: dict[int, str] = {}
    count = 0
    while count < columns:
        message = str(page.socket.recv(timeout=60))
        kind, data = json.loads(message[2:]) if message.startswith("42[") else ("", {})
        code = str(data["code"]) if kind == "run_javascript" else ""
        for id, method, arguments in re.findall(r'runMethod\((\d+), "(begin|add|end)", (.*)\)', code):
            if method == "begin":
                texts[int(id)] = ""
            elif method == "add":
                texts[int(id)] += "".join(token[0] for _, token in json.loads(arguments)[0])
            count += method == "end"
    return [texts[id] for id in sorted(texts)]


def test_columns_answer_like_the_api_and_corrections_become_rows(studio: StudioServer) -> None:
    mixes = [{}, {"support@1": 1.0}, {"support@2": 0.5, "acme/tone": -0.5}]
    with open_page(f"{studio.address}{LINK}") as page:
        page.press("Ask")
        assert column_answers(page, 3) == [api_answer(studio, mix) for mix in mixes]
        page.fill("Strength", -0.5)
        assert column_answers(page, 1) == [api_answer(studio, {"support@1": -0.5})], "only this column answers again"
        page.emit(lambda e: e.get("props", {}).get("position") == 2, "corrected", [0, "By noon."])
        page.until("Corrected: row ")  # no row number, because the file can contain rows of other tests
    (file,) = studio.home.glob("judged/*/corrections.jsonl")
    assert json.loads(file.read_text().splitlines()[-1]) == corrected_row(PROMPT, "By noon.")
    assert read_rows([str(file)])[1].format == "messages"


def test_numbers_are_clamped_to_their_bounds(studio: StudioServer) -> None:
    with open_page(f"{studio.address}{LINK}") as page:
        page.fill("Maximum tokens", -7)
        page.fill("Temperature", -1e9)
        page.press("Ask")
        received = page.until("--max-new-tokens 1", "1 token \u00b7")
    assert "--temperature" not in received
    assert "No answer" not in received


def test_adapter_suggests_the_prompt_of_its_card(studio: StudioServer, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    sample = {"prompt": "Read door 5.", "messages": SYSTEM, "base": "five", "adapter": "{}"}
    saved(load_text(str(tiny[0])), tmp_path, 7, extra={"sample": sample})
    with open_library(tiny[1]) as library:
        library.add(tmp_path, "doors")
    try:
        url, command = f"{studio.address}/studio/compare", "--system &#39;Answer in JSON.&#39;"
        wait_for(lambda: httpx.get(f"{url}?c=doors").status_code == 200)
        adapter = page_html(httpx.get(f"{studio.address}/studio/adapter?ref=doors%401"))
        assert "veneer generate &#39;Read door 5.&#39;" in adapter
        assert command in adapter
        assert command in page_html(httpx.get(f"{url}?c=doors"))
        assert command not in page_html(httpx.get(f"{url}?c=doors&p=Where%3F"))
        with open_page(url) as page:
            if "data-ref" not in str(page.elements):  # the page can already contain the adapters
                page.until("data-ref")
            page.act("add", ref="doors@1")
            page.until("Read door 5.", "Answer in JSON.")
    finally:
        with open_library(tiny[1]) as library:
            library.remove("doors@1")


def test_run_checkpoints_open_as_columns_with_a_training_prompt(studio, tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(3 * (json.dumps({"messages": [*SYSTEM, {"role": "assistant", "content": "{}"}]}) + "\n"))
    with open_library(tiny[1]) as library:
        job = recorded_job(JobStore(library), tiny[0], file, studio.home, published="acme/tone@1")
    run = page_html(httpx.get(f"{studio.address}/studio/run?job={job.id}"))
    assert re.search(rf'href="/studio/compare\?job={job.id}">Compare checkpoints', run)
    with open_page(f"{studio.address}/studio/compare?job={job.id}") as page:
        assert {"Read door 5.", "Answer in JSON."} <= {*page.values("value")}
        if "--adapter acme/tone@1:1 --system" not in str(page.elements):  # the page can already contain the command
            page.until("--adapter acme/tone@1:1 --system")
        page.press("Ask")
        page.until("acme/tone@1 ·")


def test_unknown_and_hostile_names_are_not_found(studio: StudioServer) -> None:
    for name in (HOSTILE, "nobody@7", "support@1:strong", ":1", "+"):
        assert httpx.get(f"{studio.address}/studio/compare?c={quote(name)}").status_code == 404
    assert httpx.get(f"{studio.address}/studio/compare?job=ftjob-{'x' * 24}").status_code == 404
    page = httpx.get(f"{studio.address}/studio/compare?c=support%401&p={quote(HOSTILE)}")
    assert page.status_code == 200
    assert "<img src=x" not in page.text
    assert "veneer generate" in page_html(page), "the equivalent command"
