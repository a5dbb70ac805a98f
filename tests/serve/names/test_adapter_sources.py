"""Folders from which the server loads adapters, and the reasons for refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_use import adapter_for, other_base
from tests.formats import hostile
from tests.serve.saved_adapters import Make, reason, refused, saved
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.formats import peft
from veneer.models.text.base import TextBase
from veneer.serve.names.catalog import Catalog
from veneer.serve.principal import Principal

OPERATOR = Principal("operator")


def untouched(catalog: Catalog) -> None:
    assert [c.id for c in catalog.models(OPERATOR)] == ["tiny"]
    assert catalog.residents.stats().bytes == 0
    assert not catalog.residents.resident()
    assert refused(lambda: catalog.resolve("x", OPERATOR)).status == 404


def test_files_inside_the_allowed_folder(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "deep" / "a")
    catalog = make()
    for i, source in enumerate(["deep/a", str(folder / "deep" / "a"), "./deep/a"]):
        assert catalog.load(f"n{i}", source).digest == digest
    assert catalog.load("run", "deep/a").root == "a"
    (folder / "inner").symlink_to(folder / "deep")
    assert catalog.load("linked", "inner/a").digest == digest


def test_a_folder_of_a_run(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "run" / "adapter")
    assert make().load("x", "run").digest == digest


OUTSIDE = ["{out}/a", "../out/a", "deep/../../out/a", "link", "link/../a", "{out}", "/etc/passwd", "~/a"]
OUTSIDE += ["nowhere", "", "loop", "dangling", "fifo", "/dev/zero", "/proc/self/mem"]
OUTSIDE += ["file:///etc/passwd", "http://x/y", "a\0b", "\0", "x" * 5000, "a\nb"]


@pytest.mark.parametrize("source", OUTSIDE)
def test_files_outside_the_folder_are_not_found(make, base, folder, tmp_path, source):
    saved(base, tmp_path / "out" / "a")
    (folder / "link").symlink_to(tmp_path / "out" / "a")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    os.mkfifo(folder / "fifo")
    catalog = make()
    error = refused(lambda: catalog.load("x", source.replace("{out}", str(tmp_path / "out"))))
    if source == "":  # "" is the allowed folder itself, which contains no adapter
        assert error.status == 400
    else:
        assert (reason(error), error.status) == ("not_found", 404)
    what = error.what.replace(repr(str(tmp_path / "out" / "a")), "").replace(repr(str(tmp_path / "out")), "")
    assert str(tmp_path) not in what
    untouched(catalog)


def test_without_allowed_folders_no_path_is_an_adapter(make: Make, base: TextBase, folder: Path) -> None:
    saved(base, folder / "a")
    catalog = make(folders=())
    for source in ("a", str(folder / "a")):
        assert reason(refused(lambda s=source: catalog.load("x", s))) == "not_found"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "veneer.json"])
def test_a_link_out_of_the_folder_is_refused(make, base, folder, tmp_path, name):
    saved(base, tmp_path / "out")
    shutil.copytree(tmp_path / "out", folder / "a")
    (folder / "a" / name).unlink(missing_ok=True)
    (folder / "a" / name).symlink_to(tmp_path / "out" / name)
    catalog = make()
    assert reason(refused(lambda: catalog.load("x", "a"))) == "unsafe_file"
    untouched(catalog)


@pytest.mark.parametrize("name", sorted(hostile.FILES))
def test_hostile_files(make: Make, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / name).write_bytes(hostile.FILES[name][0])
    catalog = make()
    error = refused(lambda: catalog.load("x", name))
    assert error.status == 400
    assert reason(error) in {"unsafe_file", "corrupt", "not_finite", "shape_mismatch"}
    assert name.split(".")[0] not in {"nan"} or reason(error) == "not_finite"
    assert not (folder / hostile.MARK).exists()
    untouched(catalog)


def broken(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_another_base(make: Make, base: TextBase, folder: Path, tmp_path: Path) -> None:
    other = other_base(tmp_path, hidden_size=96)
    saved(other, folder / "a")
    adapter = adapter_for(other)
    adapter.card.base_fingerprint = adapter.card.base = ""
    peft.write_folder(adapter, folder / "b")
    saved(base, folder / "c", base_fingerprint="sha256:" + "1" * 64)
    catalog = make()
    reasons = [reason(refused(lambda s=s: catalog.load("x", s))) for s in "abc"]
    assert reasons == ["wrong_base", "shape_mismatch", "wrong_base"]
    untouched(catalog)


def test_a_file_without_its_scale_is_refused_with_the_fix(make: Make, base: TextBase, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(base, folder / "a")
    save_file(load_file(folder / "a" / "adapter_model.safetensors"), folder / "alone.safetensors")  # without metadata
    error = refused(lambda: make().load("x", "alone.safetensors"))
    assert reason(error) == "unstated_scale"
    assert "veneer adapter convert FILE --alpha N" in str(error.fix)


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        ("q_proj: DoRA with one norm per input", "dora_unsupported"),
        ("lm_head: a full copy", "modules_to_save_unsupported"),
        ("embed_tokens: token rows", "modules_to_save_unsupported"),
        ("q_proj: a hadamard delta", "form_unsupported"),
    ],
)
def test_adapters_the_runner_cannot_serve_are_refused(make, base, folder, library, problem, word):
    digest = saved(base, folder / "a")
    library.add(folder / "a", "kept")
    catalog = make(servable=lambda adapter: [problem])
    error = refused(lambda: catalog.load("x", "a"))
    assert reason(error) == word
    assert problem in error.what
    assert catalog.resolve("kept", OPERATOR).mix == ((digest, 1.0),)
    # the same checks apply when the library's adapter is first read
    assert reason(refused(lambda: catalog.sources.read(digest, catalog.problems))) == word


SPECS = {
    "rslora": LoraSpec(rank=4, alpha=8, rslora=True),
    "dora": LoraSpec(rank=4, alpha=8, dora=True),
    "patterns": LoraSpec(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32}),
    "embedding and head": LoraSpec(rank=4, alpha=8, targets=("embed_tokens", "lm_head", "q_proj")),
    "modules_to_save": LoraSpec(rank=4, alpha=8, targets=("q_proj",), modules_to_save=("norm",)),
    "token rows": LoraSpec(rank=4, alpha=8, targets=("q_proj",), token_rows={"embed_tokens": (3, 5)}),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_every_served_kind_is_read_completely(make: Make, base: TextBase, folder: Path, name: str) -> None:
    adapter = create(base.model, SPECS[name], seed=1)
    peft.write_folder(adapter, folder / "a")
    catalog = make()
    card = catalog.load("x", "a")
    again = catalog.sources.read(card.digest, catalog.problems)
    assert {n for n, _ in again.tensors()} == {n for n, _ in adapter.tensors()}
    assert {n: p.scale for n, p in again.pairs.items()} == {n: p.scale for n, p in adapter.pairs.items()}


def test_a_later_write_does_not_change_a_loaded_adapter(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "a")
    catalog = make()
    adapter = catalog.sources.read_from(catalog.sources.locate("a"), catalog.problems)
    path = folder / "a" / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    assert adapter.digest() == digest


def test_running_requests_read_an_adapter_after_its_unload(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "a")
    catalog = make()
    catalog.load("x", "a")
    catalog.unload("x")
    assert catalog.sources.files(digest) == folder / "a"
    assert refused(lambda: catalog.sources.files("sha256:0")).status == 404
