"""Fixtures: a tiny SDXL base and adapter files for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image_twins import random_adapter
from tests.tiny_image_base import tiny_image_base
from veneer.core.adapter import Adapter
from veneer.formats.convert import write
from veneer.models.image.base import ImageBase, load_image


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_image_base(tmp_path_factory.getbasetemp(), "sdxl")


@pytest.fixture(scope="session")
def base(place: Path) -> ImageBase:
    return load_image(str(place))


@pytest.fixture(scope="session")
def brand(base: ImageBase) -> Adapter:
    return random_adapter(base.model, 1)


@pytest.fixture(scope="session")
def look(base: ImageBase) -> Adapter:
    return random_adapter(base.model, 2, dora=True)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, brand: Adapter, look: Adapter) -> Path:
    """Write brand.safetensors and look.safetensors in kohya's layout."""
    folder = tmp_path_factory.mktemp("adapters")
    write(brand, folder / "brand.safetensors", to="kohya", family="sdxl")
    write(look, folder / "look.safetensors", to="kohya", family="sdxl")
    return folder


@pytest.fixture(autouse=True)
def _here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the adapters' folder, so that tests can name adapters as a user would."""
    monkeypatch.chdir(files)
