"""The wheel can be built, is complete, and works in another environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("veneer-*.whl")
    return path


def test_wheel_has_package_types_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        licence = archive.read(next(n for n in names if n.endswith("licenses/LICENSE"))).decode()
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "veneer").rglob("*.py")}
    assert sources <= set(names)
    assert "veneer/py.typed" in names
    data = {
        str(p.relative_to(ROOT / "src")) for s in ("c", "j2", "safetensors") for p in (ROOT / "src").rglob(f"*.{s}")
    }
    assert data <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"veneer"}, "the wheel installs only veneer"
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "grant of copyright license" in licence.lower()


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel and this environment's dependencies, but without the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(elsewhere: Path, *command: str) -> str:
    argv = [str(elsewhere / "bin" / command[0]), *command[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=elsewhere, env={"HOME": str(elsewhere)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_imports_in_another_environment(elsewhere: Path) -> None:
    where = run(elsewhere, "python", "-c", "import veneer; print(veneer.__file__); veneer.attach; veneer.train_text")
    assert Path(where.strip()).is_relative_to(elsewhere)


def test_command_runs_in_another_environment(elsewhere: Path) -> None:
    for arguments in ([], ["train"], ["generate"], ["eval"], ["adapter"]):
        assert "Usage" in run(elsewhere, "veneer", *arguments, "--help")
