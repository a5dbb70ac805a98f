"""Compare as a browser's socket sees it: each column's answer is the server's own, and what is said of one is a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import httpx

from tests.serve.http.toy import wait_for
from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, Served
from tests.studio.windows import Window, opened, page_html
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.train.text.feedback_rows import corrected_row
from veneer.train.text.rows import read_rows

ASKED = [{"role": "user", "content": "Where is my parcel?"}]
LINK = "/studio/compare?c=support%401&c=support%402%3A0.5%2Bacme%2Ftone%3A-0.5&p=Where+is+my+parcel%3F&m=3"


def content(studio: Served, mix: dict[str, float]) -> str:
    """What the API answers."""
    body = {
        "mix": [f"{name}:{strength}" for name, strength in mix.items()],
        "messages": ASKED,
        "max_tokens": 3,
        "temperature": 0,
    }
    answer = httpx.post(f"{studio.address}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


def said_in(window: Window, columns: int) -> list[str]:
    """What the page is told to show in each column, from the left, until all are whole."""
    texts: dict[int, str] = {}
    ended = 0
    while ended < columns:
        message = str(window.socket.recv(timeout=60))
        for id, what, given in re.findall(r'runMethod\((\d+), "(begin|add|end)", (.*)\)', _code(message)):
            values = json.loads(given)
            if what == "begin":
                texts[int(id)] = ""
            elif what == "add":
                texts[int(id)] += "".join(token[0] for _, token in values[0])
            ended += what == "end"
    return [texts[id] for id in sorted(texts)]


def _code(message: str) -> str:
    if not message.startswith("42["):
        return ""
    kind, given = json.loads(message[2:])
    return str(given["code"]) if kind == "run_javascript" else ""


def test_each_column_answers_as_the_api_does_and_judgements_become_rows(studio: Served) -> None:
    mixes = [{}, {"support@1": 1.0}, {"support@2": 0.5, "acme/tone": -0.5}]
    with opened(f"{studio.address}{LINK}") as window:
        window.press("Ask")
        assert said_in(window, 3) == [content(studio, mix) for mix in mixes]
        window.tell(lambda e: e.get("props", {}).get("label") == "Strength", "changed", -0.5)
        assert said_in(window, 1) == [content(studio, {"support@1": -0.5})], "another strength is asked at once, alone"
        window.tell(lambda e: e.get("props", {}).get("place") == 2, "corrected", [0, "By noon."])
        window.until("Corrected: row ")  # of a file that other tests of this server may have begun
    (file,) = studio.home.glob("judged/*/corrections.jsonl")
    assert json.loads(file.read_text().splitlines()[-1]) == corrected_row(ASKED, "By noon.")
    assert read_rows([str(file)])[1].format == "messages"


def test_numbers_out_of_bounds_are_asked_and_said_as_the_nearest_in_them(studio: Served) -> None:
    with opened(f"{studio.address}{LINK}") as window:
        window.tell(lambda e: e.get("props", {}).get("label") == "Tokens, at most", "changed", -7)
        window.tell(lambda e: e.get("props", {}).get("label") == "Temperature", "changed", -1e9)
        window.press("Ask")
        heard = window.until("--max-new-tokens 1", "1 token \u00b7")
    assert "--temperature" not in heard
    assert "No answer" not in heard


def test_an_adapter_brings_the_prompt_of_its_card(studio: Served, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "Read door 5."}]
    sample = {"prompt": "Read door 5.", "messages": messages, "base": "five", "adapter": "{}"}
    saved(load_text(str(tiny[0])), tmp_path, 7, extra={"sample": sample})
    with open_library(tiny[1]) as library:
        library.add(tmp_path, "doors")
    try:
        wait_for(lambda: httpx.get(f"{studio.address}/studio/compare?c=doors").status_code == 200)
        page = page_html(httpx.get(f"{studio.address}/studio/adapter?ref=doors%401"))
        assert "veneer generate &#39;Read door 5.&#39;" in page
        assert "--system &#39;Answer in JSON.&#39;" in page
        command = "--system &#39;Answer in JSON.&#39;"
        assert command in page_html(httpx.get(f"{studio.address}/studio/compare?c=doors"))
        assert command not in page_html(httpx.get(f"{studio.address}/studio/compare?c=doors&p=Where%3F"))
        with opened(f"{studio.address}/studio/compare") as window:
            if "data-ref" not in str(window.elements):  # the adapters may have been found before the page went out
                window.until("data-ref")
            window.act("add", ref="doors@1")
            window.until("Read door 5.", "Answer in JSON.")
    finally:
        with open_library(tiny[1]) as library:
            library.remove("doors@1")


def test_what_is_not_there_and_what_is_hostile_is_only_text(studio: Served) -> None:
    for name in (HOSTILE, "nobody@7", "support@1:strong", ":1", "+"):
        assert httpx.get(f"{studio.address}/studio/compare?c={quote(name)}").status_code == 404
    page = httpx.get(f"{studio.address}/studio/compare?c=support%401&p={quote(HOSTILE)}")
    assert page.status_code == 200
    assert "<img src=x" not in page.text
    assert "veneer generate" in page_html(page), "the command that does the same"
