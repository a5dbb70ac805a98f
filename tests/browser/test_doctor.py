"""The Doctor with a mouse: a file is selected, identified, converted for every other tool, and saved.

Other tools read the converted layouts in tests/formats."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from torch import Tensor

from tests.adapters.test_use import adapter_for
from tests.browser.conftest import Window
from tests.formats.image_adapters import random_adapter
from tests.formats.layouts import assert_same, product
from tests.studio.conftest import StudioServer
from veneer.core.adapter import Adapter
from veneer.formats import convert, peft
from veneer.formats.read import read
from veneer.formats.topology import families
from veneer.library.library import open_library
from veneer.models.text.base import load_text


def downloaded(window: Window, tool: str, folder: Path) -> Path:
    """Click the link for a tool; return the downloaded file, or the folder in a downloaded zip."""
    with window.page.expect_download() as download:
        window.page.get_by_role("link", name=f"for {tool}", exact=True).click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    if file.suffix != ".zip":
        return file
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder / tool)
    (inner,) = (folder / tool).iterdir()
    return inner


def changes(adapter: Adapter) -> dict[str, Tensor]:
    return {module: pair.scale * product(pair.B, pair.A) for module, pair in adapter.pairs.items()}


def test_image_adapter_is_converted_and_saved(window: Window, server: StudioServer, tmp_path: Path) -> None:
    style = tmp_path / "Zelda Style.safetensors"
    adapter = random_adapter(families()["sdxl"], lambda m: m.startswith("unet."))
    convert.write(adapter, style, "kohya", family="sdxl")
    page = window.open("doctor").page
    page.set_input_files("input[type=file]", str(style))
    window.heading("Zelda_Style.safetensors")
    window.until("Stable Diffusion XL")
    for tool in ("comfyui", "diffusers", "kohya", "peft"):
        assert_same(changes(read(downloaded(window, tool, tmp_path)).adapter), changes(adapter), 1e-6)
    page.get_by_label("Name", exact=True).fill("zelda")
    window.press("Save to library")  # at once, because the name that was just typed must be used
    window.heading("zelda@1")
    with open_library(server.library) as library:
        assert library.find("zelda").digest == read(style).adapter.digest()
        library.remove("zelda")


def test_text_adapter_is_converted_for_servers(window: Window, server: StudioServer, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    adapter = adapter_for(load_text(str(server.base)), 3)
    peft.write_folder(adapter, tmp_path / "polite")
    with zipfile.ZipFile(tmp_path / "polite.zip", "w") as packed:
        for each in (tmp_path / "polite").iterdir():
            packed.write(each, f"polite/{each.name}")
    window.open("doctor").page.set_input_files("input[type=file]", str(tmp_path / "polite.zip"))
    window.heading("polite.zip")
    for tool in ("peft", "vllm"):
        assert_same(changes(read(downloaded(window, tool, tmp_path)).adapter), changes(adapter), 1e-6)
    file = gguf.GGUFReader(downloaded(window, "gguf", tmp_path))
    assert file.fields["general.type"].contents() == "adapter"
    assert len(file.tensors) == 2 * len(adapter.pairs)


def test_pickle_is_refused_with_the_reason(window: Window, tmp_path: Path) -> None:
    (tmp_path / "style.pt").write_bytes(b"\x80\x04.")
    window.open("doctor").page.set_input_files("input[type=file]", str(tmp_path / "style.pt"))
    window.until("pickles run whatever code is in them")
    window.ignore("400")
