"""Templates and styles: clickable elements keep their identity, and each class name has one meaning."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import veneer

FOLDER = Path(veneer.__file__).parent / "studio"
SHARED = ("the top", "texts", "layout", "things")
"""Sections of studio.css that apply to all views; each other section belongs to one view."""


@pytest.mark.parametrize("path", sorted((FOLDER / "templates").glob("*.j2")), ids=lambda path: path.stem)
def test_clickable_elements_have_an_id(path: Path) -> None:
    """Without an id, a redraw would lose a click or move the click to a neighboring element (fragment.js)."""
    for tag in re.findall(r"<(?:button|a)\b(?:\{[{%].*?[%}]\}|[^>])*>", path.read_text(encoding="utf-8")):
        assert "data-act=" not in tag or "data-id=" in tag, tag


def classes_by_section(css: str) -> dict[str, set[str]]:
    """Return section -> the classes that start the section's selectors. @media rules are left out."""
    sections: dict[str, set[str]] = {}
    rules_text = css[css.index("*/") :].partition("@media")[0]
    for title, rules in re.findall(r"/\*\s*(.*?)\s*\*/(.*?)(?=/\*|\Z)", rules_text, re.DOTALL):
        classes = sections.setdefault(title.partition(":")[0], set())
        for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", rules):
            for selector in re.sub(r"\([^()]*\)", "", selectors).split(","):
                classes |= set(re.findall(r"\.([\w-]+)", re.split(r"[\s>+~]", selector.strip())[0]))
    return sections


def test_views_share_no_class_name() -> None:
    css = "/* top */ /* texts */ .soft{} /* live: x */ .a .b, .c:is(.d, .e){} @media x {.q{}}"
    assert classes_by_section(css) == {"texts": {"soft"}, "live": {"a", "c"}}
    sections = classes_by_section((FOLDER / "studio.css").read_text(encoding="utf-8"))
    shared, users = set().union(*(sections[name] for name in SHARED)), defaultdict(list)
    for view in sections.keys() - set(SHARED):
        for name in sections[view] - shared:
            users[name].append(view)
    assert len(users) > 30
    twice = {name: views for name, views in users.items() if len(views) > 1}
    assert not twice, f"{twice}: prefix one with its view, or move the common rules to a shared section"
