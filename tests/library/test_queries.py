"""Queries: filters, sort orders and facets; families; stored verification results."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.library.made import made, read_made
from veneer.errors import ConfigError
from veneer.library.database import reading
from veneer.library.library import Library
from veneer.library.maintenance import verify_library
from veneer.library.queries import Version, search


def fill(library: Library, folder: Path) -> list[Version]:
    """Add 24 versions under 16 names, with random cards and tags; return them."""
    draw, out = random.Random(7), []
    for n in range(24):
        metrics = {"validation_loss_before": 2.0, "validation_loss": draw.choice([1.0, 1.5, 2.5])} if n % 3 else {}
        card = {
            "base": draw.choice(["org/Small", "org/large"]),
            "kind": draw.choice(["text", "image"]),
            "rank": draw.choice([0, 4, 16]),
            "metrics": metrics,
        }
        file = made(folder / str(n), n, size=100 + 50 * draw.randrange(4), **card)
        tags = draw.sample(["a", "b", "c"], draw.randrange(3))
        out.append(library.add(file, f"{'acme/' * (n % 2)}n{n % 16}", tags=tags, describe=read_made).version)
    return out


def test_queries_in_one_transaction_see_the_same_state(library: Library, tmp_path: Path) -> None:
    version = library.add(made(tmp_path / "a", 1), "style", describe=read_made).version
    with reading(library.engine) as connection:
        before = search(connection)
        library.remove(version.reference)
        assert search(connection) == before == [version]
    assert library.search() == []


def test_browse_agrees_with_filters_in_python(library: Library, tmp_path: Path) -> None:
    """The reference filters, sorts and counts a list of all versions in Python."""
    fill(library, tmp_path)
    every = library.search(all_versions=True)
    latest = {v.name: v for v in every}.values()
    facets = {
        "base": lambda v: [v.base],
        "kind": lambda v: [v.kind],
        "rank": lambda v: [str(v.rank)],
        "tag": lambda v: v.tags,
        "health": lambda v: [v.health],
    }
    orders = {
        "name": lambda v: (),
        "gain": lambda v: (v.gain is None, v.gain or 0),
        "size": lambda v: -v.size,
        "rank": lambda v: -v.rank,
    }
    asked: list[dict[str, Any]] = [
        {},
        {"all_versions": True},
        {"base": "small"},
        {"kind": "image", "rank": 16},
        {"tags": ["a", "b"]},
        {"base": "org/large", "tags": ["c"]},
        {"rank": 0, "kind": "text"},
        {"health": "unknown"},
        {"health": "faulty"},
        {"name": "acme/", "kind": "text"},
        {"without": "a"},
        {"without": "b", "kind": "text"},
    ]

    def fits(v: Version, wanted: dict[str, Any], but: str = "") -> bool:
        of = {k: w for k, w in wanted.items() if k not in ("all_versions", but)}
        return (
            v.name.startswith(of.get("name", ""))
            and ("base" not in of or v.base.lower().endswith(of["base"]))
            and all(getattr(v, k) == of[k] for k in ("kind", "rank", "health") if k in of)
            and set(of.get("tags", ())) <= set(v.tags)
            and not any("without" in of and tag.startswith(of["without"]) for tag in v.tags)
        )

    for wanted in asked:
        pool = every if wanted.get("all_versions") else latest
        right = [v for v in pool if fits(v, wanted)]
        for order, key in orders.items():
            found = library.browse(order=order, **wanted)
            assert [v.reference for v in found.versions] == [
                v.reference for v in sorted(right, key=lambda v: (key(v), v.name, v.version))
            ], (wanted, order)
        assert found.total == len(right)
        for what, values in facets.items():
            counted = Counter(value for v in pool if fits(v, wanted, what) for value in values(v))
            assert found.facets[what] == counted, (wanted, what)
            assert list(found.facets[what].values()) == sorted(counted.values(), reverse=True)
    two = library.browse(order="size", limit=2, offset=1)
    assert (two.versions, two.total) == (library.browse(order="size").versions[1:3], len(latest))
    assert library.browse(limit=0, all_versions=True).total == len(every)


def test_sort_by_added_puts_the_newest_first(library: Library, tmp_path: Path) -> None:
    fill(library, tmp_path)
    when = [v.added for v in library.browse(order="added").versions]
    assert when == sorted(when, reverse=True)


def test_search_counts_only_visible_adapters(library: Library, tmp_path: Path) -> None:
    fill(library, tmp_path)

    def is_visible(reference: str) -> bool:
        return reference.startswith("acme/") and reference.endswith("@1")

    mine = [v for v in library.search() if is_visible(v.reference)]
    found = library.browse(can_access=is_visible)
    assert [v.reference for v in found.versions] == [v.reference for v in mine] != []
    assert (found.total, found.facets["kind"]) == (len(mine), Counter(v.kind for v in mine))
    assert library.browse("n", can_access=lambda reference: False).total == 0


def test_unknown_filter_values_list_the_known(library: Library) -> None:
    with pytest.raises(ConfigError, match=r"'best'[\s\S]*name, added, gain"):
        library.browse(order="best")
    with pytest.raises(ConfigError, match=r"'ill'[\s\S]*sound, faulty, unknown"):
        library.browse(health="ill")


def test_a_family_is_found_by_the_digests_in_cards(library: Library, tmp_path: Path) -> None:
    parent = library.add(made(tmp_path / "1", 1), "parent", describe=read_made).version
    gone = "sha256:" + "0" * 64
    file = made(tmp_path / "2", 2, parents=[parent.digest, gone])
    child = library.add(file, "child", describe=read_made).version
    other = library.add(made(tmp_path / "3", 3), "child", describe=read_made).version
    family = library.family("child@1").names()
    assert family == {
        "parents": [parent.reference],
        "unknown_parents": [gone],
        "children": [],
        "versions": [other.reference, child.reference],
    }
    assert library.family("parent").names()["children"] == ["child@1"]


def test_health_is_stored_until_the_next_verification(library: Library, tmp_path: Path) -> None:
    kept = [library.add(made(tmp_path / str(n), n), f"n{n}", describe=read_made).version for n in range(3)]
    assert {v.health for v in library.search()} == {"unknown"}
    (sha256, _), *_ = library.files(kept[1].entry).values()
    library.store.delete(f"blobs/{sha256[:2]}/{sha256}")
    verify_library(library)
    assert [library.find(v.reference).health for v in kept] == ["sound", "faulty", "sound"]
    assert library.browse().facets["health"] == {"sound": 2, "faulty": 1}
    assert [v.name for v in library.browse(health="faulty").versions] == ["n1"]
    (check,) = library.checks("n1")
    assert (check["name"], check["ok"]) == ("files", False)
    assert f"{sha256} is missing" in check["detail"]
    library.add(tmp_path / "1" / "a.safetensors", "n1", describe=read_made)
    verify_library(library)
    assert library.find("n1").health == "sound"
