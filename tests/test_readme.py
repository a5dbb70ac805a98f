"""README and docs/: the examples run, commands parse, and links and paths exist."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str | None = None) -> list[str]:
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.S | re.M)
    return [body for name, body in found if language is None or name == language]


def commands(program: str) -> list[tuple[str, str]]:
    """Return (page, command line) for each `program …` in code, without comments and a final `&`."""
    out = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for body in blocks(text) for line in body.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in lines:
            line = re.sub(r"\s(#.*|&)$", "", line.strip().removeprefix("$ "))
            line = re.sub(r"^(\w+=\S+ )+", "", line).removeprefix(".venv/bin/")
            if line.startswith(f"{program} "):
                out.append((str(page.relative_to(ROOT)), line))
    return out


@cache
def program() -> Any:
    from veneer.cli import main

    return main.program()


@cache
def parse(line: str) -> list[str]:
    """Parse a command line without running it. Return the names of the command and its subcommands."""
    command, path = program(), []
    try:
        context = command.make_context("veneer", shlex.split(line)[1:])
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            path.append(str(name))
            context = command.make_context(name, rest, parent=context)
    except typer.Exit as end:  # --help
        path.append(str(end.exit_code))
    return path


def test_readme_starts_with_two_commands_and_a_short_example() -> None:
    first, second = blocks(README)[:2]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make quickstart", "make test"]
    assert second == blocks(README, "python")[0]
    assert len(second.split("\n\n")) == 2
    assert len([line for line in second.splitlines() if line]) <= 5


def roomy(base: Path) -> Path:
    """Make the tiny base's context long enough for a ticket. Rotary positions have no weights to change."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}), encoding="utf-8")
    return base


def small_config() -> str:
    """Return the configuration of the tickets example with 20 rows, so that it works in any folder."""
    tickets = ROOT / "examples" / "tickets"
    config = (tickets / "config.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("train.jsonl  ", f"{tickets / 'train.jsonl'}  "),
        ("split: 40", "split: 4\n  limit: 20"),
        ("max_length: 512", "max_length: 1024"),
    ):
        assert old in config
        config = config.replace(old, new)
    return config


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny_base import tiny_base_dir

    base = str(roomy(tiny_base_dir(tmp_path)))
    (tmp_path / "examples" / "tickets").mkdir(parents=True)
    config = small_config().replace("smollm2-135m", base)
    (tmp_path / "examples" / "tickets" / "config.yaml").write_text(config, encoding="utf-8")
    code = blocks(README, "python")[0].replace("smollm2-135m", base)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "first").is_dir()


def test_veneer_commands_in_the_docs_parse(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for page, line in commands("veneer"):
        filled = line.replace("[", "").replace("]", "").replace("…", "")
        filled = filled.replace("CONFIG.yaml", "examples/tickets/config.yaml")
        if "[" in line or "…" in line or len(shlex.split(filled)) == 1 or not re.search(r"[./\"-]", line):
            words = filled.split()[:2]
            line = " ".join([*words, "--help"]) if len(words) > 1 else ""
        try:
            if line:
                parse(line)
        except Exception as error:
            wrong.append(f"{page}: {line}: {error}")
    capsys.readouterr()  # discard the printed help pages
    assert not wrong, "\n".join(wrong)


def test_make_commands_in_the_docs_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for page, line in commands("make"):
        named = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
        assert named, f"{page}: {line}"
        assert set(named) <= targets, f"{page}: {line}"


def test_links_in_the_docs_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "#")):
                assert (page.parent / target.split("#")[0]).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_paths_in_the_docs_exist() -> None:
    named = re.compile(r"`((?:src|examples|tests|benchmarks|docs)(?:/[\w.-]+)*/?)`")
    for page in PAGES:
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.relative_to(ROOT)}: {path}"


RUNS = ["tickets/config", "reinforcement/tickets-format", "reinforcement/tickets", "reinforcement/chain-sum"]
RUNS += ["reinforcement/products", "distillation/smaller", "distillation/prompt"]


@pytest.mark.parametrize("name", RUNS)
def test_configurations_of_examples_are_read(name: str) -> None:
    from veneer.train.config.load import load_config

    config, _ = load_config(ROOT / "examples" / f"{name}.yaml")
    assert name != "tickets/config" or Path(config.data.files("train")[0]).is_file()
    assert (config.reinforcement.loss is not None) == name.startswith("reinforcement")
    assert (config.distillation.teacher is not None) == name.startswith("distillation")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_of_veneer_in_the_docs_exist(page: Path) -> None:
    import veneer

    called = set(re.findall(r"(?<![\w./-])veneer\.([a-z]\w*)\(", page.read_text(encoding="utf-8")))
    assert called <= {*veneer.__all__}
