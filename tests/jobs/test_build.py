"""The training extension of a server."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from tests.serve.http.toy import ToyCatalog, ToyEngine, ToyText
from veneer.jobs import build
from veneer.jobs.files import open_files
from veneer.library.library import open_library
from veneer.serve.access import OpenAccess
from veneer.serve.http.service import Service


def test_expired_files_are_removed_while_serving(tmp_path: Path) -> None:
    text = ToyText()
    with open_library(tmp_path / "library") as library:
        files = open_files(library)
        files.clock = lambda: 1e9  # long ago
        old = files.add("", "old.jsonl", "fine-tune", io.BytesIO(b"{}"), ttl=3600)
        extension = build.training(Service(ToyEngine(text), ToyCatalog(), OpenAccess(), text), library)

        async def live() -> None:
            await extension.start()
            async with asyncio.timeout(20):
                while list(files.store.walk("tenants")):
                    await asyncio.sleep(0.01)
            await extension.stop()

        asyncio.run(live())
        with pytest.raises(Exception, match="No such File"):
            files.get("", old.id)
    assert {getattr(route, "path", "") for router in extension.routers for route in router.routes} >= {"/v1/files"}
