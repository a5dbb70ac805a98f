"""Names on a server: resolution, visibility, and refusals before a load."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import event, update

from tests.serve.saved_adapters import Make, of, reason, refused, saved
from veneer.formats import peft
from veneer.library.database import write_transaction
from veneer.library.index import versions
from veneer.library.library import Library
from veneer.models.text.base import TextBase
from veneer.serve.names.adapter_cache import Lease
from veneer.serve.principal import Principal
from veneer.serve.request import Refused
from veneer.serve.tenancy.store import pattern_matcher

OPERATOR = Principal("operator")

# -- names -----------------------------------------------------------------------------------------------------------


def test_the_base_resolves_by_its_name(make: Make) -> None:
    catalog = make()
    for word in ("", "tiny", "tiny:", "tiny:tiny"):
        served = catalog.resolve(word, OPERATOR)
        assert (served.mix, served.name, served.target) == ((), word or "tiny", "tiny")
    assert [(c.id, c.parent) for c in catalog.models(OPERATOR)] == [("tiny", None)]
    assert catalog.resolve_mix([], OPERATOR).mix == ()


def test_a_loaded_name(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "a")
    catalog = make()
    card = catalog.load("support", "a")
    assert (card.id, card.root, card.parent, card.digest) == ("support", "a", "tiny", digest)
    for word in ("support", "tiny:support"):
        served = catalog.resolve(word, OPERATOR)
        assert (served.mix, served.name, served.target) == (of(digest), word, "support")
    assert catalog.models(OPERATOR)[1] == card
    assert list(catalog.residents.resident()) == [digest]


def test_names_of_fine_tuned_models(make: Make, base: TextBase, folder: Path, library: Library) -> None:
    """A name consists of the base, namespace and id; permissions are checked with the library's name."""
    first, last = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    library.add(folder / "a", "acme/support-kq7vz2mh")
    library.alias("acme/support-kq7vz2mh@1", "ckpt-step-40")
    library.add(folder / "b", "acme/support-kq7vz2mh")
    catalog, acme = make(), Principal("tenant", "acme", pattern_matcher(["acme/*"]))
    other = Principal("tenant", "globex", pattern_matcher(["globex/*", "ft:*"]))
    name = "ft:tiny:acme:support:kq7vz2mh"
    for word, digest in ((name, last), (f"{name}:ckpt-step-40", first), (f"tiny:{name}", last)):
        served = catalog.resolve(word, acme)
        assert (served.mix, served.name) == (of(digest), word)
        assert served.adapters[0].startswith("acme/support-kq7vz2mh@")
    card = catalog.card(f"{name}:ckpt-step-40", acme)
    assert (card.id, card.parent, card.digest) == (f"{name}:ckpt-step-40", "tiny", first)
    for word in ("ft:other:acme:support:kq7vz2mh", "ft:tiny:acme:support:no", f"{name}:ckpt-step-41"):
        for ask in (catalog.resolve, catalog.card):
            assert refused(partial(ask, word, acme)).code == "model_not_found"
    for ask in (catalog.resolve, catalog.card):
        assert refused(partial(ask, name, other)).code == "model_not_found"


def test_adapters_of_the_library_need_no_loading(make: Make, base: TextBase, folder: Path, library: Library) -> None:
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    library.add(folder / "a", "support")
    library.add(folder / "b", "support")
    library.alias("support@1", "prod")
    catalog = make()
    words = {"support": two, "support@1": one, "support@2": two, "support@prod": one, one: one, "tiny:support@1": one}
    assert {word: catalog.resolve(word, OPERATOR).mix for word in words} == {w: of(d) for w, d in words.items()}
    assert [c.id for c in catalog.models(OPERATOR)] == ["tiny", "support"]
    own = peft.load_folder(folder / "a", base.model).adapter
    assert torch.equal(next(catalog.sources.read(one).tensors())[1], next(own.tensors())[1])


def test_a_malformed_time_in_a_record_does_not_hide_models(make, base, folder, library):
    saved(base, folder / "a", 1)
    library.add(folder / "a", "support")
    with write_transaction(library.engine) as c:
        c.execute(update(versions).values(added="yesterday"))
    assert [(card.id, card.created) for card in make().models(OPERATOR)][1:] == [("support", 0)]


def test_names_are_resolved_without_a_database(make, base, folder, library, monkeypatch):
    """No query runs when known or unknown names are resolved, names are listed, or an adapter is first read."""
    digest = saved(base, folder / "a")
    library.add(folder / "a", "acme/support")
    library.alias("acme/support@1", "prod")
    catalog = make()
    catalog.sources.names.refreshed()
    monkeypatch.setattr(catalog.sources.names, "refreshed", lambda: None)  # HTTP routes refresh names in a thread

    asked: list[str] = []
    event.listen(library.engine, "before_cursor_execute", lambda c, cursor, statement, *more: asked.append(statement))
    for _ in range(50):
        for word in ("acme/support", "acme/support@1", "acme/support@prod", digest, digest[:20]):
            assert catalog.resolve(word, OPERATOR).mix == of(digest)
        for word in ("nothing", "acme/support@2", "acme/support@stable", "sha256:0000"):
            assert refused(lambda w=word: catalog.resolve(w, OPERATOR)).status == 404
        assert [c.id for c in catalog.models(OPERATOR)] == ["tiny", "acme/support"]
    assert catalog.sources.read(digest).digest() == digest
    assert asked == []


def test_a_load_under_a_library_name_is_refused(make, base, folder, library, caplog):
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    library.add(folder / "a", "support")
    catalog = make()
    error = refused(lambda: catalog.load("support", "b"))
    assert (error.status, error.code) == (400, "adapter_exists")
    assert catalog.resolve("support", OPERATOR).mix == of(one)
    assert catalog.residents.stats().bytes == 0
    assert catalog.load("support", "support").digest == one, "the same thing by its own name"
    catalog.unload("support")
    assert catalog.load("support", "a").digest == one, "or by its files"
    catalog.load("support", "b", replace=True)
    assert "instead of the library's support@1" in caplog.text
    assert catalog.resolve("support", OPERATOR).mix == of(two)
    catalog.unload("support")
    assert catalog.resolve("support", OPERATOR).mix == of(one)


def test_a_mix(make: Make, base: TextBase, folder: Path) -> None:
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    catalog = make()
    catalog.load("a", "a")
    catalog.load("b", "b")
    served = catalog.resolve_mix([("a", 0.5), ("b", -1.0), ("tiny:a", 0.25), ("tiny", 3.0)], OPERATOR)
    assert served.mix == tuple(sorted({one: 0.75, two: -1.0}.items()))
    assert served.adapters == tuple("a" if digest == one else "b" for digest, _ in served.mix)
    assert served.target == served.name == "a:0.5+b:-1+tiny:a:0.25+tiny:3"
    single = catalog.resolve_mix([("a", 2.0)], OPERATOR)
    assert (single.mix, single.target, single.adapters) == (((one, 2.0),), "a", ("a",))
    assert catalog.resolve_mix([("a", 1.0), ("a", -1.0)], OPERATOR).mix == ()
    assert refused(lambda: catalog.resolve_mix([("a", 1.0), ("nowhere", 1.0)], OPERATOR)).status == 404
    assert refused(lambda: catalog.resolve_mix([("a", float("nan"))], OPERATOR)).status == 400
    summed = refused(lambda: catalog.resolve_mix([("a", 6000.0), ("b", 1.0), ("a", 6000.0)], OPERATOR))
    assert (summed.status, summed.what) == (400, "the strength of 'a' is 12000")
    assert refused(lambda: catalog.resolve_mix([("a", 1.0)] * 65, OPERATOR)).status == 400


def test_parts_of_a_mix_have_the_operators_names(make: Make, base: TextBase, folder: Path, library: Library) -> None:
    """Limits, prices and the ledger use the library's names, never the client's spelling."""
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    for source, name in (("a", "big"), ("b", "small")):
        library.add(folder / source, name)
    library.alias("big@1", "prod")
    catalog = make()
    for word in ("big", "big@1", "big@prod", "big@latest", one, one[:20], "tiny:big"):
        assert catalog.resolve(word, OPERATOR).parts() == [(one, "big@1", 1.0)]
    asked = {
        (("big", 1.0), ("small", 0.0)): [(one, "big@1", 1.0)],
        (("big", 1.0), ("small", 1.0), ("small@1", -1.0)): [(one, "big@1", 1.0)],
        (("big", 0.5), (one, 0.5)): [(one, "big@1", 1.0)],
        (("big", 1.0), ("small", 1e-9)): sorted([(one, "big@1", 1.0), (two, "small@1", 1e-9)]),
        (("big", 1.0), ("big@1", -1.0), ("tiny", 3.0)): [("", "tiny", 1.0)],
    }
    for parts, expected in asked.items():
        assert catalog.resolve_mix(parts, OPERATOR).parts() == expected


class Split:
    """Routes: `live` chooses a or b depending on the user, has a shadow, and is visible only to tenant `t`."""

    def __init__(self, shadow: str | None = "b") -> None:
        self.under = shadow

    def choose(self, route: str, caller: Principal) -> str | None:
        known = route == "live" and caller.tenant == "t"
        return ("a" if caller.user == "ann" else "b") if known else None

    def shadow(self, route: str, caller: Principal) -> str | None:
        assert route == "live"
        return self.under

    def names(self, caller: Principal) -> list[str]:
        return ["live"] if caller.tenant == "t" else []


def test_a_route_with_weights(make: Make, base: TextBase, folder: Path) -> None:
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    catalog = make(routes=Split())
    catalog.load("a", "a")
    catalog.load("b", "b")
    ann = Principal("tenant", tenant="t", user="ann", sees=lambda name: False)
    served = catalog.resolve("live", ann)
    assert (served.mix, served.name, served.target, served.shadow) == (of(one), "live", "a", ("b", of(two)))
    assert catalog.resolve("tiny:live", replace(ann, user="bob")).target == "b"
    assert catalog.resolve("a", OPERATOR).shadow is None
    assert refused(lambda: catalog.resolve("live", OPERATOR)).status == 404
    assert refused(lambda: catalog.resolve("a", ann)).status == 404, "the route lends no name"
    assert [c.id for c in catalog.models(ann)] == ["tiny", "live"]


def test_a_missing_shadow_is_reported_and_the_answer_is_sent(make: Make, base: TextBase, folder: Path) -> None:
    saved(base, folder / "a", 1)
    catalog = make(routes=Split("gone"))
    catalog.load("a", "a")
    served = catalog.resolve("live", Principal("tenant", tenant="t", user="ann"))
    assert served.target == "a"
    name, why = served.shadow
    assert name == "gone"
    assert why.status == 404
    assert refused(lambda: catalog.resolve("live", Principal("tenant", tenant="t", user="bob"))).status == 404


def test_checking_a_name_equals_requesting_it(make, base, folder, library, tmp_path):
    saved(base, folder / "a", 1)
    saved(base, folder / "b", 2)
    saved(base, folder / "o", 3, base_fingerprint="sha256:" + "0" * 64)
    for name, place in (("good", "a"), ("broken", "b"), ("other", "o")):
        library.add(folder / place, name)
    catalog = make()
    catalog.load("loaded", "a")
    for fine in ("good", "good@1", "loaded", "tiny"):
        catalog.check(fine)
    for files in library.files(library.find("broken").entry).values():
        blob = Path(library.location) / "blobs" / files[0][:2] / files[0]
        blob.chmod(0o644)
        blob.write_bytes(b"half a file")
    answers = {name: refused(lambda n=name: catalog.check(n)).status for name in ("gone", "good@7", "broken", "other")}
    assert answers == {"gone": 404, "good@7": 404, "broken": 503, "other": 400}


# -- visibility --------------------------------------------------------------------------------------------------------


def test_adapters_of_other_tenants_are_not_found(make: Make, base: TextBase, folder: Path, library: Library) -> None:
    digest = saved(base, folder / "a")
    library.add(folder / "a", "secret")
    catalog = make()
    catalog.load("mine", "a")
    catalog.load("theirs", "a")
    caller = Principal("tenant", tenant="t", sees=lambda name: name == "mine")
    assert catalog.resolve("mine", caller).mix == of(digest)
    for word in ("theirs", "secret", "secret@1", digest):
        hidden, absent = (refused(partial(catalog.resolve, each, caller)) for each in (word, "x"))
        assert str(hidden).replace(word, "x") == str(absent)
        for part in ("status", "code", "param", "fix", "where"):
            assert getattr(hidden, part) == getattr(absent, part)
    assert [c.id for c in catalog.models(caller)] == ["tiny", "mine"]


def test_adapters_of_other_tenants_are_not_looked_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = make()
    monkeypatch.setattr(catalog.sources, "find_version", lambda reference: pytest.fail("looked up"))
    for word in ("there", "not-there"):
        assert refused(lambda w=word: catalog.resolve(w, Principal("key", sees=lambda name: False))).status == 404


def test_namespaces_work_in_every_way_to_name_adapters(make, base, folder, library):
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    library.add(folder / "a", "acme/support")
    library.add(folder / "b", "acme/support")
    library.alias("acme/support@1", "prod")
    catalog, acme = make(), Principal("tenant", tenant="acme", sees=pattern_matcher(["acme/*"]))
    meant = {"acme/support": two, "acme/support@1": one, "acme/support@prod": one, "tiny:acme/support@2": two}
    assert {word: catalog.resolve(word, acme).mix for word in meant} == {word: of(d) for word, d in meant.items()}
    assert catalog.resolve_mix([("acme/support@1", 0.5)], acme).mix == ((one, 0.5),)
    assert [c.id for c in catalog.models(acme)] == ["tiny", "acme/support"]
    assert refused(lambda: catalog.resolve("support", acme)).status == 404
    globex = Principal("key", sees=pattern_matcher(["globex/*"]))
    assert refused(lambda: catalog.resolve("acme/support", globex)).status == 404
    assert catalog.load("acme/Fast.Support", "acme/support@1").digest == one
    assert catalog.resolve("acme/Fast.Support", acme).mix == of(one)


HOSTILE_WORDS = ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "~root", "tiny:../x", "%2e%2e/", "C:\\x"]
HOSTILE_WORDS += ["s3://bucket/x", "file:///etc/passwd", "sha256:zz", "sha256:", "a@b@c"]
HOSTILE_WORDS += ["a\0b", "\x1b[31m", "x" * 100_000, "a b", "\ud800", "é"]


@pytest.mark.parametrize("word", HOSTILE_WORDS, ids=range(len(HOSTILE_WORDS)))
def test_strings_from_clients_never_become_paths(make: Make, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = make()
    for name in ("resolve", "stat", "exists", "open", "iterdir", "expanduser"):
        monkeypatch.setattr(Path, name, lambda *a, **k: pytest.fail("a file was touched"))
    error = refused(lambda: catalog.resolve(word, OPERATOR))
    assert (error.status, error.code) == (404, "model_not_found")
    assert len(str(error)) < 400
    assert all(c.isprintable() for c in error.what)


@pytest.mark.parametrize(
    "name", [*HOSTILE_WORDS, "", "tiny", "a..b", "a:b", "a@2", "a+b", "/a", "a/", "a//b", "a/b/c", "-a"]
)
def test_invalid_names_are_refused(make: Make, base: TextBase, folder: Path, name: str) -> None:
    saved(base, folder / "a")
    catalog = make()
    error = refused(lambda: catalog.load(name, "a"))
    assert (error.status, error.code, error.param) == (400, "invalid_request", "lora_name")
    assert len(catalog.models(OPERATOR)) == 1


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_name_means_one_thing(make: Make, base: TextBase, folder: Path) -> None:
    one, two = saved(base, folder / "a", 1), saved(base, folder / "b", 2)
    catalog = make()
    catalog.load("x", "a")
    error = refused(lambda: catalog.load("x", "b"))
    assert (error.status, error.code) == (400, "adapter_exists")
    assert catalog.resolve("x", OPERATOR).mix == of(one)
    catalog.load("x", "b", replace=True)
    assert catalog.resolve("x", OPERATOR).mix == of(two)
    assert list(catalog.residents.resident()) == [two]
    catalog.unload("x")
    assert refused(lambda: catalog.resolve("x", OPERATOR)).status == 404
    assert refused(lambda: catalog.unload("x")).status == 404
    assert catalog.residents.stats().bytes == 0


def test_two_names_of_one_adapter(make: Make, base: TextBase, folder: Path) -> None:
    digest = saved(base, folder / "a", 1)
    catalog = make()
    catalog.load("x", "a")
    catalog.load("y", "a")
    catalog.unload("y")
    assert list(catalog.residents.resident()) == [digest]
    catalog.unload("x")
    assert catalog.residents.resident() == {}


def test_an_evicted_adapter_must_be_unchanged_when_reloaded(make: Make, base: TextBase, folder: Path) -> None:
    saved(base, folder / "a", 1)
    size = peft.load_folder(folder / "a").adapter.size_bytes()
    saved(base, folder / "b", 2)
    catalog = make(limit=size)
    catalog.load("x", "a")
    catalog.load("y", "b")
    residents = catalog.residents

    def get(name: str) -> Lease[Any] | Refused:
        done, got = threading.Event(), list[Any]()
        lease = residents.acquire(catalog.resolve(name, OPERATOR).mix, lambda r: (got.append(r), done.set()))
        if lease is None:
            assert done.wait(30)
            lease = got[0]
        if isinstance(lease, Lease):
            lease.release()
        return lease

    assert {type(get(name)) for name in "xy"} == {Lease}
    shutil.rmtree(folder / "a")
    gone = get("x")
    assert (reason(gone), gone.status) == ("not_found", 404)
    saved(base, folder / "a", 9)
    changed = get("x")
    assert (reason(changed), changed.status) == ("changed", 409)
    assert isinstance(get("y"), Lease)


def test_an_adapter_larger_than_memory_leaves_no_name(make: Make, base: TextBase, folder: Path) -> None:
    saved(base, folder / "a")
    catalog = make(limit=100)
    error = refused(lambda: catalog.load("x", "a"))
    assert reason(error) == "too_large"
    assert len(catalog.models(OPERATOR)) == 1


def test_concurrent_loads_of_one_name(make: Make, base: TextBase, folder: Path) -> None:
    for i in range(4):
        saved(base, folder / f"a{i}", i)
    catalog, outcomes = make(), list[str]()

    def load(i: int) -> None:
        try:
            outcomes.append(catalog.load("x", f"a{i}").digest)
        except Refused as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (won,) = [o for o in outcomes if o != "adapter_exists"]
    assert catalog.resolve("x", OPERATOR).mix == of(won)
    assert list(catalog.residents.resident()) == [won]
