"""A PNG's record reproduces the picture bit for bit; changed inputs are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.image_twins import infotext_of, levels, original, parse_as_a1111, random_adapter
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer.errors import AdapterError, DataError, MismatchError
from veneer.formats.convert import write
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.controls import parse_control
from veneer.imaging.generate import ImageRequest, Options, RecordedPicture, generate, image_requests
from veneer.imaging.infotext import png_bytes, read_record
from veneer.imaging.reproduce import read_recipe, reproduce
from veneer.library.library import open_library
from veneer.models.image.base import ImageBase, load_image


def pictures(base: ImageBase, requests: list[ImageRequest], **options: Any) -> list[RecordedPicture]:
    with ImagePipeline(base) as pipeline:
        return generate(pipeline, requests, Options(**({"steps": 3} | options)))


def again(base: ImageBase, path: Path, say: Callable[[str], None] | None = None, **how: Any) -> RecordedPicture:
    with ImagePipeline(base, say=say) as pipeline:
        return reproduce(pipeline, read_recipe(path), **how)


def uses(*specs: str) -> tuple[Any, ...]:
    return tuple(parse_use(spec) for spec in specs)


def test_infotext_can_be_parsed_by_a1111(base: ImageBase, tmp_path: Path) -> None:
    request = ImageRequest("a cat, red", "blue", 5, uses("brand.safetensors:0.8", "look.safetensors:0.5@text=0"))
    (made,) = pictures(base, [request], guidance=4.5, scheduler="dpm++2m-karras")
    made.save(tmp_path / "a.png")
    assert read_record(tmp_path / "a.png") == made.record
    found = parse_as_a1111(infotext_of(tmp_path / "a.png"))
    with ImagePipeline(base) as pipeline:
        hashes = [f"{name}: {pipeline.add(f'{name}.safetensors').autov3}" for name in ("brand", "look")]
    want = {"Prompt": "a cat, red <lora:brand:0.8> <lora:look:0:0.5>", "Negative prompt": "blue", "Steps": "3"}
    want |= {"Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "4.5", "Seed": "5", "Size": "32x32"}
    want |= {"Model": "tiny-sdxl", "Base fingerprint": base.fingerprint.removeprefix("sha256:")[:16]}
    want |= {"Lora hashes": ", ".join(hashes)}
    assert {key: found[key] for key in want} == want
    assert "Model hash" not in found, "a directory has none that A1111 or a hub could look up"


def test_model_hash_of_a_checkpoint_file_matches_a1111(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tiny_image_base(tmp_path_factory.getbasetemp(), "sdxl", full=True)
    file = tmp_path / "my.safetensors"
    save_file(original(load_image(str(folder))), file)
    (made,) = pictures(load_image(str(file), config=folder), [ImageRequest("a cat", seed=1)], steps=1)
    fields = parse_as_a1111(made.text)
    assert fields["Model hash"] == hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    assert fields["Model"] == "my"
    assert "Base fingerprint" not in fields


def test_picture_of_a_mixed_batch_is_reproduced_exactly(base: ImageBase, tmp_path: Path) -> None:
    requests = [
        ImageRequest("a cat", seed=1),
        ImageRequest("a dog", "blue", seed=9, uses=uses("brand.safetensors:0.8@down=0.3,steps=0-0.5")),
        ImageRequest("a tree", seed=2**40, uses=uses("look.safetensors:0.7", "brand.safetensors:-0.123456789")),
    ]
    for i, made in enumerate(pictures(base, requests, scheduler="euler-a", guidance=3.3)):
        made.save(tmp_path / f"{i}.png")
        assert again(base, tmp_path / f"{i}.png").png() == (tmp_path / f"{i}.png").read_bytes()


def test_input_pictures_must_be_the_same(base: ImageBase, tmp_path: Path) -> None:
    given, control = str(tmp_path / "in.png"), tiny_control(tmp_path, "sdxl")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(given)
    Image.new("L", (SIZE, SIZE), 255).save(tmp_path / "mask.png")
    how = {"mask": str(tmp_path / "mask.png"), "controls": (parse_control(f"edges@{control}={given}:0.7@0-0.5"),)}
    (made,) = pictures(base, [ImageRequest("a cat", seed=3)], image=given, denoise=0.8, **how)
    made.save(tmp_path / "a.png")
    assert "Denoising strength: 0.8" in made.text
    assert made.infotext.fields["ControlNet 0"].startswith("Module: none, Model: tiny-sdxl-canny, Weight: 0.7")
    assert again(base, tmp_path / "a.png").png() == made.png()
    Image.new("RGB", (SIZE, SIZE)).save(given)
    with pytest.raises(MismatchError, match="not the picture that was used originally"):
        again(base, tmp_path / "a.png")


def test_one_picture_of_a_batch_can_be_reproduced_with_changes(base: ImageBase, tmp_path: Path) -> None:
    made = pictures(base, image_requests(["a cat"], uses("brand.safetensors"), seed=4, count=2))
    made[1].save(tmp_path / "a.png")
    changed = again(base, tmp_path / "a.png", changes=lambda request, options: (replace(request, seed=4), options))
    assert levels(changed.image, made[0].image) <= 1
    assert changed.infotext.fields["Seed"] == "4"


def test_a_changed_adapter_is_refused_and_a_moved_one_is_found(
    base: ImageBase, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(files / "brand.safetensors", "mine.safetensors")
    (made,) = pictures(base, [ImageRequest("a cat", uses=uses("mine.safetensors:0.8"))])
    made.save("a.png")
    with open_library() as library:
        library.add("mine.safetensors", "kept")
    Path("mine.safetensors").unlink()
    found = again(base, Path("a.png"))
    assert levels(found.image, made.image) == 0
    assert next(iter(found.record["adapters"])).startswith("sha256:")
    write(random_adapter(base.model, 7), "mine.safetensors", to="kohya", family="sdxl")
    with pytest.raises(MismatchError, match="differs from the adapter used originally"):
        again(base, Path("a.png"))
    Path("mine.safetensors").unlink()
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(AdapterError, match="no adapter 'mine"):
        again(base, Path("a.png"))


def test_other_base_is_refused(base: ImageBase, tmp_path: Path) -> None:
    pictures(base, [ImageRequest("a cat")])[0].save(tmp_path / "a.png")
    other = load_image(str(tiny_image_base(tmp_path, "sd15")))
    with pytest.raises(MismatchError, match="another base") as caught:
        again(other, tmp_path / "a.png")
    assert base.fingerprint in str(caught.value)


def test_missing_or_damaged_record_is_refused(base: ImageBase, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(DataError, match="no record of how it was made"):
        read_recipe(path)
    (made,) = pictures(base, [ImageRequest("a cat")])
    assert json.loads(json.dumps(made.record)) == made.record
    for damage in ({"rows": None}, {"index": 5}, {"version": 2}, {"settings": {}}):
        path.write_bytes(png_bytes(made.image, made.text, made.record | damage))
        with pytest.raises(DataError):
            read_recipe(path)
    pictures(base, [ImageRequest("a cat")], image=Image.new("RGB", (SIZE, SIZE)))[0].save(path)
    with pytest.raises(DataError, match="in memory"):
        read_recipe(path)
