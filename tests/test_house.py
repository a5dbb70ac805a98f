"""Rules of the package.

Packages import only from lower layers, core needs only torch, code stays within line budgets, and veneer
starts fast.
"""

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
LAYERS = {"errors": 0, "compat": 1, "files": 2, "ops": 3, "core": 4, "formats": 5, "models": 5, "library": 6, "plan": 6}
LAYERS |= {"adapters": 7, "imaging": 8, "train": 9, "serve": 10, "jobs": 11, "api": 12, "studio": 13, "cli": 14}
"""A module imports only from its own package and from packages in lower layers."""

MODULES = sorted(PACKAGE.rglob("*.py"))


class Parsed(NamedTuple):
    """A file's imports, divisions and docstring.

    imports: (line, dotted name), including imports inside functions and TYPE_CHECKING blocks
    divisions: (line, numerator, denominator)
    """

    imports: tuple[tuple[int, str], ...]
    divisions: tuple[tuple[int, str, str], ...]
    docstring: str | None


@cache
def parse(path: Path) -> Parsed:
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
            assert node.level == 0, f"{path}:{node.lineno}: use an absolute import"
            imported += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return Parsed(tuple(imported), tuple(divisions), ast.get_docstring(tree))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(path: Path) -> tuple[tuple[int, str], ...]:
    return parse(path).imports


def package_of(path: Path) -> str:
    """Return the name of the package or module directly under veneer/ that contains a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=settings)


def test_imports_run_only_downward() -> None:
    wrong = []
    for path in MODULES:
        package = package_of(path)
        if package == "__init__":  # imports packages lazily, which test_import_veneer_is_immediate checks
            continue
        assert package in LAYERS, f"{package} has no layer: add one in this test, in CONTRIBUTING.md and docs/README.md"
        for line, name in imports(path):
            if name == "veneer" or not name.startswith("veneer."):
                continue
            other = name.split(".")[1]
            if other == package:
                continue
            assert other in LAYERS or other == "__version__", f"{path}:{line}: {name}"
            if LAYERS.get(other, 0) >= LAYERS[package]:
                wrong.append(f"{path}:{line}: {package} must not import {name}")
    assert not wrong, "\n".join(wrong)


def module_of(path: Path) -> str:
    return ".".join(("veneer", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_imports_have_no_cycles() -> None:
    """Imports inside functions and under TYPE_CHECKING also count."""
    known = {module_of(path) for path in MODULES} - {"veneer"}
    needs: dict[str, set[str]] = {}
    for path in MODULES:
        named = {name if name in known else name.rpartition(".")[0] for _, name in imports(path)}
        needs[module_of(path)] = (named & known) - {module_of(path)}
    del needs["veneer"]  # veneer/__init__.py re-exports names of other modules, and no module imports it
    while free := {m for m, others in needs.items() if not others & needs.keys()}:
        needs = {m: others for m, others in needs.items() if m not in free}
    assert not needs, {m: sorted(others & needs.keys()) for m, others in sorted(needs.items())}


PUBLIC_ELSEWHERE = {"_version": "of a torch tensor", "_replace": "of a named tuple"}
"""Names that look private here but are public in other libraries."""


def private_names() -> set[str]:
    """Return the names of all private functions, classes, variables and attributes of the package."""
    names = re.compile(r"(?:\b(?:def|class) |\b(?:self|cls)\.|^ *)(_[a-zA-Z]\w*)(?= *[:=(\[])", re.MULTILINE)
    return {name for path in MODULES for name in names.findall(text_of(path))} - PUBLIC_ELSEWHERE.keys()


USES = re.compile(
    r"""(?<!\bself)(?<!\bcls)\.(_[a-zA-Z]\w*)            # of a module or an object
    | \bfrom[ ]veneer[\w.]*[ ]import[ ](\([^)]*\)|.*)
    | (?:set|get|del)attr\([^"]{0,80}"(_\w+)"          # named to be set
    """,
    re.VERBOSE,
)


def test_tests_use_no_private_names() -> None:
    """Tests use only public behavior, so that internals can change.

    Checks imports, attributes and names to patch, including those inside strings, because a string can be
    code for another process.
    """
    private, used = private_names(), []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = text_of(path)
        for match in USES.finditer(text):
            if names := {word for part in match.groups("") for word in re.findall(r"\b_\w+", part)} & private:
                line = text.count("\n", 0, match.start()) + 1
                used.append(f"{path.relative_to(ROOT)}:{line}: {', '.join(sorted(names))}")
    assert not used, "\n".join(used)


def test_heavy_packages_are_imported_where_allowed() -> None:
    """Only the listed packages import transformers and other heavy libraries.

    No module imports peft, trl, vllm or unsloth, except that vllm_plugin.py imports vllm.
    """
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
            guest = top == "vllm" and path.name == "vllm_plugin.py"  # this file runs inside vLLM
            assert guest or top not in {"peft", "trl", "vllm", "unsloth"}, f"{path}:{line}: a peer is not a dependency"
            assert package_of(path) in allowed.get(top, {package_of(path)}), (
                f"{path}:{line}: {top} does not belong in {package_of(path)}"
            )


def test_core_needs_only_torch() -> None:
    names = [
        ".".join(("veneer", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in MODULES if package_of(p) == "core"
    ]
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


def test_only_public_modules_have_all() -> None:
    """Only public modules define `__all__`; other modules mark private names with an underscore."""
    modules = {str(p.relative_to(PACKAGE)) for p in MODULES if "__all__" in text_of(p)}
    assert modules == {"__init__.py", "api.py", "core/__init__.py"}


def test_the_public_surface_is_small() -> None:
    import veneer

    assert 8 <= len(veneer.__all__) <= 22
    assert set(veneer.__all__) <= set(dir(veneer))
    for name in veneer.__all__:
        assert getattr(veneer, name).__doc__, f"veneer.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        veneer.atach  # noqa: B018


def test_version_is_written_in_one_place() -> None:
    """The build reads `__version__`, which works without installed metadata."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in written["project"]
    assert written["tool"]["hatch"]["version"]["path"] == "src/veneer/__init__.py"
    ran = python("import veneer; print(veneer.__version__)", PYTHONPATH=str(PACKAGE.parent))
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", ran.stdout), ran.stderr


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
    ["--version", "--help", "train --help", "generate --help", "serve --help", "plan --help", "library add --help",
     "tenant key add --help"],
)  # fmt: skip
def test_help_is_fast_and_loads_no_torch(arguments: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = python(
        f"""
        import sys
        from veneer.cli.main import main
        sys.argv = ["veneer", *{arguments.split()!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        heavy = {{"torch", "numpy", "transformers", "datasets", "huggingface_hub", "sqlalchemy", "fastapi", "fsspec"}}
        heavy &= set(sys.modules)
        assert not heavy, heavy
        """
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1.5, f"{spent:.2f} s of processor time"  # takes about 0.3 s on an idle machine


LINES = {
    "files": 1_201, "core": 2_600, "ops": 4_005, "formats": 5_600, "models": 5_984, "library": 2_400, "plan": 1_400,
    "adapters": 1_289, "train": 13_683, "imaging": 1_100, "serve": 14_657, "jobs": 5_112, "studio": 3_100, "cli": 3_754,
}  # fmt: skip
"""Maximum lines of code per package, without blank lines, comments and docstrings.

An increase needs an issue.
"""


def code_lines(path: Path) -> int:
    """Return the number of lines of code in a file: lines that contain tokens other than comments."""
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


def test_each_package_stays_within_its_line_budget() -> None:
    counted = Counter[str]()
    for path in MODULES:
        counted[package_of(path)] += code_lines(path)
    over = {name: f"{counted[name]:,} of {most:,}" for name, most in LINES.items() if counted[name] > most}
    assert not over, over


def test_a_folder_has_at_most_forty_files() -> None:
    folders = Counter(path.parent for path in MODULES)
    assert not {str(folder): count for folder, count in folders.items() if count > 40}


def test_serve_stays_within_its_option_budget() -> None:
    from veneer.cli import serve

    options = [name for name in inspect.signature(serve.serve).parameters if name != "ctx"]
    assert len(options) <= 26, options


@pytest.mark.parametrize(
    ("module", "config", "most"), [("text", "TrainConfig", 121), ("image", "ImageTrainConfig", 109)]
)
def test_configurations_keep_their_budget_of_keys(module: str, config: str, most: int) -> None:
    sections = getattr(importlib.import_module(f"veneer.train.config.{module}"), config).model_fields.values()
    keys = sum(len(getattr(each.annotation, "model_fields", {0: 0})) for each in sections)
    assert keys <= most, keys


def test_scale_is_computed_in_one_function() -> None:
    """Only core.adapter.scale_of divides an alpha by a rank."""
    offenders = []
    for path in MODULES:
        for line, above, below in parse(path).divisions:
            if "alpha" in above and ("rank" in below or "sqrt" in below or below == "r"):
                offenders.append(f"{path.relative_to(PACKAGE)}:{line}")
    assert [o.split(":")[0] for o in offenders] == ["core/adapter.py"] * 2, offenders


def test_tests_mirror_the_package() -> None:
    """Every folder of tests corresponds to a package, and every package has tests."""
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("test_*.py"))}
    assert packages <= folders, f"no tests for {sorted(packages - folders)}"
    assert folders <= packages | {"attack", "examples", "benchmarks", "bases", "browser", "deploy"}, sorted(
        folders - packages
    )


def test_every_module_has_a_docstring() -> None:
    without = [str(p.relative_to(PACKAGE)) for p in MODULES if text_of(p).strip() and not parse(p).docstring]
    assert not without, "\n".join(without)


def test_no_public_name_equals_a_package() -> None:
    """Importing veneer.train makes `train` an attribute of veneer, which would hide a function with the same
    name."""
    import veneer

    packages = {package_of(path) for path in MODULES}
    assert not packages & set(veneer.__all__)


def test_environment_variables_are_documented() -> None:
    code = "\n".join(text_of(path) for path in MODULES)
    rows = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8").splitlines()
    documented = {
        name for row in rows if row.startswith("| `") for name in re.findall(r"`(VENEER_[A-Z_]+)`", row.split("|")[1])
    }
    assert documented == set(re.findall(r"""["'](VENEER_[A-Z_]+)["']""", code))
