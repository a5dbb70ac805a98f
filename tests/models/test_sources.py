"""Finding a base by its name, and errors if there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub.utils import filter_repo_objects

from tests.tiny_base import tiny_base_dir
from veneer.errors import BaseError
from veneer.models.home import bases_home, veneer_home
from veneer.models.sources import find_base, known_bases, short_name
from veneer.models.text.base import load_text

WAYS = ("smollm2-135m", "directory", ".gguf")  # alternatives to the hub; every error about a missing base lists them


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_home_is_set_by_the_environment_or_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    assert veneer_home() == tmp_path
    monkeypatch.setenv("VENEER_HOME", "")
    assert veneer_home() == Path.home() / ".veneer"
    monkeypatch.setenv("VENEER_HOME", "~/elsewhere")
    assert veneer_home() == Path.home() / "elsewhere"


def test_bases_are_found_by_path_and_by_name(home: Path) -> None:
    folder = tiny_base_dir(home.parent)
    assert find_base(str(folder)) == folder
    assert find_base("./tiny-base").resolve() == folder
    bases_home().mkdir(parents=True)
    folder.rename(bases_home() / "mine")
    assert find_base("mine") == bases_home() / "mine"
    assert [b.name for b in known_bases()] == ["smollm2-135m", "catalogue-flux", "catalogue-sdxl", "mine"]
    assert [b.here for b in known_bases() if b.name in ("smollm2-135m", "mine")] == [False, True]


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/base", "~/no-such-base", "model.gguf", "what is this?", "a/b/c"]
)
def test_missing_path_is_not_requested_from_the_hub(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked a hub"))
    with pytest.raises(BaseError, match="there is no base") as caught:
        find_base(name)
    assert all(way in (caught.value.fix or "") for way in WAYS)


def test_error_suggests_the_nearest_name(home: Path) -> None:
    tiny_base_dir(home.parent)
    with pytest.raises(BaseError, match=r"did you mean tiny-base\?"):
        find_base("./tiny-bse")
    with pytest.raises(BaseError, match=r"did you mean smollm2-135m\?"):
        find_base("smolm2-135")


def test_offline_error_names_the_builtin_copy(home: Path) -> None:
    with pytest.raises(BaseError) as caught:
        find_base("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "smollm2-135m is veneer's own copy of it" in (caught.value.fix or "")


def test_offline_error_lists_places_and_alternatives(home: Path) -> None:
    with pytest.raises(BaseError, match="the hub cannot be reached") as caught:
        find_base("some/model")
    where, fix = caught.value.where or "", caught.value.fix or ""
    assert str(home.parent / "some/model") in where
    assert "https://" in where
    assert str(home) in where
    assert all(way in fix for way in WAYS)


def test_hub_errors_are_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    reply: Any = SimpleNamespace(headers={}, request=None)
    for name, error, says in (
        ("some/model", GatedRepoError("gated", response=reply), r"gated[\s\S]*hf auth login"),
        ("some/model", RepositoryNotFoundError("404", response=reply), "there is no base 'some/model'"),
        ("some/model@v9", RevisionNotFoundError("404", response=reply), "no revision 'v9'"),
        ("some/model", Exception("no route"), "no route"),
    ):
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
        with pytest.raises(BaseError, match=says):
            find_base(name)


def test_a_base_in_the_hubs_cache_needs_no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, repo = "0" * 40, home / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    tiny_base_dir(home.parent).rename(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    assert load_text("some/model").directory == repo / "snapshots" / commit


@pytest.mark.parametrize("variants", [False, True])
def test_image_base_download_skips_unused_files(home: Path, monkeypatch: pytest.MonkeyPatch, variants: bool) -> None:
    """Skips duplicate top-level weights, half-precision copies and a safety checker."""
    v = ".fp16" if variants else ""
    remote = ["model_index.json", "unet/config.json", f"unet/diffusion_pytorch_model{v}.safetensors", "all.safetensors"]
    remote += [
        "tokenizer/vocab.json",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    got: set[str] = set()

    def download(repo: str, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        for name in filter_repo_objects(remote, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (home / "snap" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "snap" / name).write_text("{}")
            got.add(name)
        return str(home / "snap")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_base("some/sdxl") == home / "snap"
    assert got == {"model_index.json", "unet/config.json", "tokenizer/vocab.json", remote[2]}


def test_size_of_a_download_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, dry_run: bool = False, **_: object) -> object:
        if dry_run:
            sizes = {"config.json": (2000, False), "model.safetensors": (2_500_000_000, True)}
            return [SimpleNamespace(file_size=size, will_download=wanted) for size, wanted in sizes.values()]
        (home / "snap").mkdir(parents=True, exist_ok=True)
        (home / "snap" / "config.json").write_text("{}")
        return str(home / "snap")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    said: list[str] = []
    find_base("some/base", say=said.append)
    assert said == ["looking for some/base on the hub", "downloading some/base (2,500 MB) from the hub"]


def test_non_base_directories_are_named(home: Path) -> None:
    work = home.parent
    for folder in ("adapter", "empty", "outer", "two"):
        (work / folder).mkdir()
    tiny_base_dir(work / "outer")
    for file in ("adapter/adapter_config.json", "two/a.gguf", "two/b.gguf", "notes.txt"):
        (work / file).write_text("{}")
    for name, says in (
        ("adapter", "an adapter, not a base"),
        ("empty", r"no config\.json"),
        ("outer", r"did you mean outer/tiny-base\?"),
        ("two", "2 GGUF files"),
        ("notes.txt", r"neither \.gguf nor \.safetensors"),
    ):
        with pytest.raises(BaseError, match=says):
            find_base(f"./{name}")


def test_only_built_in_bases_are_made_from_a_file(home: Path) -> None:
    with pytest.raises(BaseError, match="not a built-in"):
        find_base("mine", source=Path("x.whl"))


def test_short_name_of_a_path_is_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert short_name(str(tmp_path / "here")) == short_name("./here/") == short_name("here") == "here"
    assert short_name(".") == tmp_path.name
    assert short_name(str(tmp_path / "gone")) == "gone", "a folder that was there is no stranger's business either"
    assert short_name("org/name") == "org/name"
