"""Templates: what can be chosen goes on being the same element when all is drawn anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import veneer

TEMPLATES = sorted((Path(veneer.__file__).parent / "studio" / "templates").glob("*.j2"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_whatever_can_be_clicked_has_an_id_of_its_own(path: Path) -> None:
    """Without one a click that has begun on it would be lost, or end on its neighbour (fragment.js)."""
    for tag in re.findall(r"<(?:button|a)\b(?:\{[{%].*?[%}]\}|[^>])*>", path.read_text(encoding="utf-8")):
        assert "data-act=" not in tag or "data-id=" in tag, tag
