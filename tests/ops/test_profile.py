"""The machine's profile is measured once and stored."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from veneer.errors import ConfigError
from veneer.ops import profile as module
from veneer.ops.profile import SHAPES, Profile, profile, profile_from

_Rounds = dict[tuple[str, str], object]
PINNED = Profile(**json.loads((Path(__file__).parents[1] / "profile.json").read_text()))


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the kernels' folder in a new home without a profile."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VENEER_PROFILE")
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "AGREEMENT", 1e9)  # a busy machine's rounds differ by any factor
    monkeypatch.setattr(module, "IDLE", 0.0)
    module.profile_for.cache_clear()
    yield tmp_path / "kernels"
    module.profile_for.cache_clear()


def test_measured_profile_is_stored(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile()
    assert (found.threads, found.torch) == (torch.get_num_threads(), torch.__version__)
    # On a busy machine, the larger shapes can be left out.
    assert set(found.gflops["float32"]) <= {"x".join(map(str, shape)) for shape in SHAPES}
    assert found.rate("float32") == max(found.gflops["float32"].values()) > 0
    assert found.rate("no dtype") == 0
    assert found.bandwidth > 0
    (file,) = kernels.glob("profile-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    module.profile_for.cache_clear()
    monkeypatch.setattr(module, "measure", lambda key, known: pytest.fail("measured again"))
    assert profile() == found


BROKEN = ["", "{", "[]", "{}", "[" * 100_000, '{"bandwidth": 1}']
FOREIGN: list[dict[str, object]] = [
    {"key": "another machine"},
    {"bandwidth": "fast"},
    *({"gflops": {"float32": {"": rate}}} for rate in (-1.0, math.inf, math.nan, None)),
    {"gflops": {"bfloat16": {"": 1.0}}},
    *({name: None} for name in ("processor", "threads", "torch", "date", "spread", "share")),
]


@pytest.mark.parametrize("content", [*BROKEN, *FOREIGN])
def test_broken_or_foreign_profile_is_measured_again(kernels: Path, content: str | dict[str, object]) -> None:
    found = profile()
    (file,) = kernels.glob("profile-*.json")
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    module.profile_for.cache_clear()
    assert profile().key == found.key
    assert found.key in file.name
    again = json.loads(file.read_text())
    assert again["key"] == found.key
    assert again["bandwidth"] > 0


@pytest.mark.parametrize(
    "name", ["ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "VENEER_MARCH"]
)
def test_an_imitated_processor_has_its_own_profile(kernels: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(module, "measure", lambda key, known: replace(PINNED, key=key))
    found = profile()
    monkeypatch.setenv(name, "older")
    module.profile_for.cache_clear()
    assert profile().key != found.key
    assert len(list(kernels.glob("profile-*.json"))) == 2


def test_provisional_profile_is_measured_again_until_it_is_confirmed(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The seconds of each process's rounds; the fourth process is slower throughout.
    seconds = iter([(0.1, 0.2, 0.3), (0.1, 0.1, 0.1), (0.05, 0.1, 0.1), (0.2, 0.3, 0.3)])

    def rounds(works: Sequence[tuple[tuple[str, str], float, object]], found: _Rounds, shares: list[float]) -> None:
        found.update(dict.fromkeys((name for name, *_ in works), next(seconds)))
        shares.append(1.0)

    monkeypatch.setattr(module, "run_rounds", rounds)
    monkeypatch.setattr(module, "AGREEMENT", 0.2)
    first = profile()
    assert first.provisional
    assert first.spread == 1.0
    assert profile() is first, "a process keeps its profile"
    module.profile_for.cache_clear()
    second = profile()
    assert not second.provisional
    assert second.gflops == first.gflops
    module.profile_for.cache_clear()
    assert profile() == second
    third = module.renew()
    assert third.provisional
    assert third.bandwidth == pytest.approx(2 * first.bandwidth, rel=1e-3)
    module.profile_for.cache_clear()
    fourth = profile()
    assert fourth.gflops == third.gflops, "the higher rates of both measurements"
    assert not fourth.provisional, "no rate rose by over 20%"
    monkeypatch.setenv("VENEER_PROFILE", str(Path(__file__).parents[1] / "profile.json"))
    with pytest.raises(ConfigError, match="while VENEER_PROFILE is set"):
        module.renew()


def test_a_steadily_busy_machine_gives_a_provisional_profile(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that sleeps gets no processor time, as if other processes used the processors in every round."""

    def products(*_: object) -> list[Callable[[], object]]:
        return [lambda: time.sleep(0.001)]

    monkeypatch.setattr(module, "products_of", products)
    monkeypatch.setattr(module, "reading_of", lambda count: lambda: time.sleep(0.001))
    monkeypatch.setattr(module, "IDLE", 0.9)
    found = profile()
    assert found.provisional
    assert found.share < 0.5


def test_the_fastest_product_of_a_dtype_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)

    def products(*_: object) -> list[Callable[[], object]]:
        return [lambda: time.sleep(0.05), lambda: time.sleep(0.005)]

    monkeypatch.setattr(module, "products_of", products)
    found = module.measure("key")
    size = 2e-9 * 16 * 1024**2
    assert size / 0.05 < found.gflops["float32"]["16x1024x1024"] <= size / 0.005


def test_missing_and_slow_products_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)

    def products(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> list[Callable[[], object]]:
        def work() -> None:
            if dtype == torch.int8:
                raise RuntimeError("not implemented")
            time.sleep(rows / (2000 if dtype == torch.float16 else 200_000))

        return [work]

    monkeypatch.setattr(module, "products_of", products)
    found = module.measure("key")
    shapes = {dtype: [int(shape.split("x")[0]) for shape in rates] for dtype, rates in found.gflops.items()}
    assert shapes == {"float32": [16, 256, 1024], "bfloat16": [16, 256, 1024], "float16": [16]}


def test_unwritable_home_is_tolerated(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernels.parent / "file").write_text("")
    for name in ("VENEER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(kernels.parent / "file" / "below"))
    assert profile().rate("float32") > 0


def test_a_profile_that_cannot_be_stored_is_measured_once(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "replace_file", full)
    monkeypatch.setattr(module, "measure", lambda key, known=None: measured.append(key) or PINNED)
    assert profile() is PINNED
    assert len(measured) == 1


def test_a_profile_that_cannot_be_deleted_is_measured_again(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "measure", lambda key, known=None: replace(PINNED, key=key))
    stored = profile()
    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(module, "measure", lambda key, known=None: replace(PINNED, key=key, bandwidth=31.0))
    assert (stored.bandwidth, module.renew().bandwidth) == (30.0, 31.0)


@pytest.mark.parametrize(("float32", "arithmetic"), [(239.0, "bfloat16"), (241.0, "float32")])
def test_float32_arithmetic_needs_a_clear_advantage(float32: float, arithmetic: str) -> None:
    rates = {"float32": {"1x1x1": float32}, "bfloat16": {"1x1x1": 200.0}}
    assert replace(PINNED, gflops=rates).arithmetic == arithmetic
    assert replace(PINNED, gflops={"float32": {"1x1x1": 1.0}}).arithmetic == "float32", "torch has no bfloat16 product"


def test_veneer_profile_names_the_file_to_use(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[1] / "profile.json"
    monkeypatch.setenv("VENEER_PROFILE", str(file))
    assert profile().rate("bfloat16") == 400
    assert not kernels.exists()
    for name in (kernels / "none", Path(__file__)):
        monkeypatch.setenv("VENEER_PROFILE", str(name))
        with pytest.raises(ConfigError, match="not a file with a profile"):
            profile()


def test_a_profile_written_by_hand_can_have_whole_numbers() -> None:
    assert profile_from({**asdict(PINNED), "bandwidth": 30}) == PINNED
