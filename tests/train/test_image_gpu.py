"""Image runs on a GPU: behavior that a CPU does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny_pictures import run
from veneer.formats.read import read
from veneer.train.events import Event, Note

pytestmark = pytest.mark.gpu


def _run(folder: Path, name: str, **sections: Any) -> tuple[Any, str]:
    seen: list[Event] = []
    steady = {"schedule": {"steps": 3}, "adapter": {"rank": 4, "dropout": 0.0}}
    result = run(folder, folder / name, on_event=seen.append, **steady, **sections)
    return result, " ".join(e.text for e in seen if isinstance(e, Note))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base_trains(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.tiny_image_base import tiny_image_base

    base = {"name": str(tiny_image_base(tmp_path, "flux1")), "quantize": kind, "dtype": "bfloat16", "device": "cuda"}
    result, said = _run(tmp_path, "out", base=base)
    assert "read back and compared: predictions equal" in said
    assert all(pair.B.any() for pair in read(Path(result.adapter)).adapter.pairs.values())


def test_offloading_changes_no_result(tmp_path: Path) -> None:
    """Generating sheets fetches the encoders and the VAE from the CPU. The adapter equals that of a run without
    sheets."""
    samples = {"prompts": ["sks, a red house"], "every": 1, "steps": 1}
    first, said = _run(tmp_path, "sheets", samples=samples)
    assert "wait on the CPU between sheets" in said
    assert len(first.samples) == 4
    plain, _ = _run(tmp_path, "plain")
    away, said = _run(tmp_path, "away", memory={"offload_blocks": 2})
    assert "of frozen weights stay on the CPU" in said
    for other in (plain, away):
        for name, pair in read(Path(first.adapter)).adapter.pairs.items():
            assert (pair.B - read(Path(other.adapter)).adapter.pairs[name].B).abs().max() < 1e-4
