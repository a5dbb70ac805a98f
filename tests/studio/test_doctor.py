"""The Doctor: what is sent is looked at and shown as text, whatever stands in it; nobody else's can be seen."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.formats.image_adapters import random_adapter
from tests.studio.conftest import HOSTILE, Served
from tests.studio.windows import page_html
from veneer.core.adapter import Card
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.library.library import open_library


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of kohya's whose metadata somebody made to do harm."""
    path = tmp_path_factory.mktemp("doctor") / "style.safetensors"
    adapter = random_adapter(families()["sdxl"], lambda m: m.startswith("unet."))
    card = Card(kind="image", trigger_words=[HOSTILE], licence=HOSTILE)
    convert.write(replace(adapter, card=card), path, "kohya", family="sdxl")
    return path


def sent(client: httpx.Client, path: Path, name: str) -> httpx.Response:
    head = {"content-type": "application/octet-stream"}
    at = "/studio/api/v1/adapter_inspections"
    return client.post(at, params={"filename": name}, content=path.read_bytes(), headers=head)


def whole(client: httpx.Client, path: str, words: str) -> httpx.Response:
    """The page with these words, which a busy machine may draw after the page has gone out."""
    pages = (client.get(path) for _ in range(20))
    return next(page for page in pages if words in page_html(page))


def test_a_file_is_told_what_it_is_and_what_others_would_make_of_it(studio: Served, kohya: Path) -> None:
    with httpx.Client(base_url=studio.address, timeout=60) as client:
        assert "Drop a file anywhere on this page" in client.get("/studio/doctor").text
        id = sent(client, kohya, f"../{HOSTILE}.safetensors").json()["id"]
        page = whole(client, f"/studio/doctor?file={id}", "In other tools")
    said = html.unescape(page_html(page))
    assert page.status_code == 200
    for words in (
        "kohya",
        "Stable Diffusion XL",
        "In other tools",
        "ComfyUI",
        "Download for diffusers",
        "Save to library",
    ):
        assert words in said, words
    assert "&lt;img src=x onerror=alert(1)&gt;" in page_html(page)
    for text in (page_html(page), page.text):
        assert "<img src=x" not in text
        assert "\u202e" not in text


def test_a_file_without_its_scale_is_amber_and_asks_for_alpha(studio: Served, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    with open_library(studio.library) as library:
        save_file(load_file(library.resolve("support@1") / "adapter_model.safetensors"), alone)  # without metadata
    with httpx.Client(base_url=studio.address, timeout=60) as client:
        id = sent(client, alone, "alone.safetensors").json()["id"]
        said = html.unescape(page_html(whole(client, f"/studio/doctor?file={id}", "In other tools")))
        head = {"content-type": "application/octet-stream"}
        kept = client.post("/studio/api/v1/adapters", params={"name": "x/y"}, content=alone.read_bytes(), headers=head)
    assert '<b class="warn">Readable, but the file does not state its scale.</b>' in said
    assert "veneer adapter convert alone.safetensors --alpha N --to peft --output NEW" in said
    for words in ("It is refused", "can be used", "exactly", "Download for"):
        assert words not in said, words
    assert kept.status_code == 400
    assert "--alpha" in kept.text


def test_what_is_not_here_is_not_here_and_a_pickle_is_refused_with_the_reason(studio: Served, kohya: Path) -> None:
    with httpx.Client(base_url=studio.address, timeout=60) as client:
        for id in ("none", "../../etc/passwd", HOSTILE):
            assert client.get("/studio/doctor", params={"file": id}).status_code == 404
        refused = sent(client, kohya, "style.pt")
    assert refused.status_code == 400
    assert "pickles run whatever code is in them" in refused.text


def test_what_depends_on_the_base_is_written_of_a_base_that_is_in_a_folder_of_its_own(
    studio: Served, tmp_path: Path
) -> None:
    """The server calls it by the folder's last name, by which alone nothing would find it."""
    gguf = pytest.importorskip("gguf")
    with httpx.Client(base_url=studio.address, timeout=60) as client:
        for to in ("gguf", "tgi"):
            answer = client.get("/studio/api/v1/adapter_files/support@1", params={"to": to, "base": studio.base.name})
            assert answer.status_code == 200, answer.text
            if to == "gguf":
                (tmp_path / "it.gguf").write_bytes(answer.content)
    assert gguf.GGUFReader(tmp_path / "it.gguf").fields["general.type"].contents() == "adapter"
