"""Weighted mixes with a library on S3: a replica that shares no disk with the door finds them there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.library.conftest import _s3_server, s3  # noqa: F401
from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.library.library import Library, open_library
from veneer.models.text.base import TextBase, load_text
from veneer.serve.fleet import mixes as module
from veneer.serve.fleet.mixes import Mixes, drop_copies
from veneer.serve.fleet.vllm_plugin import resolve_name
from veneer.serve.request import DigestMix, make_mix, served_name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextBase:
    return load_text(str(tiny_base_dir(tmp_path_factory.mktemp("base"))), dtype="float32")


class Shelf:
    """A library on S3 with two adapters, the door's folder, and the replica's folder."""

    def __init__(self, base: TextBase, library: Library, folder: Path) -> None:
        self.library, self.folder, self.adapters = library, folder, {}
        for seed, name in enumerate(("one", "two")):
            adapter = create(base.model, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=seed)
            for pair in adapter.pairs.values():
                pair.B = torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(seed))
            peft.write_folder(adapter, folder / name)
            self.adapters[name] = peft.read_folder(folder / name)
            library.add(folder / name, name)

    def mix(self, one: float, two: float) -> DigestMix:
        return make_mix([(self.adapters["one"].digest(), one), (self.adapters["two"].digest(), two)])

    def door(self, name: str = "door", **limits: Any) -> Mixes:
        return Mixes(self.library.resolve, self.folder / name, store=self.library.store, **limits)  # type: ignore[arg-type]

    def stored(self) -> set[str]:
        return {path.split("/")[1] for path, _, _ in self.library.store.walk("mixes/")}


@pytest.fixture
def shelf(base: TextBase, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setenv("VENEER_LIBRARY", f"{s3}/library")
    monkeypatch.setenv("VENEER_LIBRARY_INDEX", f"sqlite:///{tmp_path}/index.sqlite")
    monkeypatch.setenv("VENEER_VLLM_CACHE", str(tmp_path / "replica"))
    with open_library() as library:
        yield Shelf(base, library, tmp_path)


def test_a_replica_without_a_shared_disk_resolves_a_mix(shelf, base):
    mix = shelf.mix(0.5, -2.0)
    with pytest.raises(AdapterError, match="there is no folder"):
        resolve_name(base.name, served_name(mix))
    shelf.door().write(mix)
    name, folder = resolve_name(base.name, served_name(mix))
    assert (name, folder.parent) == (served_name(mix), shelf.folder / "replica")
    summed = peft.read_folder(folder).pairs
    for module_name, pair in summed.items():
        one, two = (shelf.adapters[name].pairs[module_name] for name in ("one", "two"))
        wanted = 0.5 * one.scale * one.B @ one.A - 2.0 * two.scale * two.B @ two.A
        torch.testing.assert_close(pair.scale * pair.B @ pair.A, wanted, rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in folder.parent.iterdir()) == [name]  # no temporary folder remains


def test_a_replica_resolves_adapters_of_a_library_on_s3(shelf, base):
    digest = shelf.adapters["one"].digest()
    name, folder = resolve_name(base.name, f"veneer-{digest.removeprefix('sha256:')}")
    assert name == f"veneer-{digest.removeprefix('sha256:')}"
    assert peft.read_folder(folder).digest() == digest


@pytest.mark.parametrize("limits", [{"limit_bytes": 1}, {"days": 0.0}])
def test_mixes_over_a_limit_are_deleted_from_s3_by_any_door(shelf, monkeypatch, limits):
    old, new = shelf.mix(0.5, 1.0), shelf.mix(0.25, 1.0)
    shelf.door().write(old)
    shelf.door("door2").write(shelf.mix(0.75, 1.0))  # within the limits, and in the grace period
    assert served_name(old) in shelf.stored()
    monkeypatch.setattr(module, "REFRESH", 0.0)
    time.sleep(1.1)  # moto's times have whole seconds
    door = shelf.door("door3", grace=-1.0, **limits)
    with door.using(new, "acme"):
        door.write(new)
    assert shelf.stored() == {served_name(new)}


def test_a_tenants_dropped_mix_is_deleted_from_s3(shelf, monkeypatch):
    monkeypatch.setattr(module, "REFRESH", -10.0)
    door = shelf.door(each=2, grace=0.0)
    mixes = [shelf.mix(0.5 + i, 1.0) for i in range(4)]
    for mix in mixes:
        with door.using(mix, "acme"):
            door.write(mix)
    assert shelf.stored() == {served_name(mix) for mix in mixes[-2:]}


def test_a_mix_that_another_door_deleted_is_stored_again(shelf, base):
    mix, door = shelf.mix(0.5, 1.0), shelf.door()
    door.write(mix)
    for path, _, _ in list(shelf.library.store.walk("mixes/")):
        shelf.library.store.delete(path)
    door.stored.clear()  # as after the 404 of a replica
    door.write(mix)
    assert resolve_name(base.name, served_name(mix))[0] == served_name(mix)


def test_copies_are_dropped_when_the_first_vllm_starts(shelf, base):
    mix = shelf.mix(0.5, 1.0)
    shelf.door().write(mix)
    _, folder = resolve_name(base.name, served_name(mix))
    drop_copies()
    assert not folder.exists()
    resolve_name(base.name, served_name(mix))
    drop_copies()  # this process has the lock now, like a vLLM that runs
    assert folder.exists()
