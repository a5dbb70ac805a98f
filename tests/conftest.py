"""Settings for every test: no access to the hub, a separate veneer home, fixed Hypothesis examples.

`make test-random` uses new examples."""

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
os.environ.setdefault(
    "VENEER_PROFILE", str(Path(__file__).parent / "profile.json")
)  # so that results are the same bits on every machine
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; 0 for tests marked gpu
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest runs one process per core, so each process gets one thread
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is first imported, here and in subprocesses
        os.environ.setdefault(name, "1")

gc.disable()  # full garbage collections would walk all imported modules while pytest collects tests

# must not be set, otherwise each process compiles the package's sources again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# fsync takes milliseconds and only matters if the machine crashes; tests of fsync set their own
os.fsync = lambda fd: None

settings.register_profile("same", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("fresh", max_examples=60, deadline=None)


_STARTING = ("subprocess", "Forked", "attack.harness")
_PROCESSES = 40
"""Length of a test file that starts processes, in tests, where files are ordered by length."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # otherwise pytest-xdist would order files by their numbers of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In parallel runs, start with the longest files, so that all processes end at about the same time."""
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
    """Share compiled kernels among all processes of a session.

    VENEER_TEST_KERNELS: folder that keeps the kernels between sessions."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kernels = Path(os.environ.get("VENEER_TEST_KERNELS") or session / "kernels").absolute()
    kernels.mkdir(mode=0o700, exist_ok=True)
    os.environ["VENEER_TEST_KERNELS"] = str(kernels)


@pytest.fixture(autouse=True, scope="module")
def _own_home(_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each test file its own veneer home, so that test files do not affect each other.

    Also freezes all live objects, because every training run ends with a garbage collection, which would
    otherwise walk thousands of modules."""
    gc.collect()
    gc.freeze()
    home = home_with_kernels(tmp_path_factory.mktemp("veneer-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_HOME", str(home))
        yield


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise a library reports leaks when the process ends
