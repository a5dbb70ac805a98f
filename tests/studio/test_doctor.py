"""The Doctor view: an uploaded file is identified and shown as text, and only to its owner."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.formats.image_adapters import random_adapter
from tests.studio.conftest import HOSTILE, StudioServer
from tests.studio.page_socket import page_html
from veneer.core.adapter import Card
from veneer.formats import convert
from veneer.formats.topology import families
from veneer.library.library import open_library

BINARY = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a kohya file with hostile metadata."""
    path = tmp_path_factory.mktemp("doctor") / "style.safetensors"
    adapter = random_adapter(families()["sdxl"], lambda m: m.startswith("unet."))
    card = Card(kind="image", trigger_words=[HOSTILE], licence=HOSTILE)
    convert.write(replace(adapter, card=card), path, "kohya", family="sdxl")
    return path


@pytest.fixture
def client(studio: StudioServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=studio.address, timeout=60) as client:
        yield client


def upload(client: httpx.Client, path: Path, name: str) -> httpx.Response:
    url = "/studio/api/v1/adapter_inspections"
    return client.post(url, params={"filename": name}, content=path.read_bytes(), headers=BINARY)


def inspected(client: httpx.Client, path: Path, name: str) -> httpx.Response:
    """Upload a file. Return the file's page once it is complete, which takes a moment on a busy machine."""
    id = upload(client, path, name).json()["id"]
    pages = (client.get(f"/studio/doctor?file={id}") for _ in range(20))
    return next(page for page in pages if "Other tools" in page_html(page))


def test_file_is_identified_and_offered_for_other_tools(client: httpx.Client, kohya: Path) -> None:
    assert "Drop a file anywhere on this page" in client.get("/studio/doctor").text
    page = inspected(client, kohya, f"../{HOSTILE}.safetensors")
    assert page.status_code == 200
    text = html.unescape(page_html(page))
    for words in ("kohya", "Stable Diffusion XL", "for comfyui", "for diffusers", "Save to library"):
        assert words in text, words
    assert "&lt;img src=x onerror=alert(1)&gt;" in page_html(page)
    for text in (page_html(page), page.text):
        assert "<img src=x" not in text
        assert "\u202e" not in text


def test_file_without_a_scale_asks_for_alpha(client: httpx.Client, studio: StudioServer, tmp_path: Path) -> None:
    file = tmp_path / "alone.safetensors"
    with open_library(studio.library) as library:
        save_file(load_file(library.resolve("support@1") / "adapter_model.safetensors"), file)  # without metadata
    text = html.unescape(page_html(inspected(client, file, file.name)))
    assert '<b class="warn">Readable, but the file does not state its scale.</b>' in text
    assert "veneer adapter convert alone.safetensors --alpha N --to peft --output NEW" in text
    for words in ("Refused", "can be used", "for peft"):
        assert words not in text, words
    url = "/studio/api/v1/adapters"
    refused = client.post(url, params={"name": "x/y"}, content=file.read_bytes(), headers=BINARY)
    assert refused.status_code == 400
    assert "--alpha" in refused.text


def test_unknown_file_is_not_found_and_a_pickle_is_refused(client: httpx.Client, kohya: Path) -> None:
    for id in ("none", "../../etc/passwd", HOSTILE):
        assert client.get("/studio/doctor", params={"file": id}).status_code == 404
    refused = upload(client, kohya, "style.pt")
    assert refused.status_code == 400
    assert "pickles run whatever code is in them" in refused.text


def test_adapter_is_converted_for_a_base_in_its_own_folder(client, studio, tmp_path):
    """The base's name on the server is the last part of its folder, which does not suffice to find the base."""
    gguf = pytest.importorskip("gguf")
    params = {"to": "gguf", "base": studio.base.name}
    answer = client.get("/studio/api/v1/adapter_files/support@1", params=params)
    assert answer.status_code == 200, answer.text
    (tmp_path / "gguf").write_bytes(answer.content)
    assert gguf.GGUFReader(tmp_path / "gguf").fields["general.type"].contents() == "adapter"
