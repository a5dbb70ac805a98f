"""Push and pull, with a fake of huggingface_hub's HfApi that keeps repositories in folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.library.made import made, open_made, read_made
from veneer.errors import AdapterError, ConfigError
from veneer.library import transfer
from veneer.library.describe_files import AdapterDescription
from veneer.library.library import Library, open_library


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Library]:
    with open_made(str(tmp_path / "own")) as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Library]:
    with open_made(str(tmp_path / "other")) as opened:
        yield opened


class Hub:
    """The part of HfApi that the library uses, backed by a folder."""

    root: Path
    private: dict[str, bool]

    def create_repo(self, repo: str, *, exist_ok: bool, private: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo, private)
        (self.root / repo).mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str, revision: str | None) -> Any:
        for operation in operations:
            target = self.root / repo / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)
        return SimpleNamespace(oid="c0ffee")

    def model_info(self, repo: str, *, revision: str | None) -> Any:
        if not (self.root / repo).is_dir():
            raise ConnectionError(f"404: no {repo}\nlong explanation")
        return SimpleNamespace(sha="c0ffee")

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        assert revision == "c0ffee"
        return sorted(p.relative_to(self.root / repo).as_posix() for p in (self.root / repo).rglob("*") if p.is_file())

    def hf_hub_download(self, repo: str, file: str, *, revision: str) -> str:
        assert revision == "c0ffee"
        return str(self.root / repo / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    monkeypatch.setattr(Hub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(Hub, "private", {}, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def peft_like(folder: Path) -> Path:
    for n, name in enumerate(("adapter_config.json", "adapter_model.safetensors", "README.md")):
        made(folder, n, name=name)
    return folder


def read_folder(path: Path) -> AdapterDescription:
    return read_made(path / "adapter_model.safetensors" if path.is_dir() else path)


def test_push_and_pull_with_the_hub(own: Library, other: Library, tmp_path: Path, hub: type[Hub]) -> None:
    own.add(peft_like(tmp_path / "in"), "support", describe=read_folder)
    assert transfer.push(own, "support@1", "hf:me/support") == "hf:me/support@c0ffee"
    assert hub.private == {"me/support": True}, "nothing becomes public by itself"
    (hub.root / "me" / "support" / ".gitattributes").write_text("x", encoding="utf-8")
    added = transfer.pull(other, "hf:me/support@main", describe=read_folder)
    assert (added.version.reference, added.version.source) == ("support@1", "hf:me/support@c0ffee")
    assert added.version.entry == own.find("support").entry


def test_one_file_of_a_repository(own: Library, tmp_path: Path, hub: type[Hub]) -> None:
    made(hub.root / "me" / "styles", 1, name="One Style.safetensors")
    assert transfer.pull(own, "hf:me/styles", describe=read_made).version.name == "styles"
    made(hub.root / "me" / "styles" / "more", 2, name="two.safetensors")
    with pytest.raises(AdapterError, match=r"several files[\s\S]*One Style\.safetensors, more/two\.safetensors"):
        transfer.pull(own, "hf:me/styles", describe=read_made)
    added = transfer.pull(own, "hf:me/styles/more/two.safetensors", tags=["t"], describe=read_made)
    assert (added.version.name, added.version.tags) == ("two", ["t"])


def test_hub_errors_are_one_line(own: Library, hub: type[Hub]) -> None:
    with pytest.raises(AdapterError, match=r"hub cannot be used: 404: no me/none\n  where"):
        transfer.pull(own, "hf:me/none")
    for place in ("hf:none", "hf:a/../b", "hf:a/b/../../c"):
        with pytest.raises(ConfigError, match="not a location on the hub"):
            transfer.pull(own, place)


@pytest.mark.parametrize("kind", ["path", "file", "s3", "memory"])
def test_push_and_pull_by_url(
    own: Library, other: Library, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    places = {"path": str(tmp_path / "there"), "file": f"file://{tmp_path}/there", "memory": "memory://there"}
    place = request.getfixturevalue("s3") + "/a/there" if kind == "s3" else places[kind]
    own.add(peft_like(tmp_path / "in"), "support", describe=read_folder)
    transfer.push(own, "support", place)
    added = transfer.pull(other, place, "mine", describe=read_folder)
    assert added.version.entry == own.find("support").entry
    assert (added.version.reference, added.version.source) == ("mine@1", place)


def test_an_interrupted_push_is_refused(own: Library, other: Library, tmp_path: Path) -> None:
    own.add(peft_like(tmp_path / "in"), "support", describe=read_folder)
    transfer.push(own, "support", str(tmp_path / "there"))
    made(tmp_path / "there", 77, name="adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"files differ from the manifest: adapter_model\.safetensors"):
        transfer.pull(other, str(tmp_path / "there"), describe=read_folder)
    with pytest.raises(AdapterError, match="there is no such file or folder"):
        transfer.pull(other, str(tmp_path / "nowhere"))


def test_a_peft_folder_is_described_by_its_reader(tmp_path: Path) -> None:
    import torch

    from veneer.core.adapter import Adapter, Card, Pair
    from veneer.formats import peft

    pair = Pair(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    card = Card(base="org/Base", trigger_words=["hello"], licence="mit", rank=2, alpha=2.0, targets=["q"])
    adapter = Adapter({"model.q": pair}, card=card)
    peft.write_folder(adapter, tmp_path / "a")
    with open_library(tmp_path / "l") as library:
        version = library.add(tmp_path / "a", "tiny").version
        assert (version.digest, version.format, version.base) == (adapter.digest(), "peft", "org/Base")
        assert version.trigger_words == ["hello"]
        assert peft.read_folder(library.resolve("tiny")).digest() == adapter.digest()
        with pytest.raises(AdapterError):
            library.add(made(tmp_path, 1), "noise")
