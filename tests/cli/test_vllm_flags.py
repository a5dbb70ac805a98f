"""`veneer serve` takes vLLM's flags, or names the setting to use instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import run
from veneer.cli.vllm_flags import from_vllm
from veneer.errors import ConfigError


def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Return the settings with which `veneer serve` would start a server."""
    from veneer.serve import server

    settings: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda asked, *_, **__: settings.append(asked))
    from veneer.cli.main import main

    monkeypatch.setattr("sys.argv", ["veneer", "serve", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return settings[0]


def test_the_arguments_of_kserve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """kserve puts these in front of the container's own: pkg/controller/v1alpha2/llmisvc/workload_lora.go."""
    folder = tmp_path / "support"
    folder.mkdir()
    names = ("support", "publishers/acme/models/support")
    words = ["--enable-lora", "--max-lora-rank=64", "--max-loras=2", "--max-cpu-loras=4", "--lora-modules"]
    words += ["'" + json.dumps({"name": name, "path": str(folder)}) + "'" for name in names]
    settings = started(monkeypatch, *words, "--model=/mnt/models", "--served-model-name=acme/base")
    assert (settings.base, settings.served_name) == ("/mnt/models", "acme/base")
    assert [(each.name, each.reference) for each in settings.preload] == [("support", str(folder))]
    assert settings.folders == (str(folder),)


def test_the_arguments_of_vllm_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["smollm2-135m", "--port", "8001", "--lora-modules", f"a={tmp_path}", "b=acme/b", "--max-lora-rank", "64"]
    settings = started(monkeypatch, *words)
    assert (settings.base, settings.port, settings.folders) == ("smollm2-135m", 8001, (str(tmp_path),))
    assert [each.name for each in settings.preload] == ["a", "b"]


def test_a_pods_address_is_an_accepted_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", "10.1.2.3")
    assert "10.1.2.3" in started(monkeypatch, "--base", "b").http.allowed_hosts
    monkeypatch.delenv("POD_IP")
    assert "" not in started(monkeypatch, "--base", "b").http.allowed_hosts


def test_port_8000_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = started(monkeypatch, "--model", "smollm2-135m", "--max_num_seqs", "7")
    assert (settings.base, settings.port, settings.engine.rows) == ("smollm2-135m", 8000, 7)


def test_ignored_flags_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(from_vllm(["--base", "b", "--max-loras", "8", "--enable-lora", "--open"])) == ["--base", "b", "--open"]
    said = capsys.readouterr()
    assert "--max-loras is ignored" in said.out + said.err
    assert "--adapter-memory" in said.out + said.err


@pytest.mark.parametrize(
    ("flags", "instead"),
    [
        ("--gpu-memory-utilization 0.9", "--cache-memory"),
        ("--gpu_memory_utilization=0.9", "--cache-memory"),
        ("--max-model-len 4096", "context"),
        ("--tensor-parallel-size 2", "--engine vllm"),
        ("--api-key secret-key", "--api-keys"),
        ("--trust-remote-code", "custom code"),
        ("--kv-events-config {}", "kv_events"),
        ("--ssl-keyfile k", "TLS"),
        ("--served-model-name a b", "keep one"),
        ("--lora-modules nonsense", "name=path"),
    ],
)
def test_other_flags_are_refused_by_name(capsys: pytest.CaptureFixture[str], flags: str, instead: str) -> None:
    ran = run(capsys, "serve", "--base", "b", *flags.split(), code=2)
    message = " ".join((ran.out + ran.err).split())
    assert flags.split()[0].partition("=")[0].replace("_", "-") in message
    assert instead in message
    assert "secret-key" not in message


def test_adapters_as_json() -> None:
    module = json.dumps({"name": "a", "path": "acme/a", "base_model_name": "b"})
    assert list(from_vllm(["--lora-modules", module, "b=acme/b"])) == ["--adapter", "a=acme/a", "--adapter", "b=acme/b"]


def test_arguments_for_vllm_itself_are_left_alone() -> None:
    words = ["--base", "b", "--", "--tensor-parallel-size", "8", "--max-loras", "4"]
    assert list(from_vllm(words)) == words
    with pytest.raises(ConfigError):
        list(from_vllm(words[3:]))
