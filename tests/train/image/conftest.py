"""Fixtures for each module: a folder for tiny image bases and caches, and a tiny FLUX.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_image_base import tiny_image_base
from veneer.models.image.base import ImageBase, load_image


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def base(shared: Path) -> ImageBase:
    return load_image(str(tiny_image_base(shared, "flux1")))
