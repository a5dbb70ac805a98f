"""`veneer generate`: one prompt, several prompts, piped input, conversations, adapters, JSON."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_use import adapter_for
from tests.cli.run import run
from tests.tiny_base import tiny_base_dir
from veneer.formats import peft
from veneer.models.text import generate as engine
from veneer.models.text.base import TextBase, load_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_base_dir(tmp_path)


@pytest.fixture
def base(folder: Path) -> TextBase:
    return load_text(str(folder))


def chat_of(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"]
    return opening + [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def texts(base: TextBase, prompts: list[Any], **settings: Any) -> list[str]:
    return [completion.text for completion in engine.complete(base, prompts, **settings)]


def test_one_prompt_goes_through_the_chat_template(capsys: Any, folder: Path, base: TextBase) -> None:
    ran = run(capsys, "generate", "hi", "--base", str(folder), "-n", "12")
    assert ran.out == texts(base, [chat_of("hi")], max_new_tokens=12)[0] + "\n"
    assert "float32" in ran.err
    assert "stopped at 12 tokens" in ran.err
    raw = run(capsys, "generate", "hi", "--base", str(folder), "-n", "12", "--raw")
    assert raw.out == texts(base, ["hi"], max_new_tokens=12)[0] + "\n"


def test_the_answer_is_streamed(capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    real = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda s: writes.append(s) or real(s))
    ran = run(capsys, "generate", "hi", "--base", str(folder), "-n", "12")
    assert len([w for w in writes if w]) > 5
    assert "".join(writes) == ran.out


def test_system_and_sampling_options_reach_the_model(capsys: Any, folder: Path, base: TextBase) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 5, "max_new_tokens": 9}
    options = [x for k, v in how.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    ran = run(capsys, "generate", "hi", "--base", str(folder), "--system", "be kind", *options)
    assert ran.out == texts(base, [chat_of("hi", system="be kind")], **how)[0] + "\n"


def test_several_prompts_and_a_pipe_in_order(
    capsys: Any, folder: Path, base: TextBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "five\nsix\n")
    few = ["-n", "16", "--base", str(folder)]
    told = json.loads(run(capsys, "generate", "one", "two", "-", *few, "--json").out)
    prompts = ["one", "two", "five\nsix"]
    assert [r["prompt"] for r in told["results"]] == prompts
    assert [r["text"] for r in told["results"]] == texts(base, [chat_of(p) for p in prompts], max_new_tokens=16)
    assert told["base_fingerprint"] == base.fingerprint
    assert told["tokens"] == sum(r["tokens"] for r in told["results"])
    assert told["adapters"] == []
    plain = run(capsys, "generate", "one", "two", *few).out
    for r in told["results"][:2]:
        assert f"> {r['prompt']}\n{r['text']}\n" in plain


def test_piped_text_is_one_prompt(capsys: Any, folder: Path, base: TextBase, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "line one\nline two\n")
    ran = run(capsys, "generate", "--base", str(folder), "-n", "5")
    assert ran.out == texts(base, [chat_of("line one\nline two")], max_new_tokens=5)[0] + "\n"
    say(monkeypatch, "")
    assert "no prompt" in run(capsys, "generate", "--base", str(folder), code=2).err


def test_adapters_apply_strengths_and_select_their_base(
    capsys: Any, folder: Path, base: TextBase, tmp_path: Path
) -> None:
    from veneer.adapters.use import attach_adapters

    specs = [f"{tmp_path / 'a'}:0.5", str(tmp_path / "b")]
    for seed, name in enumerate("ab"):
        peft.write_folder(adapter_for(base, seed), tmp_path / name)
    with attach_adapters(base, specs):
        expected = texts(base, [chat_of("hi")], max_new_tokens=12)[0]
    ran = run(
        capsys, "generate", "hi", "-a", specs[0], "-a", specs[1], "-n", "12"
    )  # without --base, the adapter's base is used
    assert ran.out == expected + "\n"
    assert expected != texts(base, [chat_of("hi")], max_new_tokens=12)[0]
    assert f"base {folder}: the adapter's own" in ran.err
    assert "strength 0.5" in ran.err
    told = json.loads(run(capsys, "generate", "hi", "-a", specs[0], "-n", "12", "--json").out)
    (entry,) = told["adapters"]
    assert entry["strength"] == 0.5
    assert entry["digest"] == adapter_for(base, 0).digest()


def test_an_adapter_of_another_base_needs_an_option(capsys: Any, folder: Path, base: TextBase, tmp_path: Path) -> None:
    peft.write_folder(adapter_for(base, base_fingerprint="sha256:other"), tmp_path / "a")
    ask = ["generate", "hi", "--base", str(folder), "-a", str(tmp_path / "a"), "-n", "3"]
    ran = run(capsys, *ask, code=2)
    assert ran.out == ""
    assert "sha256:other" in ran.err
    assert base.fingerprint in ran.err
    run(capsys, *ask, "--allow-other-base")


def test_chat_keeps_the_conversation(
    capsys: Any, folder: Path, base: TextBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = engine.complete
    monkeypatch.setattr(engine, "complete", lambda b, p, **k: asked.append(p[0]) or real(b, p, **k))
    say(monkeypatch, "one\n\ntwo\n/undo\nthree\n/what\n/reset\nfour\n")
    ran = run(capsys, "generate", "--chat", "--base", str(folder), "-n", "4", "--system", "s")
    first = texts(base, [chat_of("one", system="s")], max_new_tokens=4)[0]
    assert asked[:4] == [
        chat_of("one", system="s"),
        chat_of("one", first, "two", system="s"),
        chat_of("one", first, "three", system="s"),
        chat_of("four", system="s"),
    ]
    assert ran.out.startswith("> " + first)
    assert ran.err.count("/reset") == 2


def test_a_long_chat_drops_its_oldest_turns_and_says_so(
    capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, ("tell me about the printer\n" * 8) + "/quit\n")
    ran = run(capsys, "generate", "--chat", "--base", str(folder), "-n", "8")
    assert "the context is full" in ran.err
    assert "error" not in ran.err


def test_ctrl_c_stops_an_answer_and_not_the_chat(capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = engine.complete

    def interrupted(b: Any, p: Any, **k: Any) -> Any:
        calls.append(p[0])
        if len(calls) == 1:
            k["on_token"](0, "half")
            raise KeyboardInterrupt
        return real(b, p, **k)

    monkeypatch.setattr(engine, "complete", interrupted)
    say(monkeypatch, "one\ntwo\n")
    run(capsys, "generate", "--chat", "--base", str(folder), "-n", "3")
    assert calls == [chat_of("one"), chat_of("two")]  # the stopped completion is not part of the conversation


@pytest.mark.parametrize(
    "options",
    [
        ["--chat", "hi"],
        ["hi", "--raw", "--system", "s"],
        ["hi", "--temperature", "-1"],
        ["hi", "--dtype", "int3"],
        ["hi", "-a", "nothing"],
        ["hi", "-a", "x:inf"],
    ],
)
def test_impossible_options_are_refused(capsys: Any, folder: Path, options: list[str]) -> None:
    ran = run(capsys, "generate", "--base", str(folder), *options, code=2)
    assert ran.out == ""
    assert "error: " in ran.err
    assert "Traceback" not in ran.err


def test_a_nonfinite_result_names_its_adapter(capsys: Any, folder: Path, base: TextBase, tmp_path: Path) -> None:
    adapter = adapter_for(base)
    for pair in adapter.pairs.values():
        pair.B.mul_(1e36)  # valid in float32, but its products overflow
    peft.write_folder(adapter, tmp_path / "loud")
    asked = ("generate", "hi", "--base", str(folder), "-n", "4", "--adapter")
    for spec, words in {
        f"{tmp_path}/loud:9000": ["no token has a finite score under", "/loud:9000", "lower strengths"],
        f"{tmp_path}/loud:1e200": ["the strength of", "/loud' is 1e+200", "from -10000 to 10000"],
    }.items():
        for more in ([], ["--json"], ["--temperature", "1"]):
            ran = run(capsys, *asked, spec, *more, code=2)
            assert ran.out == ""
            assert all(word in ran.err for word in words), ran.err
