"""The Doctor with a mouse: a file is picked, looked at, written for another tool, kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.conftest import Window
from tests.formats.image_adapters import random_adapter
from tests.studio.conftest import Served
from veneer.formats import convert
from veneer.formats.read import read
from veneer.formats.topology import families
from veneer.library.library import open_library


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "Zelda Style.safetensors"
    convert.write(random_adapter(families()["sdxl"], lambda m: m.startswith("unet.")), path, "kohya", family="sdxl")
    return path


def test_a_file_is_looked_at_written_for_another_tool_and_kept(
    window: Window, served: Served, style: Path, tmp_path: Path
) -> None:
    page = window.at("doctor").page
    page.set_input_files("input[type=file]", str(style))
    window.heading("Zelda_Style.safetensors")
    window.until("Stable Diffusion XL")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download for ComfyUI").click()
    (tmp_path / "it.safetensors").write_bytes(Path(download.value.path()).read_bytes())
    assert read(tmp_path / "it.safetensors").adapter.digest() == read(style).adapter.digest()
    page.get_by_label("Name", exact=True).fill("zelda")
    page.get_by_role("button", name="Keep it in the library").click()  # at once: what was typed counts
    window.heading("zelda@1")
    with open_library(served.library) as library:
        assert library.find("zelda").digest == read(style).adapter.digest()
        library.remove("zelda")


def test_a_pickle_is_refused_with_the_reason(window: Window, tmp_path: Path) -> None:
    (tmp_path / "style.pt").write_bytes(b"\x80\x04.")
    page = window.at("doctor").page
    page.set_input_files("input[type=file]", str(tmp_path / "style.pt"))
    window.until("pickles run whatever code is in them")
    window.wrong[:] = [line for line in window.wrong if "400" not in line]  # which the browser says, too
