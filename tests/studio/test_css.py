"""The looks: a class means one thing, whichever view has it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import veneer

CSS = (Path(veneer.__file__).parent / "studio" / "studio.css").read_text(encoding="utf-8")
SHARED = ("the top", "texts", "layout", "things")
"""Parts of the file that are for all views; each of the others is a view's."""


def parts_of(css: str) -> dict[str, set[str]]:
    """Part -> the classes that its rules begin with, but for those of narrow windows, which mend what is there."""
    found: dict[str, set[str]] = {}
    whole = css[css.index("*/") :].partition("@media")[0]
    for title, rules in re.findall(r"/\*\s*(.*?)\s*\*/(.*?)(?=/\*|\Z)", whole, re.DOTALL):
        begins = found.setdefault(title.partition(":")[0], set())
        for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", rules):
            for selector in re.sub(r"\([^()]*\)", "", selectors).split(","):
                begins |= set(re.findall(r"\.([\w-]+)", re.split(r"[\s>+~]", selector.strip())[0]))
    return found


def test_no_two_views_have_a_class_of_the_same_name() -> None:
    parts = parts_of(CSS)
    assert set(SHARED) < set(parts)
    shared, used = set().union(*(parts[name] for name in SHARED)), defaultdict(list)
    for view in parts.keys() - set(SHARED):
        for name in parts[view] - shared:
            used[name].append(view)
    assert len(used) > 40
    twice = {name: views for name, views in used.items() if len(views) > 1}
    assert not twice, f"{twice}: prefix one with its view, or move what both mean to the parts for all"


def test_a_class_that_two_views_begin_is_found() -> None:
    found = parts_of("/* top */ /* texts */ .soft{} /* live: x */ .a .b, .c:is(.d, .e){} @media x {.q{}}")
    assert found == {"texts": {"soft"}, "live": {"a", "c"}}
