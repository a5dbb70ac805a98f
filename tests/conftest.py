"""For every test: no hub, and a veneer home of its own, so that cached bases are neither used nor changed."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path_factory.getbasetemp() / "veneer-home"))
