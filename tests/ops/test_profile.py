"""The machine's profile is measured once and stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from veneer.errors import ConfigError
from veneer.ops import profile as module
from veneer.ops.profile import SHAPES, profile


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the kernels' folder in a new home without a profile."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VENEER_PROFILE")
    monkeypatch.setattr(module, "SECONDS", 0.0)
    module.profile_for.cache_clear()
    yield tmp_path / "kernels"
    module.profile_for.cache_clear()


def test_measured_profile_is_stored(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile()
    assert (found.threads, found.torch) == (torch.get_num_threads(), torch.__version__)
    assert set(found.gflops["float32"]) == {"x".join(map(str, shape)) for shape in SHAPES}
    assert found.rate("float32") == max(found.gflops["float32"].values()) > 0
    assert found.rate("no dtype") == 0
    assert found.bandwidth > 0
    (file,) = kernels.glob("profile-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    module.profile_for.cache_clear()
    monkeypatch.setattr(module, "measure", lambda key: pytest.fail("measured again"))
    assert profile() == found


BROKEN = ["", "{", "[]", "{}", "[" * 100_000, '{"bandwidth": 1}']
FOREIGN = [{"key": "another machine"}, {"bandwidth": "fast"}, {"gflops": {"float32": {"": -1.0}}}]


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


def test_unwritable_home_is_tolerated(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernels.parent / "file").write_text("")
    for name in ("VENEER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(kernels.parent / "file" / "below"))
    assert profile().rate("float32") > 0


def test_veneer_profile_names_the_file_to_use(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[1] / "profile.json"
    monkeypatch.setenv("VENEER_PROFILE", str(file))
    assert profile().rate("bfloat16") == 400
    assert not kernels.exists()
    monkeypatch.setenv("VENEER_PROFILE", str(kernels / "none"))
    with pytest.raises(ConfigError, match="not a profile of a machine"):
        profile()
