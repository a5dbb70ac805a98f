"""For every test: no hub, a veneer home of its own, so that cached bases are neither used nor changed, and the same
examples of a property at every run; `make test-random` draws new ones."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.homes import home_with_kernels

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VENEER_PROFILE", str(Path(__file__).parent / "profile.json"))  # the same bits everywhere
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; 0 for tests marked gpu
if "PYTEST_XDIST_WORKER" in os.environ:  # a process each core: more threads would only wait for one another
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is first imported, here and in subprocesses
        os.environ.setdefault(name, "1")

gc.disable()  # until all is imported that tests are collected from: it stays, and each full collection walked all of it

# or each of a hundred processes compiles the package's sources, and each run of pytest those of the tests
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# who is killed loses nothing by it, and a disk takes milliseconds for each of thousands; tests of it set their own
os.fsync = lambda fd: None

settings.register_profile("same", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("fresh", max_examples=60, deadline=None)


_STARTING = ("subprocess", "Forked", "attack.harness")
_PROCESSES = 40
"""A file that starts processes, which its tests wait for, is as long as if it had so many tests more."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would go by the numbers of tests alone
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the files: long ones first, so that all end at about the same time."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    length = Counter(item.path for item in items)
    texts = {path: path.read_text(encoding="utf-8") for path in length}
    length.update({p: _PROCESSES for p, text in texts.items() if any(word in text for word in _STARTING)})
    items.sort(key=lambda item: -length[item.path])


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled once for all processes of a session. VENEER_TEST_KERNELS: a folder to keep them in from one session to
    the next."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kernels = Path(os.environ.get("VENEER_TEST_KERNELS") or session / "kernels").absolute()
    kernels.mkdir(mode=0o700, exist_ok=True)
    os.environ["VENEER_TEST_KERNELS"] = str(kernels)


@pytest.fixture(autouse=True, scope="module")
def _own_home(_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A file's own, so that what one publishes changes no message in another, in whatever order they run. What is
    alive when a file begins (thousands of modules, in the end) is put out of the collector's sight: a run collects at
    its end, and walking all of that took seconds each time."""
    gc.collect()
    gc.freeze()
    home = home_with_kernels(tmp_path_factory.mktemp("veneer-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_HOME", str(home))
        yield


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or what a library looks for at its end is told as leaked
