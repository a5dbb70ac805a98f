"""Fixtures: a tiny base, a library, a folder that the operator allows, and a catalog of adapters.

The adapters come from the library and from the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.serve.saved_adapters import Make, Ready
from tests.serve.whole import Shop, Whole, make_shop, served
from tests.tiny_base import tiny_base_dir
from veneer.core.attach import fit_problems
from veneer.library.library import Library, open_library
from veneer.models.text.base import TextBase, load_text
from veneer.serve.access import ModelCard, ResolvedModel
from veneer.serve.names.adapter_cache import AdapterCache
from veneer.serve.names.adapter_sources import AdapterSources
from veneer.serve.names.catalog import Catalog
from veneer.serve.principal import Principal


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextBase:
    return load_text(str(tiny_base_dir(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def whole(shop: Shop) -> Iterator[Whole]:
    with served(shop) as server:
        yield server


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with open_library(tmp_path / "library") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


class Prompt(Catalog):
    """A catalog that refreshes its names before each lookup, as HTTP routes do before each request."""

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        self._look()
        return super().resolve(model, caller)

    def resolve_mix(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ResolvedModel:
        self._look()
        return super().resolve_mix(parts, caller)

    def models(self, caller: Principal) -> list[ModelCard]:
        self._look()
        return super().models(caller)

    def _look(self) -> None:
        if self.sources.names is not None:
            self.sources.names.refreshed()


@pytest.fixture
def make(base: TextBase, library: Library, folder: Path) -> Iterator[Make]:
    catalogs: list[Catalog] = []

    def build(limit: int = 1 << 30, servable: Any = None, **options: Any) -> Catalog:
        places = {"library": library, "folders": [folder]}
        places |= {k: options.pop(k) for k in ("library", "folders") if k in options}
        shelf, problems = AdapterSources(base, **places), servable or (lambda a: fit_problems(base.model, a))
        residents: AdapterCache[Ready] = AdapterCache(
            lambda digest: shelf.read(digest, problems),
            lambda a, digest: Ready(a, a.size_bytes()),
            limit_bytes=limit,
            threads=1,
        )
        catalog = Prompt(shelf, problems, residents, **{"name": "tiny", **options})
        catalogs.append(catalog)
        return catalog

    yield build
    for catalog in catalogs:
        catalog.residents.close()
        catalog.close()
