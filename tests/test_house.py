"""The house: imports run downward, core needs torch alone, the scale has one home, start-up is fast."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import re
import resource
import subprocess
import sys
import textwrap
import tokenize
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "veneer"
FLOORS = {"errors": 0, "compat": 1, "files": 2, "ops": 3, "core": 4, "formats": 5, "models": 5, "library": 6, "plan": 6}
FLOORS |= {"adapters": 7, "train": 8, "imaging": 8, "serve": 9, "jobs": 10, "api": 11, "studio": 12, "cli": 13}
"""A module may import from its own folder and from lower floors. Neighbours on one floor do not know each other."""

MODULES = sorted(PACKAGE.rglob("*.py"))


class Found(NamedTuple):
    """What one walk over a file finds. `imports`: (line, dotted name), those inside functions and TYPE_CHECKING blocks
    included. `divisions`: (line, above, below)."""

    imports: tuple[tuple[int, str], ...]
    divisions: tuple[tuple[int, str, str], ...]
    docstring: str | None


@cache
def found(path: Path) -> Found:
    tree = ast.parse(text_of(path))
    imported: list[tuple[int, str]] = []
    divisions: list[tuple[int, str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Div):
                divisions.append((node.lineno, ast.unparse(node.left).lower(), ast.unparse(node.right).lower()))
        elif isinstance(node, ast.Import):
            imported += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            imported += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return Found(tuple(imported), tuple(divisions), ast.get_docstring(tree))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(path: Path) -> tuple[tuple[int, str], ...]:
    return found(path).imports


def room(path: Path) -> str:
    """The folder, or the module, directly under veneer/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=settings)


def test_imports_run_only_downward() -> None:
    wrong = []
    for path in MODULES:
        own = room(path)
        if own == "__init__":  # the public surface names all floors, lazily; test_import_veneer_is_immediate holds that
            continue
        assert own in FLOORS, f"{own} has no floor: give it one in this test, in CONTRIBUTING.md and docs/README.md"
        for line, name in imports(path):
            if name == "veneer" or not name.startswith("veneer."):
                continue
            other = name.split(".")[1]
            if other == own:
                continue
            assert other in FLOORS or other == "__version__", f"{path}:{line}: {name}"
            if FLOORS.get(other, 0) >= FLOORS[own]:
                wrong.append(f"{path}:{line}: {own} must not import {name}")
    assert not wrong, "\n".join(wrong)


def module_of(path: Path) -> str:
    return ".".join(("veneer", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and under TYPE_CHECKING counted."""
    known = {module_of(path) for path in MODULES} - {"veneer"}
    needs: dict[str, set[str]] = {}
    for path in MODULES:
        named = {name if name in known else name.rpartition(".")[0] for _, name in imports(path)}
        needs[module_of(path)] = (named & known) - {module_of(path)}
    del needs["veneer"]  # hands on what others define, and nobody imports it
    while free := {m for m, others in needs.items() if not others & needs.keys()}:
        needs = {m: others for m, others in needs.items() if m not in free}
    assert not needs, {m: sorted(others & needs.keys()) for m, others in sorted(needs.items())}


NOT_OURS = {"_version": "of a tensor, torch's", "_replace": "of a named tuple"}
"""Names that private things of ours have too, by which tests mean others'."""


def private_names() -> set[str]:
    """Every private function, class, variable of a module and attribute of an object that the package defines."""
    names = re.compile(r"(?:\b(?:def|class) |\b(?:self|cls)\.|^ *)(_[a-zA-Z]\w*)(?= *[:=(\[])", re.MULTILINE)
    return {name for path in MODULES for name in names.findall(text_of(path))} - NOT_OURS.keys()


TAKEN = re.compile(
    r"""(?<!\bself)(?<!\bcls)\.(_[a-zA-Z]\w*)            # of a module or an object
    | \bfrom[ ]veneer[\w.]*[ ]import[ ](\([^)]*\)|.*)
    | (?:set|get|del)attr\([^"]{0,80}"(_\w+)"          # named to be set
    """,
    re.VERBOSE,
)


def test_tests_use_no_name_that_begins_with_an_underscore() -> None:
    """They hold what others may rely on, so that the inside can be built anew under them. What they import of this
    project, reach through a module or an object, or name to be set; also in a text, which may be code for another
    process or the place of a patch."""
    ours, taken = private_names(), []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = text_of(path)
        for match in TAKEN.finditer(text):
            if names := {word for part in match.groups("") for word in re.findall(r"\b_\w+", part)} & ours:
                line = text.count("\n", 0, match.start()) + 1
                taken.append(f"{path.relative_to(ROOT)}:{line}: {', '.join(sorted(names))}")
    assert not taken, "\n".join(taken)


def test_a_heavy_package_is_imported_only_where_it_belongs() -> None:
    """transformers is known to models (and to train for its types); peers are never imported."""
    allowed = {
        "transformers": {"models", "train"},
        "datasets": {"train"},
        "gguf": {"files", "formats", "models", "ops"},
    }
    allowed |= {"typer": {"cli"}, "rich": {"cli", "train"}, "pydantic": {"train", "serve", "jobs"}}
    allowed |= {
        "sqlalchemy": {"library", "serve", "jobs"},
        "fsspec": {"library"},
        "diffusers": {"models"},
        "cv2": {"imaging"},
        "nicegui": {"studio"},
    }
    for path in MODULES:
        for line, name in imports(path):
            top = name.split(".")[0]
            guest = top == "vllm" and path.name == "vllm_plugin.py"  # runs inside vLLM, when vLLM imports it
            assert guest or top not in {"peft", "trl", "vllm", "unsloth"}, f"{path}:{line}: a peer is not a dependency"
            assert room(path) in allowed.get(top, {room(path)}), f"{path}:{line}: {top} does not belong in {room(path)}"


def test_core_needs_torch_alone() -> None:
    names = [".".join(("veneer", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in MODULES if room(p) == "core"]
    names = [name.removesuffix(".__init__") for name in names]
    ran = python(
        f"""
        import sys
        third_party = set(
            "transformers datasets safetensors huggingface_hub pydantic yaml typer rich gguf jinja2 psutil peft".split()
        )
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in third_party:
                    raise ImportError("core must not need " + name)
        sys.meta_path.insert(0, Refuse())
        import importlib
        for name in {names!r}:
            importlib.import_module(name)
        """
    )
    assert ran.returncode == 0, ran.stderr


def test_every_module_can_be_imported() -> None:
    for path in MODULES:
        if path.name != "__main__.py":
            importlib.import_module(module_of(path))


def test_only_the_front_doors_list_their_names() -> None:
    """`__all__` stands where people import from; elsewhere an underscore says what is not for others."""
    doors = {str(p.relative_to(PACKAGE)) for p in MODULES if "__all__" in text_of(p)}
    assert doors == {"__init__.py", "api.py", "core/__init__.py"}


def test_the_public_surface_is_small() -> None:
    import veneer

    assert 8 <= len(veneer.__all__) <= 22
    assert set(veneer.__all__) <= set(dir(veneer))
    for name in veneer.__all__:
        assert getattr(veneer, name).__doc__, f"veneer.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        veneer.atach  # noqa: B018


def test_version_is_the_same_everywhere() -> None:
    import veneer

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert veneer.__version__ == project["version"]


def test_import_veneer_is_immediate() -> None:
    ran = python(
        """
        import sys, veneer
        heavy = {"torch", "transformers", "datasets", "pydantic", "rich", "typer", "yaml"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["generate", "--help"], ["serve", "--help"], ["plan", "--help"], ["--version"]],
)
def test_help_is_fast_and_loads_no_torch(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = python(
        f"""
        import sys
        from veneer.cli.main import main
        sys.argv = ["veneer", *{arguments!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        heavy = {{"torch", "transformers", "datasets"}} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1.5, (
        f"{spent:.2f} s of processor time"
    )  # about 0.3 s alone; a busy machine and a cold disk add to it


LINES = {
    "files": 1_150, "ops": 3_850, "core": 2_800, "formats": 6_200, "models": 6_500, "library": 2_450, "plan": 2_000,
    "adapters": 1_200, "train": 16_100, "imaging": 1_150, "serve": 13_700, "jobs": 6_800, "studio": 4_050, "cli": 4_200,
}  # fmt: skip
"""Budgets: lines of code of each package, without blank lines, comments and docstrings. Only an issue raises one."""


def code_lines(path: Path) -> int:
    """The lines of a file that have code, counted by tokens."""
    text, documented = text_of(path), set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documented.update(range(first.lineno, (first.end_lineno or 0) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_each_package_keeps_its_budget_of_lines() -> None:
    counted = Counter[str]()
    for path in MODULES:
        counted[room(path)] += code_lines(path)
    over = {name: f"{counted[name]:,} of {most:,}" for name, most in LINES.items() if counted[name] > most}
    assert not over, over


def test_a_folder_has_at_most_forty_files() -> None:
    folders = Counter(path.parent for path in MODULES)
    assert not {str(folder): count for folder, count in folders.items() if count > 40}


def test_serve_keeps_its_budget_of_options() -> None:
    from veneer.cli import serve

    options = [name for name in inspect.signature(serve.serve).parameters if name != "ctx"]
    assert len(options) <= 24, options


@pytest.mark.parametrize(
    ("module", "config", "most"), [("text", "TrainConfig", 122), ("image", "ImageTrainConfig", 116)]
)
def test_configurations_keep_their_budget_of_keys(module: str, config: str, most: int) -> None:
    sections = getattr(importlib.import_module(f"veneer.train.config.{module}"), config).model_fields.values()
    keys = sum(len(getattr(each.annotation, "model_fields", {0: 0})) for each in sections)
    assert keys <= most, keys


def test_scale_is_computed_in_one_place() -> None:
    """Nobody divides an alpha by a rank but core.adapter.scale_of."""
    offenders = []
    for path in MODULES:
        for line, above, below in found(path).divisions:
            if "alpha" in above and ("rank" in below or "sqrt" in below or below == "r"):
                offenders.append(f"{path.relative_to(PACKAGE)}:{line}")
    assert [o.split(":")[0] for o in offenders] == ["core/adapter.py"] * 2, offenders


def test_tests_mirror_the_package() -> None:
    """Every folder of tests belongs to a room of the house, and every room has tests."""
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("test_*.py"))}
    assert rooms <= folders, f"no tests for {sorted(rooms - folders)}"
    assert folders <= rooms | {"attack", "examples", "benchmarks", "bases", "browser"}, sorted(folders - rooms)


def test_every_module_says_what_it_is() -> None:
    without = [str(p.relative_to(PACKAGE)) for p in MODULES if text_of(p).strip() and not found(p).docstring]
    assert not without, "\n".join(without)


def test_no_public_name_is_hidden_by_a_room() -> None:
    """Importing veneer.train makes `train` an attribute of veneer: a function of that name would vanish."""
    import veneer

    rooms = {room(path) for path in MODULES}
    assert not rooms & set(veneer.__all__)


def test_every_variable_of_the_environment_has_its_line_in_the_page() -> None:
    code = "\n".join(text_of(path) for path in MODULES)
    rows = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8").splitlines()
    told = {
        name for row in rows if row.startswith("| `") for name in re.findall(r"`(VENEER_[A-Z_]+)`", row.split("|")[1])
    }
    assert told == set(re.findall(r"""["'](VENEER_[A-Z_]+)["']""", code))
