"""Wrong settings are refused before the server listens or imports torch."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.cli.run import run
from tests.tiny_base import tiny_base_dir
from veneer.errors import ConfigError, VeneerError
from veneer.ops.quantization_formats import KINDS
from veneer.serve.build import build
from veneer.serve.checks import check_settings
from veneer.serve.settings import HttpSettings, Preload, QuantizeKind, ServeSettings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an-adapter").mkdir()
    (tmp_path / "folder" / "one").mkdir(parents=True)
    (tmp_path / "a-file").write_text("", encoding="utf-8")
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], base: str, *options: str) -> str:
    """Return the error output of `veneer serve`, which exits before it listens."""
    ran = run(capsys, "serve", "--base", base, *options, code=2)
    assert "listening" not in ran.err
    return ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "nf5"], "'nf5' is not a quantization | --quantize | did you mean nf4? Choose one of nf4, fp4"),
        (["--quantize", "NF4"], "'NF4' is not a quantization | did you mean nf4?"),
        (["--quantize", ""], "'' is not a quantization"),
        (["--compute", "int4"], "'int4' is not an arithmetic | --compute"),
        (["--dtype", "bfloat61"], "'bfloat61' is not a dtype | --dtype | did you mean bfloat16?"),
        (["--device", "cudda"], "'cudda' is not a device | --device | did you mean cuda?"),
        (["--device", "cuda:99"], "there is no CUDA device cuda:99"),
        (["--upstream", "there"], "'there' is not the URL of a server"),
        (["--upstream", "http://there"] * 2, "there can be only one --upstream"),
        (["--cache-memory", "lots"], "'lots' is not a size | --cache-memory"),
        (["--cache-memory", "0"], "'0' is too small | --cache-memory"),
        (["--adapter-memory", "-1G"], "'-1G' is not a size | --adapter-memory"),
        (["--adapter", "none-such"], "the library has no"),
        (["--adapter", "mine=./an-adapter"], "there is no adapter './an-adapter' | inside an --allow-folder"),
        (["--library", "a-file/inside"], "a-file"),
        (["--tenants", "nonsense://x"], "this is not an address of the tenants' database"),
        (["--tenants", "."], "the tenants' database cannot be opened"),
        (["--allowed-origin", "app.example.com"], "'app.example.com' is not a valid origin"),
        (["--allowed-origin", "https://*.example.com"], "'https://*.example.com' is not a valid origin"),
        (["--allowed-origin", "*"], "any web page could use this server | --api-keys"),
        (["--studio", "--host", "0.0.0.0"], "it needs a key | --api-keys or --tenants"),
        (["--admin-key", "sha256:12"], "the admin key's hash is not a SHA-256 digest"),
        (["--api-keys", "no-such-file"], "cannot read the keys"),
        (["stray"], "unexpected extra argument | stray"),
        (["--max-batch", "many"], "Invalid value for '--max-batch'"),
    ],
)
def test_bad_options_are_refused_before_listening(options, words, home, capsys):
    tiny_base_dir(home).rename(home / "base")
    said = " ".join(refusal(capsys, "./base", *options).replace("│", " ").split())
    assert all(part in said for part in words.split(" | ")), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mix_disk: 4M", "mix_disk applies to mixes in vLLM"),
        ("kv_replay: tcp://*:5558", "kv_replay repeats the messages of kv_events | set kv_events"),
        ("ledger_days: 3", "ledger_days applies to the ledger of tenants"),
        ("idle_seconds: .nan", "idle_seconds: Input should be a finite number"),
        ("drain_seconds: .inf", "drain_seconds: Input should be a finite number"),
        ("queue: 1", "queue: Input should be greater than or equal to 2"),
        ("mix_disk: lots", "'lots' is not a size"),
        ("queu: 4", "unknown key 'queu' | did you mean queue?"),
        ("queue: 4\nqueue: 5", "`queue` occurs twice, on lines 1 and 2"),
        ("[queue]", "expected"),
    ],
)
def test_bad_file_values_are_refused_before_listening(text, words, home, capsys):
    tiny_base_dir(home).rename(home / "base")
    (home / "server.yaml").write_text(text, encoding="utf-8")
    said = refusal(capsys, "./base", "--config", "server.yaml")
    assert all(part in said for part in words.split(" | ")), said


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("./nowhere", "there is no base './nowhere'"),
        ("an-adapter", "this directory has no config.json"),
        ("what is this?", "there is no base 'what is this?'"),
        ("", "the name of the base is empty"),
        ("somebody/no-such-base", "there is no base 'somebody/no-such-base' on this machine, and the hub cannot"),
        ("smolm2-135m", "did you mean smollm2-135m?"),
    ],
)
def test_a_missing_base_is_refused_before_listening(base: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(capsys, base)


def test_an_unknown_hub_base_is_refused_before_listening(home, capsys, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def answers(*_: object, **__: object) -> None:
        reply: Any = SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404", response=reply)

    monkeypatch.setattr("huggingface_hub.snapshot_download", answers)
    (home / "home" / "bases").mkdir(parents=True)
    tiny_base_dir(home).rename(home / "home" / "bases" / "some-base")
    for more in ([], ["--upstream", "http://there"]):
        said = refusal(capsys, "somebody/sme-base", *more)
        assert "there is no base 'somebody/sme-base'" in said
        assert "did you mean some-base" in said


def test_a_hub_base_is_checked_before_its_weights_are_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        wanted.append(allow_patterns)
        (home / "snap").mkdir(exist_ok=True)
        (home / "snap" / "model_index.json").write_text("{}")
        return str(home / "snap")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    check_settings(ServeSettings("somebody/pictures")).close()
    with pytest.raises(ConfigError, match=r"--quantize applies to text .* this server has an image base"):
        check_settings(ServeSettings("somebody/pictures", quantize="nf4"))
    assert not any("safetensors" in pattern for patterns in wanted for pattern in patterns)


def test_valid_and_unknown_settings_pass(home: Path) -> None:
    base = str(tiny_base_dir(home))
    for each in (
        ServeSettings(base),
        ServeSettings("smollm2-135m", quantize="keep"),  # a built-in base that must be created first
        ServeSettings(base, dtype="bf16", device="cpu"),
        ServeSettings(base, preload=(Preload("mine", "an-adapter"),), folders=(str(home),)),
        ServeSettings(
            base, keys=("a-key-of-the-test",), http=HttpSettings(allowed_origins=("null", "http://localhost:3000", "*"))
        ),
    ):
        check_settings(each).close()
    with pytest.raises(VeneerError):
        check_settings(ServeSettings(base, preload=(Preload("mine", "an-adapter"),)))


def test_the_default_tenant_database_is_checked_before_listening(home, capsys):
    tiny_base_dir(home).rename(home / "base")
    (home / "home").mkdir()
    (home / "home" / "tenants.sqlite").write_text("this is no database, " * 99, encoding="utf-8")
    assert "tenants.sqlite" in refusal(capsys, "./base")


def test_the_server_uses_the_stores_opened_by_checks(home: Path) -> None:
    asked = ServeSettings(str(tiny_base_dir(home)), tenants=str(home / "tenants.sqlite"), dtype="float32")
    opened = check_settings(asked)
    built = build(asked, lambda line: None, opened)
    assert built.service.tenancy.store is opened.store
    assert built.service.catalog.sources.library is opened.library
    asyncio.run(built.stop())
    opened.close()


def test_quantize_choices_equal_those_of_loading() -> None:
    assert get_args(QuantizeKind) == (*KINDS, "keep")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, json\nfrom veneer.serve.checks import check_settings\n"
        "from veneer.serve.settings import ServeSettings\ncheck_settings(ServeSettings('smollm2-135m')).close()\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
