"""Infotext: what A1111 and Forge wrote is understood, what we write is theirs, and a PNG carries it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from veneer.errors import DataError
from veneer.imaging.infotext import (
    SAMPLERS,
    Infotext,
    lora_hashes,
    lora_tags,
    parse_infotext,
    png_bytes,
    quote,
    read_picture,
    render_infotext,
    sampler_of,
    unquote,
)

A1111 = """girl with an artist's beret, determined, ((eyeshadow)),
second line: with a colon
Negative prompt: ugly, (((deformed))), [blurry]
and more
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b"""

FORGE = (
    "a cat <lora:brand:0.8> on a mat <lora:look:0.5:1>\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, "
    'Size: 1024x1024, Model hash: 1a2b3c4d5e, Model: "odd, name: 1", '
    'ControlNet 0: "Module: canny, Model: control_v11p [d14c016b], Weight: 0.7", '
    'Lora hashes: "brand: 0123456789ab, look: ba9876543210", Version: f2.0.1v1.10.1'
)


def test_what_a1111_wrote() -> None:
    info = parse_infotext(A1111)
    assert info.prompt == "girl with an artist's beret, determined, ((eyeshadow)),\nsecond line: with a colon"
    assert info.negative == "ugly, (((deformed))), [blurry]\nand more"
    fields = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Seed": "965400086"}
    assert info.fields == fields | {"Size": "512x768", "Model hash": "45dee52b"}
    assert info.size == (512, 768)
    assert sampler_of(info.fields) == "euler-a"


def test_what_forge_wrote() -> None:
    info = parse_infotext(FORGE)
    assert info.negative == ""
    assert info.fields["Model"] == "odd, name: 1"
    assert info.fields["ControlNet 0"] == "Module: canny, Model: control_v11p [d14c016b], Weight: 0.7"
    assert lora_hashes(info.fields) == {"brand": "0123456789ab", "look": "ba9876543210"}
    assert sampler_of(info.fields) == "dpm++2m-karras"
    assert lora_tags(info.prompt) == ("a cat on a mat", [("brand", 0.8, 0.8), ("look", 0.5, 1.0)])


def test_a_text_without_parameters_is_a_prompt() -> None:
    assert parse_infotext("just a prompt\nSteps: 20") == Infotext("just a prompt\nSteps: 20")
    assert parse_infotext("") == Infotext()


def test_samplers_by_old_and_new_names() -> None:
    assert sampler_of({"Sampler": "DPM++ 2M Karras"}) == "dpm++2m-karras"
    assert sampler_of({"Sampler": "Euler", "Schedule type": "Simple"}) == "euler"
    assert sampler_of({"Sampler": "Euler", "Schedule type": "Simple"}, flow=True) == "flow-euler"
    assert sampler_of({"Sampler": "Restart"}) is None
    assert sampler_of({"Sampler": "DDIM", "Schedule type": "Karras"}) is None, "another schedule is another picture"
    for ours, (name, kind) in SAMPLERS.items():
        assert sampler_of({"Sampler": name, "Schedule type": kind}, ours.startswith("flow-")) == ours


def test_tags_by_name_and_wrong_ones() -> None:
    assert lora_tags("<lora:a:te=0.3:unet=0.9> x <lyco:b>")[1] == [("a", 0.3, 0.9), ("b", 1.0, 1.0)]
    assert lora_tags("no tags, <b>") == ("no tags, <b>", [])
    with pytest.raises(DataError, match="no number"):
        lora_tags("<lora:a:much>")


VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Cs")), max_size=20)
WORDS = st.from_regex(r"[a-zA-Z(][a-zA-Z0-9(), <>]{0,20}[a-z]", fullmatch=True)


@given(VALUES)
def test_a_quoted_value_comes_back(value: str) -> None:
    assert unquote(quote(value)) == value


@given(WORDS, WORDS, st.dictionaries(st.from_regex(r"[A-Z][a-z]{2,8}", fullmatch=True), VALUES, min_size=3, max_size=8))
def test_an_infotext_comes_back(prompt: str, negative: str, fields: dict[str, str]) -> None:
    kept = {name: value.strip() for name, value in fields.items()}
    assert parse_infotext(render_infotext(Infotext(prompt, negative, kept))) == Infotext(prompt, negative, kept)


def test_a_png_carries_text_and_record(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    record = {"version": 1, "rows": [{"prompt": "ein Füchslein 狐"}]}
    data = png_bytes(picture, A1111 + " 狐", record)
    assert data == png_bytes(picture, A1111 + " 狐", record), "equal pictures are equal files"
    (tmp_path / "a.png").write_bytes(data)
    info, found = read_picture(tmp_path / "a.png")
    assert info == parse_infotext(A1111 + " 狐")
    assert found == record
    with Image.open(tmp_path / "a.png") as again:
        assert again.info["parameters"] == A1111 + " 狐"
        assert json.loads(again.info["veneer"]) == record


def test_a_jpeg_of_a1111_carries_it_in_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg") == (parse_infotext(A1111), None)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not one")
    with pytest.raises(DataError, match="not a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="no such picture"):
        read_picture(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(png_bytes(Image.new("RGB", (2, 2)), "x"))
    assert read_picture(tmp_path / "c.png") == (Infotext("x"), None)
