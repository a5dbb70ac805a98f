"""A PNG contains veneer's record, and an infotext that A1111's rules can parse."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.image_twins import infotext_of, parse_as_a1111
from veneer.errors import DataError
from veneer.imaging.infotext import Infotext, png_bytes, read_record, render_infotext

VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Zs", "Cs")), max_size=20)
WORDS = st.from_regex(r"[a-zA-Z(][a-zA-Z0-9(), <>]{0,20}[a-z]", fullmatch=True)


@given(WORDS, WORDS, st.dictionaries(st.from_regex(r"[A-Z][a-z]{2,8}", fullmatch=True), VALUES, min_size=3, max_size=8))
def test_a1111_reads_back_what_is_rendered(prompt: str, negative: str, fields: dict[str, str]) -> None:
    found = parse_as_a1111(render_infotext(Infotext(prompt, negative, fields)))
    assert found == {"Prompt": prompt, "Negative prompt": negative} | fields


def test_png_carries_text_and_record(tmp_path: Path) -> None:
    picture, text = Image.new("RGB", (8, 8), "red"), "ein Füchslein 狐"
    record = {"version": 1, "rows": [{"prompt": text}]}
    data = png_bytes(picture, text, record)
    assert data == png_bytes(picture, text, record), "equal pictures are equal files"
    (tmp_path / "a.png").write_bytes(data)
    assert read_record(tmp_path / "a.png") == record
    assert infotext_of(tmp_path / "a.png") == text


def test_file_without_a_record_has_none(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2))
    (tmp_path / "a.png").write_bytes(png_bytes(picture, "x"))
    assert read_record(tmp_path / "a.png") is None
    (tmp_path / "a.png").write_bytes(png_bytes(picture, "x", []))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a JSON object"):
        read_record(tmp_path / "a.png")
