"""--engine auto as a function of the machine, and the flags and environment of a vLLM that veneer runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.http.toy import wait_for
from veneer.errors import ConfigError
from veneer.serve import guarded
from veneer.serve.engines import FoundVllm, Machine, check_flags, choose_engine, with_engine
from veneer.serve.settings import EngineSettings, FleetSettings, Preload, ServeSettings
from veneer.serve.vllm import vllm_environment


class Fake(Machine):
    def __init__(self, vllm: bool = True, gpus: int = 1, plugin: bool = True) -> None:
        self.vllm = FoundVllm("python", "0.32.0", plugin, frozenset({"LlamaForCausalLM"})) if vllm else None
        self.gpus = gpus


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def chosen(machine: Machine, outline: Path | None, problems: tuple[str, ...] = (), **more: object) -> tuple[str, str]:
    settings = ServeSettings("base", preload=(Preload("mine", "mine"),), **more)  # type: ignore[arg-type]
    return choose_engine(settings, machine, outline, lambda each: list(problems))


def test_vllm_is_chosen_on_a_gpu_if_it_can_serve_everything(llama: Path) -> None:
    assert chosen(Fake(), llama)[0] == "vllm"


@pytest.mark.parametrize(
    ("machine", "word"),
    [(Fake(vllm=False), "not installed"), (Fake(gpus=0), "no CUDA GPU"), (Fake(plugin=False), "vLLM's environment")],
)
def test_a_machine_without_vllm_or_gpu_gets_the_embedded_engine(llama: Path, machine: Machine, word: str) -> None:
    engine, why = chosen(machine, llama)
    assert engine == "embedded"
    assert word in why


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"quantize": "nf4"}, "--quantize"),
        ({"engine": EngineSettings(batch_invariant=True)}, "--batch-invariant"),
        ({"engine": EngineSettings(compute="int8")}, "--compute"),
        ({"folders": ("here",)}, "--allow-folder"),
        ({"problems": ("vLLM does not support DoRA",)}, "mine: vLLM does not support DoRA"),
    ],
)
def test_what_vllm_cannot_do_gets_the_embedded_engine(llama: Path, more: dict, word: str) -> None:
    engine, why = chosen(Fake(), llama, **more)
    assert engine == "embedded"
    assert word in why


def test_bases_that_vllm_cannot_serve_get_the_embedded_engine(tmp_path: Path) -> None:
    for name, text in {
        "other": '{"architectures": ["OtherForCausalLM"]}',
        "quantized": '{"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "model_index.json").write_text("{}")
    words = {"other": "OtherForCausalLM", "quantized": "quantized", "image": "image", "a.gguf": "GGUF"}
    for name, word in words.items():
        engine, why = chosen(Fake(), tmp_path / name)
        assert engine == "embedded"
        assert word in why


def test_the_first_line_says_which_engine_and_why() -> None:
    lines: list[str] = []
    settings = with_engine(ServeSettings("base"), lines.append, Fake(vllm=False))
    assert (settings.fleet.engine, settings.fleet.vllm_python) == ("embedded", "")
    assert lines == ["engine: embedded (vLLM is not installed)"]
    fleet = FleetSettings(vllm_flags=("--max-loras", "4"))
    with pytest.raises(ConfigError, match="flags after -- are for vLLM"):
        with_engine(ServeSettings("base", fleet=fleet), lines.append, Fake(vllm=False))


def test_the_settings_name_the_interpreter_that_was_found(llama: Path) -> None:
    settings = with_engine(ServeSettings(str(llama)), lambda line: None, Fake())
    assert (settings.fleet.engine, settings.fleet.vllm_python) == ("vllm", "python")


def test_an_unknown_engine_is_refused_before_a_line_names_it() -> None:
    lines: list[str] = []
    with pytest.raises(ConfigError, match="'vlm' is not an engine"):
        with_engine(ServeSettings("base", fleet=FleetSettings(engine="vlm")), lines.append, Fake())  # type: ignore[arg-type]
    assert not lines


@pytest.mark.parametrize(
    "flag",
    ["--port", "--port=1", "--served_model_name", "--enable-lora", "--api-key", "--model", "--hos=0.0.0.0", "--api"],
)
def test_flags_that_veneer_sets_are_refused_by_name(flag: str) -> None:
    check_flags(["--tensor-parallel-size", "8", "--max-loras=2", "-1", "--", "-tp", "2"])
    with pytest.raises(ConfigError, match=flag.partition("=")[0].replace("_", "-")):
        check_flags(["--tensor-parallel-size", "8", flag])


def documented() -> set[str]:
    """Return the environment variables of the reference page."""
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "environment.md"
    return set(re.findall(r"`(VENEER_[A-Z_]+)`", page.read_text(encoding="utf-8")))


def test_vllm_loads_the_plugin_and_learns_no_secret_of_the_server() -> None:
    needed = {"VENEER_LIBRARY", "VENEER_LIBRARY_INDEX", "VENEER_VLLM_CACHE", "VENEER_VLLM_PYTHON"}
    secrets = {name for name in documented() if re.search("KEY|TENANTS|_URL", name)}
    assert len(secrets) > 5
    before = {"VLLM_PLUGINS": "mine", **dict.fromkeys(secrets | needed, "postgresql://u:password@h/d")}
    environment = vllm_environment("/library", "key", before)
    assert environment["VLLM_PLUGINS"] == "mine,veneer"
    assert not secrets & environment.keys()
    assert needed <= environment.keys()
    assert "VLLM_PLUGINS" not in vllm_environment("/library", "key", {})


def test_a_guarded_command_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    """The command has a child of its own, as vLLM has; both must end."""
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    caller = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, {guarded.__file__!r}, sys.executable, "
        f"'-c', {command!r}], stdin=subprocess.PIPE, start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", caller])
    pid = int(wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), 60))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not running(pid), 60)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
