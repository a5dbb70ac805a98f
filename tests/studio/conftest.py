"""A server with a Studio, a tiny base, and a library with hostile names.

All tests in this folder share one server process, because NiceGUI allows one application per process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.saved_adapters import saved
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import is_ready
from tests.tiny_base import tiny_base_dir
from veneer.library.library import open_library
from veneer.models.sources import find_base, is_image_base
from veneer.models.text.base import load_text
from veneer.serve.tenancy.tenants import Tenants

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '"><img src=x onerror=alert(1)></script>\u202e{{ 7*7 }}'
OPERATOR = "operator-of-the-test"
"""The admin key of servers with keys."""
_SLOW = """
import time
from pathlib import Path
from veneer.errors import BaseError
from veneer.models.text import base

load_text = base.load_text

def load_later(*args, say, **settings):
    say("waiting for the test")
    while not Path({0!r}).exists():
        time.sleep(0.05)
    if error := Path({0!r}).read_text():
        raise BaseError(error)
    return load_text(*args, say=say, **settings)

base.load_text = load_later
"""


class StudioServer:
    """A server in a separate process.

    base: folder of the base, or a built-in name
    library: folder of the library
    loads_after: loading the base waits until this file exists; if the file contains text, loading fails with
        the text
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        library: Path,
        *options: str,
        cwd: Path | None = None,
        loads_after: Path | None = None,
    ) -> None:
        port = options[options.index("--port") + 1] if "--port" in options else str(free_port())
        self.address, self.base, self.library, self.home = f"http://127.0.0.1:{port}", base, library, folder
        self.log = folder / "log"
        program = (_SLOW.format(str(loads_after)) if loads_after else "") + "from veneer.cli.main import main; main()"
        command = ["-c", program, "serve", "--studio", "--base", str(base), "--library", str(library)]
        command += ["--dtype", "float32", *options, "--port", port]
        if not is_image_base(find_base(str(base))):
            command += ["--cache-memory", "16M"]
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        env |= {"PYTHONPATH": str(ROOT / "src"), "VENEER_HOME": str(home_with_kernels(folder)), "OMP_NUM_THREADS": "1"}
        self.process = Forked(command, env=env, log=self.log, cwd=cwd)

    def wait(self) -> None:
        wait_for(lambda: self.process.poll() is not None or is_ready(self.address), 120)
        assert self.process.poll() is None, self.log.read_text()[-3000:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> StudioServer:
        try:
            self.wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Create a base, and a library of adapters for the base. Return both folders."""
    folder = tmp_path_factory.mktemp("studio")
    base_dir = tiny_base_dir(folder)
    base = load_text(str(base_dir))
    with open_library(folder / "library") as library:
        for seed, name in enumerate(["support", "support", "acme/tone", "globex/tone"]):
            saved(base, folder / str(seed), seed, trigger_words=[HOSTILE] if seed == 2 else [], licence=HOSTILE)
            library.add(folder / str(seed), name)
        library.alias("support@1", "prod")
    return base_dir, folder / "library"


@pytest.fixture(scope="session")
def studio(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Yield a server with a tenants' database that accepts requests without a key."""
    folder = tmp_path_factory.mktemp("open")
    with StudioServer(folder, *tiny, "--open", "--tenants", str(folder / "tenants.sqlite")) as server:
        yield server


def tenant_keys(database: Path, **more: list[str]) -> dict[str, str]:
    """Add the tenants acme and globex to a database. Return their keys and the operator's.

    `more`: tenant -> additional adapters that the tenant sees.
    """
    tenants, keys = Tenants(str(database), watch=False), {"operator": OPERATOR}
    for name in ("acme", "globex"):
        keys[name] = new_tenant(tenants.store, name, [f"{name}/*", *more.get(name, [])])
    tenants.close()
    return keys
