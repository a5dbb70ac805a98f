"""The campaign benchmark measures and draws everything that its page lists.

In these tests, the pictures and the judge are random, because the real results take an hour to compute
(docs/image-proof.md)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scripts import script_module
from veneer.models.builtin import packaged_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("bases/catalogue", "benchmarks", "examples/campaign")
PARTS = ("product", "brand", "lens", "stack", "composition", "consistency", "openmoji")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield script_module(ROOT / "benchmarks" / "image_campaign.py")
    for name in set(sys.modules) - before:
        if any((ROOT / place / f"{name}.py").is_file() for place in SCRIPTS):
            del sys.modules[name]


@pytest.mark.parametrize("only", [PARTS[:1], pytest.param(PARTS, marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_requested_sides_are_measured_and_drawn(
    only: tuple[str, ...],
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from diffusers import AutoencoderKL
    from judge import Judge

    torch.manual_seed(0)
    torch.save(Judge().state_dict(), tmp_path / "judge.weights.pt")
    vae = AutoencoderKL.from_pretrained(packaged_folder() / "catalogue-flux" / "vae")
    denoiser = SimpleNamespace(config={"guidance_embeds": True})
    base = SimpleNamespace(name="catalogue-flux", prediction="flow", parts={"vae": vae}, denoiser=denoiser)
    noise = np.random.default_rng(0)

    def image(base: Any, prompts: str | list[str], **options: Any) -> list[Any]:
        wanted = [prompts] if isinstance(prompts, str) else prompts
        seeds = [options["seed"]] if isinstance(prompts, str) else options["seed"]
        assert len(seeds) == len(wanted)
        return [SimpleNamespace(image=Image.fromarray(noise.integers(0, 256, (128, 128, 3), np.uint8))) for _ in wanted]

    monkeypatch.setattr("veneer.load_image_base", lambda name: base)
    monkeypatch.setattr("veneer.image", image)
    runs, sheets = tmp_path / "runs" / "catalogue-flux", tmp_path / "sheets"
    sheets.mkdir()
    for role in ("product", "brand", "lens", "openmoji"):  # empty files stand for trained adapters
        (runs / role).mkdir(parents=True)
        (runs / role / "veneer.json").touch()
    for method in ("orthogonal", "ties"):
        (runs / f"{method}.safetensors").touch()
    given = [str(tmp_path), "--quick", "--json", "--runs", str(runs.parent), "--sheets", str(sheets), "--only", *only]
    monkeypatch.setattr(sys, "argv", ["image_campaign.py", *given])
    benchmark.main()
    result = json.loads(capsys.readouterr().out)
    for found in (result["rows"], result["bars"]):
        assert {row["name"].partition(":")[0] for row in found} == set(only)
    assert all(math.isfinite(row["value"]) for row in result["rows"])
    drawn = {f.stem.removeprefix("catalogue-flux-") for f in sheets.glob("*.webp")}
    sheeted = {*only} - {"consistency"}
    assert drawn == sheeted - {"composition"} | ({"composition-base", "composition-stack"} & drawn)
    assert ("composition" in only) == ("composition-stack" in drawn)
