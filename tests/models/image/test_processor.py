"""The processor for Qwen-Image-Edit's prompts gives the same inputs as transformers' processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_image_base import qwen_edit_pipeline, tiny_image_base
from veneer.errors import BaseError
from veneer.models.image.base import load_image
from veneer.models.image.processor import read_processor

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_image_base(tmp_path_factory.getbasetemp() / "image-bases", "qwen-edit-plus")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("sizes", [[(64, 64)], [(96, 40), (30, 70)], []])
def test_tokens_and_patches_equal_transformers(sizes: list[tuple[int, int]], place: Path) -> None:
    """Covers pictures of several sizes, prompts of different lengths, and no picture."""
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [f"{seen * len(sizes)}make it red", "a dog in the house"]
    given: dict[str, Any] = {"images": [noise(*size) for size in sizes] or None, "padding": True}
    ours = read_processor(place / "processor")(text=texts, return_tensors="pt", **given)
    theirs = qwen_edit_pipeline(place).processor(text=texts, return_tensors="pt", **given)
    assert {"input_ids", "attention_mask"} <= set(ours) <= set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert ours.get("image_grid_thw") is None or len(ours["image_grid_thw"]) == len(sizes)


def test_missing_processor_is_named(place: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(place, tmp_path / "torn"))
    (copy / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(BaseError, match="this component of the base cannot be read"):
        load_image(str(copy))
