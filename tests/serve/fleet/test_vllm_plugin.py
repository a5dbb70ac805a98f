"""The plug-in without vLLM: which names it resolves, and how it registers in a fake registry."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError, ConfigError
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.text.base import TextBase, load_text
from veneer.serve.fleet import vllm_plugin
from veneer.serve.fleet.mixes import servable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextBase:
    return load_text(str(tiny_base_dir(tmp_path_factory.mktemp("base"))), dtype="float32")


@pytest.fixture
def shelf(base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a library with one adapter of each kind for the tiny base."""
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("VENEER_VLLM_CACHE", str(tmp_path / "converted"))
    specs = {
        "plain": LoraSpec(rank=2, alpha=4, targets=("q_proj",)),
        "stable": LoraSpec(rank=4, alpha=2, targets=("q_proj", "v_proj"), rslora=True),
        "patterns": LoraSpec(rank=4, alpha=4, rank_pattern={"q_proj": 2}),
        "dora": LoraSpec(rank=2, alpha=4, targets=("q_proj",), dora=True),
        "whole": LoraSpec(rank=2, alpha=4, targets=("q_proj",), modules_to_save=("lm_head",)),
    }
    with open_library() as library:
        for seed, (name, spec) in enumerate(specs.items()):
            adapter = create(base.model, spec, seed=seed)
            for pair in adapter.pairs.values():
                pair.B = torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(seed))
            adapter.card = replace(adapter.card, base=base.name, base_fingerprint=base.fingerprint)
            peft.write_folder(adapter, tmp_path / name, base=base.model)
            library.add(tmp_path / name, name)
            if name == "plain":
                adapter.card = replace(adapter.card, base_fingerprint="sha256:" + "1" * 64)
                peft.write_folder(adapter, tmp_path / "foreign", base=base.model)
                library.add(tmp_path / "foreign", "foreign")
                adapter.card = replace(adapter.card, base_fingerprint="")
                adapter.pairs = {n.replace("q_proj", "o_proj"): p for n, p in adapter.pairs.items()}
                odd = next(iter(adapter.pairs.values()))
                odd.A = torch.ones(2, 7)
                peft.write_folder(adapter, tmp_path / "odd")
                library.add(tmp_path / "odd", "odd")
        library.alias("plain@1", "prod")
    return tmp_path


def test_plain_adapters_resolve_to_the_librarys_folder(base, shelf):
    named = {"plain@1": "plain@1", "plain": "plain=plain@1", "plain@prod": "plain@prod=plain@1", "stable@1": "stable@1"}
    for asked, called in named.items():
        name, folder = vllm_plugin.resolve_name(base.name, asked)
        assert (name, folder.parent) == (called, shelf / "library" / "folders")
    assert not (shelf / "converted").exists()


def test_rank_patterns_are_converted_exactly_once(base, shelf):
    name, folder = vllm_plugin.resolve_name(base.name, "patterns@1")
    assert name == "patterns@1"
    assert folder.parent == shelf / "converted"
    stamp = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert vllm_plugin.resolve_name(base.name, "patterns")[1] == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    before, after = peft.read_folder(shelf / "patterns"), peft.read_folder(folder)
    assert {p.rank for p in after.pairs.values()} == {4}
    for module, pair in before.pairs.items():
        new = after.pairs[module]
        want = pair.scale * pair.B.double() @ pair.A.double()
        torch.testing.assert_close(new.scale * new.B.double() @ new.A.double(), want, rtol=1e-6, atol=1e-6)


def test_unservable_adapters_are_refused_with_the_reason(base, shelf):
    reasons = {"dora": "does not support DoRA", "whole": "not load full copies", "foreign": "belongs to another base"}
    reasons |= {"odd": "does not fit", "nothing": "no adapter 'nothing'", "plain@9": "no plain@9"}
    for asked, why in reasons.items():
        with pytest.raises(AdapterError, match=why):
            vllm_plugin.resolve_name(base.name, asked)


def test_names_from_an_upstream_server_are_resolved(base, shelf):
    with open_library() as library:
        digest = library.find("stable").digest
        paths = {name: library.resolve(f"{name}@1") for name in ("stable", "plain")}
    name = f"veneer-{digest.removeprefix('sha256:')}"
    assert vllm_plugin.resolve_name(base.name, name) == (name, paths["stable"])
    mix = f"veneer-mix-{'0' * 32}"
    with pytest.raises(AdapterError, match="VENEER_VLLM_CACHE"):
        vllm_plugin.resolve_name(base.name, mix)
    servable([(paths["plain"], 0.5), (paths["stable"], 2.0)], mix, shelf / "converted")
    assert vllm_plugin.resolve_name(base.name, mix) == (mix, shelf / "converted" / mix)


def test_a_name_is_never_a_path(base, shelf):
    paths = ["veneer-mix-../plain", "veneer-../plain", "../plain", "/etc/passwd", "plain/../plain", "", ".."]
    for asked in (*paths, "plain\x00", "C:\\x"):
        with pytest.raises(ConfigError):
            vllm_plugin.resolve_name(base.name, asked)


def test_a_base_without_local_files_is_not_checked(shelf, caplog):
    assert vllm_plugin.resolve_name("somebody/some-model", "plain@1")[0] == "plain@1"
    assert "not checked" in caplog.text


def test_resolving_a_name_creates_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no library"):
        vllm_plugin.resolve_name("b", "plain")
    assert not (tmp_path / "none").exists()


@dataclass
class Registry:
    resolvers: dict[str, Any] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Any:
        return self.resolvers.keys()

    def register_resolver(self, name: str, resolver: Any) -> None:
        assert name not in self.resolvers
        self.resolvers[name] = resolver


def test_the_resolver_registers_once_and_returns_none_if_refused(base, shelf, monkeypatch, caplog):
    registry = Registry()
    for name, members in {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda name, number, path: (name, number, path)},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin.register()
    vllm_plugin.register()
    resolver = registry.resolvers["veneer"]
    name, number, path = asyncio.run(resolver.resolve_lora(base.name, "plain"))
    assert (name, number) == ("plain=plain@1", 1)
    assert Path(path, "adapter_config.json").is_file()
    for refused in ("dora", "../plain", "x" * 5000):
        assert asyncio.run(resolver.resolve_lora(base.name, refused)) is None
    assert "does not support DoRA" in caplog.text


def test_the_plug_in_imports_without_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"veneer": "veneer.serve.fleet.vllm_plugin:register"}
    missing = ["accelerate", "datasets", "diffusers", "fastapi", "uvicorn", "gguf", "peft", "prometheus_client"]
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys({missing}))
        import veneer.serve.fleet.vllm_plugin, veneer.serve.fleet.mixes
        import veneer.library.library, veneer.models.fingerprint
    """
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    code = "\n".join(line.strip() for line in code.splitlines())
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings)
    assert ran.returncode == 0, ran.stderr
