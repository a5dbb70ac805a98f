"""A PNG says how it was made, and is made again to the bit; what made it must be the same."""

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
from safetensors.torch import load_file, save_file

from tests.image_twins import levels, original, random_adapter
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, DataError, MismatchError
from veneer.formats.convert import write
from veneer.imaging.adapters import ImagePipeline, parse_use
from veneer.imaging.controls import parse_control
from veneer.imaging.generate import ImageRequest, Options, RecordedPicture, asks_of, make
from veneer.imaging.infotext import Infotext, lora_hashes, parse_infotext, png_bytes, read_picture, render_infotext
from veneer.imaging.reproduce import read_recipe, remake
from veneer.library.library import open_library
from veneer.models.image.base import ImageBase, load_image


def pictures(base: ImageBase, asks: list[ImageRequest], **options: Any) -> list[RecordedPicture]:
    with ImagePipeline(base) as mixer:
        return make(mixer, asks, Options(**({"steps": 3} | options)))


def again(base: ImageBase, path: Path, said: Callable[[str], None] | None = None, **how: Any) -> RecordedPicture:
    with ImagePipeline(base, say=said) as mixer:
        return remake(mixer, read_recipe(path), **how)


def uses(*specs: str) -> tuple[Any, ...]:
    return tuple(parse_use(spec) for spec in specs)


def noise(path: Path) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_the_infotext_is_what_a1111_reads(base: ImageBase, tmp_path: Path) -> None:
    ask = ImageRequest("a cat, red", "blue", 5, uses("brand.safetensors:0.8", "look.safetensors:0.5@text=0"))
    (made,) = pictures(base, [ask], guidance=4.5, scheduler="dpm++2m-karras")
    made.save(tmp_path / "a.png")
    info, record = read_picture(tmp_path / "a.png")
    assert record == made.record
    assert info is not None
    assert info == made.infotext == parse_infotext(made.text)
    assert info.prompt == "a cat, red <lora:brand:0.8> <lora:look:0:0.5>"
    assert info.negative == "blue"
    want = {"Steps": "3", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "4.5", "Seed": "5"}
    want |= {"Size": "32x32", "Model": "tiny-sdxl"}
    want["Base fingerprint"] = base.fingerprint.removeprefix("sha256:")[:16]
    assert {key: info.fields[key] for key in want} == want
    assert "Model hash" not in info.fields, "a directory has none that A1111 or a hub could look up"
    with ImagePipeline(base) as mixer:
        hashes = {name: mixer.add(f"{name}.safetensors").autov3 for name in ("brand", "look")}
    assert lora_hashes(info.fields) == hashes
    assert all(len(h) == 12 for h in hashes.values())


def test_the_model_hash_of_a_checkpoint_file_is_a1111s(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ten digits of its sha256, by which a picture's text alone finds the base again."""
    folder = tiny_image_base(tmp_path_factory.getbasetemp(), "sdxl", full=True)
    file = tmp_path / "my.safetensors"
    save_file(original(load_image(str(folder))), file)
    base = load_image(str(file), config=folder)
    (made,) = pictures(base, [ImageRequest("a cat", seed=1)], steps=1)
    fields = parse_infotext(made.text).fields
    assert fields["Model hash"] == hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    assert fields["Model"] == "my"
    assert "Base fingerprint" not in fields
    (tmp_path / "a.png").write_bytes(png_bytes(made.image, made.text))
    said: list[str] = []
    again(base, tmp_path / "a.png", said.append)
    assert "does not show" not in "".join(said)
    again(load_image(str(folder)), tmp_path / "a.png", said.append)
    assert f"the model hash {fields['Model hash']}, which" in "".join(said)


def test_a_picture_is_made_again_to_the_bit(base: ImageBase, tmp_path: Path) -> None:
    """From a batch in which every picture has its own prompt, seed and mix."""
    asks = [
        ImageRequest("a cat", seed=1),
        ImageRequest("a dog", "blue", seed=9, uses=uses("brand.safetensors:0.8@down=0.3,steps=0-0.5")),
        ImageRequest("a tree", seed=2**40, uses=uses("look.safetensors:0.7", "brand.safetensors:-0.123456789")),
    ]
    for i, made in enumerate(pictures(base, asks, scheduler="euler-a", guidance=3.3)):
        made.save(tmp_path / f"{i}.png")
        found = again(base, tmp_path / f"{i}.png")
        assert found.png() == (tmp_path / f"{i}.png").read_bytes()


def test_with_its_pictures_and_controls(base: ImageBase, place: Path, tmp_path: Path) -> None:
    given, control = noise(tmp_path / "in.png"), tiny_control(tmp_path, "sdxl")
    Image.new("L", (SIZE, SIZE), 255).save(tmp_path / "mask.png")
    how = {"mask": str(tmp_path / "mask.png"), "controls": (parse_control(f"edges@{control}={given}:0.7@0-0.5"),)}
    made = pictures(base, [ImageRequest("a cat", seed=3)], image=given, denoise=0.8, **how)[0]
    made.save(tmp_path / "a.png")
    assert "Denoising strength: 0.8" in made.text
    assert made.infotext.fields["ControlNet 0"].startswith("Module: none, Model: tiny-sdxl-canny, Weight: 0.7")
    assert again(base, tmp_path / "a.png").png() == made.png()
    Image.new("RGB", (SIZE, SIZE)).save(given)
    with pytest.raises(MismatchError, match="not the picture that was used then"):
        again(base, tmp_path / "a.png")


def test_one_thing_changed(base: ImageBase, tmp_path: Path) -> None:
    made = pictures(base, asks_of(["a cat"], uses("brand.safetensors"), seed=4, count=2))
    made[1].save(tmp_path / "a.png")
    with_seed = again(base, tmp_path / "a.png", changes=lambda ask, options: (replace(ask, seed=4), options))
    assert levels(with_seed.image, made[0].image) <= 1
    assert with_seed.infotext.fields["Seed"] == "4"


def test_another_adapter_under_the_name_is_refused_and_a_moved_one_found(
    base: ImageBase, files: Path, brand: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(MismatchError, match="not the one that was used then"):
        again(base, Path("a.png"))
    Path("mine.safetensors").unlink()
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(AdapterError, match="no adapter 'mine"):
        again(base, Path("a.png"))


def test_another_base_is_refused(base: ImageBase, tmp_path: Path) -> None:
    (made,) = pictures(base, [ImageRequest("a cat")])
    made.save(tmp_path / "a.png")
    other = load_image(str(tiny_image_base(tmp_path, "sd15")))
    with pytest.raises(MismatchError, match="another base") as caught:
        again(other, tmp_path / "a.png")
    assert base.fingerprint in str(caught.value)


def test_a_text_of_a1111_is_taken_over(base: ImageBase, tmp_path: Path) -> None:
    with ImagePipeline(base) as mixer:
        right = mixer.add("brand.safetensors").autov3
    fields = {"Steps": "3", "Sampler": "Euler a", "CFG scale": "4", "Seed": "77", "Size": "32x32"}
    fields |= {"Model hash": "0123456789", "Clip skip": "2", "Lora hashes": f"brand: {right}"}
    text = Infotext("a cat (red:1.2) <lora:brand:0.5:0.8>", "blue", fields)

    def saved(info: Infotext) -> Path:
        path = tmp_path / "theirs.png"
        path.write_bytes(png_bytes(Image.new("RGB", (8, 8)), render_infotext(info)))
        return path

    said: list[str] = []
    found = again(base, saved(text), said.append)
    ask = ImageRequest("a cat (red:1.2)", "blue", 77, uses("brand.safetensors:0.8@text=0.625"))
    (ours,) = pictures(base, [ask], scheduler="euler-a", guidance=4.0)
    assert levels(found.image, ours.image) == 0
    heard = "\n".join(said)
    assert "Clip skip: 2" in heard
    assert "emphasis" in heard
    assert "0123456789" in heard
    assert "Base fingerprint" not in heard, "its hash is of a file, and is not held against ours"
    copy, states = tmp_path / "brand.safetensors", "ab" * 32
    save_file(load_file("brand.safetensors"), copy, {"sshs_model_hash": states})
    untrue = replace(text, prompt=f"a cat <lora:{copy.with_suffix('')}:0.5>")
    again(base, saved(replace(untrue, fields={**fields, "Lora hashes": f"{copy.with_suffix('')}: {states[:12]}"})))
    wrong = replace(text, fields={**fields, "Lora hashes": "brand: 000000000000"})
    with pytest.raises(MismatchError, match="not the one that was used then"):
        again(base, saved(wrong))


def test_what_says_nothing_or_nonsense(base: ImageBase, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(DataError, match="does not say"):
        read_recipe(path)
    (made,) = pictures(base, [ImageRequest("a cat")])
    for damage in ({"rows": None}, {"index": 5}, {"version": 2}, {"settings": {}}):
        path.write_bytes(png_bytes(made.image, made.text, made.record | damage))
        with pytest.raises(DataError):
            read_recipe(path)
    (in_memory,) = pictures(base, [ImageRequest("a cat")], image=Image.new("RGB", (SIZE, SIZE)))
    in_memory.save(path)
    with pytest.raises(DataError, match="in memory"):
        read_recipe(path)
    assert json.loads(json.dumps(made.record)) == made.record
