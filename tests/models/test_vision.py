"""Vision-language models give the same texts as transformers' `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.tiny_base import tiny_base_dir
from tests.tiny_vision import tiny_vision
from veneer.errors import BaseError, ConfigError, VeneerError
from veneer.models.loading import errors_only
from veneer.models.vision import INSTRUCTION, Description, VisionModel, load_vision


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def line(text: str) -> str:
    """Return the text on one line, as captions are written."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def same(own: Description, text: str) -> bool:
    """Return whether a description equals the text.

    If the description was cut, it must be the text's beginning, up to the end of a sentence."""
    whole = line(text)
    return own.text == whole != "" or (own.cut and whole.startswith(own.text) and own.text[-1] in ".!?")


def test_chat_model_gives_the_text_of_transformers(place: Path) -> None:
    folder = tiny_vision(place)
    found = load_vision(str(folder))
    with errors_only():
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        for seed, words in ((1, None), (2, "What colour is it?")):
            prompt = f"user: <image>{words or INSTRUCTION}assistant:"  # templates drop the line break after a tag
            inputs = processor(images=noise(seed), text=prompt, return_tensors="pt")
            made = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            own = found.describe(noise(seed), words, max_tokens=16)
            assert same(own, processor.decode(made, skip_special_tokens=True))
            assert own == found.describe(noise(seed), words, max_tokens=16), "the same every time"


@pytest.mark.parametrize(("family", "words"), [("blip", None), ("blip", "a picture of"), ("florence2", None)])
def test_vision_model_without_chat_template_uses_its_prompt(place: Path, family: str, words: str | None) -> None:
    folder = tiny_vision(place, family)
    with errors_only():
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        task = {"text": words or "<MORE_DETAILED_CAPTION>"} if words or family == "florence2" else {}
        inputs = processor(images=noise(3), return_tensors="pt", **task)
        said = processor.decode(
            model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True
        )
    assert same(load_vision(str(folder)).describe(noise(3), words, max_tokens=12), said)


def test_large_pictures_are_scaled_down_first(place: Path) -> None:
    large, small = noise(4, 2048, 1024), noise(4, 2048, 1024)
    small.thumbnail((1024, 1024))
    model = load_vision(str(tiny_vision(place)))
    assert model.describe(large, max_tokens=8) == model.describe(small, max_tokens=8)
    assert large.size == (2048, 1024), "the caller's picture stays"


class Says:
    """A fake model and processor that always output one text of `length` tokens."""

    def __init__(self, text: str, length: int) -> None:
        self.text, self.length = text, length
        self.config = type("Config", (), {"model_type": "says"})
        self.generation_config = type("Config", (), {"eos_token_id": [2]})

    def __call__(self, images: Any, return_tensors: str) -> transformers.BatchFeature:
        return transformers.BatchFeature({"pixel_values": torch.zeros(1)})

    def generate(self, **given: Any) -> torch.Tensor:
        return torch.full((1, self.length), 5)

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return self.text


@pytest.mark.parametrize(
    ("text", "length", "caption", "cut"),
    [
        ("A cat sits.\nOn a chair, in the", 8, "A cat sits.", True),
        ("A cat on a", 8, "A cat on a", True),
        (" A cat.\x1b[2J\u202e On a chair \n", 5, "A cat. [2J On a chair", False),
        ("", 3, "", False),
    ],
)
def test_a_caption_is_one_line_of_whole_sentences(text: str, length: int, caption: str, cut: bool) -> None:
    both = Says(text, length)
    model = VisionModel("says", both, both, torch.float32, torch.device("cpu"), "")
    found = model.describe(noise(1), max_tokens=8)
    assert (found.text, found.cut) == (caption, cut)


def test_unsupported_model_is_refused(place: Path, tmp_path: Path) -> None:
    def said(name: Path | str, **more: Any) -> str:
        with pytest.raises(VeneerError) as caught:
            load_vision(str(name), **more)
        return str(caught.value)

    assert "a 'llama' reads no pictures" in said(tiny_base_dir(tmp_path))
    assert "there is no base" in said(tmp_path / "nothing")
    assert "Qwen2.5-VL, SmolVLM" in said(tmp_path / "tiny-base")
    whole = tiny_vision(place)
    for missing, words in (("processor_config.json", "processor"), ("model.safetensors", "weights")):
        folder = tmp_path / missing
        shutil.copytree(whole, folder)
        (folder / missing).unlink()
        assert words in said(folder)
    remote = tmp_path / "remote"
    shutil.copytree(whole, remote)
    own = {"AutoConfig": "code.Mine", "AutoModelForImageTextToText": "c.M"}
    (remote / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": own}))
    (remote / "code.py").write_text("raise SystemExit('ran')")
    assert "cannot read the config" in said(remote)
    with pytest.raises(ConfigError):
        load_vision(str(whole), dtype="float7")
    with pytest.raises(BaseError, match="cannot describe this picture"):
        load_vision(str(tiny_vision(place, "florence2"))).describe(noise(1), "words and <MORE_DETAILED_CAPTION>")
