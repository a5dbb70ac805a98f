"""Adapters computed from other files: mix, resize, extract, change strength."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.core.test_truncate import noise
from veneer.adapters.mix import add_mix, diff, extract, mix_adapters, resize, strength
from veneer.core.adapter import Adapter, Card, Pair
from veneer.errors import AdapterError, BaseError, ConfigError
from veneer.files.weights import Checkpoint
from veneer.formats import peft
from veneer.formats.card import read_card
from veneer.formats.strengths import block_of, parse_blocks
from veneer.library.library import open_library

NAMES = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.mlp"]


def adapter(seed: int, rank: int = 3, names: list[str] = NAMES, **card: str) -> Adapter:
    pairs = {
        n: Pair(noise(rank, 10, seed=seed + i), noise(8, rank, seed=seed + i + 50), 0.5 + i)
        for i, n in enumerate(names)
    }
    return Adapter(pairs, card=Card(**card))


def delta(a: Adapter, name: str) -> torch.Tensor:
    pair = a.pairs[name]
    return pair.scale * (pair.B.double() @ pair.A.double())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Adapter, Adapter, str, str]:
    a, b = adapter(0, 3, base="tiny", licence="MIT", trigger_words="x"), adapter(100, 2, NAMES[1:], base="tiny")
    a.card.trigger_words, b.card.trigger_words = ["sks"], ["zwx"]
    for x, name in ((a, "a"), (b, "b")):
        peft.write_folder(x, tmp_path / name)
    return a, b, str(tmp_path / "a"), str(tmp_path / "b")


def test_mix_card_has_parents_recipe_and_errors(two, tmp_path):
    a, b, fa, fb = two
    made = mix_adapters([f"{fa}:0.8", f"{fb}:-0.5"], tmp_path / "m")
    out = peft.read_folder(tmp_path / "m")
    for name in NAMES:
        want = 0.8 * delta(a, name) - (0.5 * delta(b, name) if name in b.pairs else 0)
        torch.testing.assert_close(delta(out, name), want, rtol=0, atol=1e-5)
    assert made.error < 1e-6
    card = read_card(tmp_path / "m")
    assert card.digest == made.digest == out.digest()
    assert card.card.parents == [peft.read_folder(fa).digest(), peft.read_folder(fb).digest()]
    assert card.card.recipe["strengths"] == {fa: 0.8, fb: -0.5}
    assert (card.card.base, card.card.trigger_words, card.card.licence) == ("tiny", ["sks", "zwx"], "MIT")
    assert card.card.metrics["error"] == made.error
    mix_adapters([f"{fa}:0.8", f"{fb}:-0.5"], tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "m/adapter_model.safetensors"
    ).read_bytes()


def test_kept_mix_names_the_versions_of_its_parts(two, tmp_path):
    a, b, fa, fb = two
    with open_library(tmp_path / "library") as library:
        library.add(fa, "support")
        library.add(fb, "billing")
        library.alias("billing@1", "prod")
        added, made = add_mix(library, ["support:0.8", ("billing@prod", -0.5)], "both", alias="best", tags=["tried"])
        assert (added.version.reference, added.version.aliases, added.version.tags) == ("both@1", ["best"], ["tried"])
        assert made.error < 1e-6
        out = peft.read_folder(library.resolve("both@best"))
        for name in NAMES:
            want = 0.8 * delta(a, name) - (0.5 * delta(b, name) if name in b.pairs else 0)
            torch.testing.assert_close(delta(out, name), want, rtol=0, atol=1e-5)
        assert added.version.digest == out.digest() == made.digest
        card = added.version.card
        assert card["recipe"]["strengths"] == {"support@1": 0.8, "billing@1": -0.5}
        assert {v.name for v in library.search(parent=library.find("support").digest)} == {"both"}
        again, _ = add_mix(library, ["support:0.8", "billing:-0.5"], "both")
        assert not again.new
        for specs, name, words in (([], "x", "nothing to mix"), (["support"], "no name", "cannot name")):
            with pytest.raises(ConfigError, match=words):
                add_mix(library, specs, name)
        with pytest.raises(AdapterError, match="nowhere"):
            add_mix(library, ["nowhere"], "x")
        assert [v.reference for v in library.search()] == ["billing@1", "both@1", "support@1"]


def test_invalid_requests_are_refused(two, tmp_path):
    *_, fa, fb = two
    with pytest.raises(ConfigError, match="nothing to mix"):
        mix_adapters([], tmp_path / "m")
    with pytest.raises(ConfigError, match="the output already exists"):
        mix_adapters([fa], fb)
    with pytest.raises(AdapterError, match="2 conflicting limits"):
        resize(fa, tmp_path / "m", rank=1, error=0.1)
    with pytest.raises(ConfigError, match="a resize needs a size"):
        resize(fa, tmp_path / "m")
    with pytest.raises(ConfigError, match="no dtype"):
        resize(fa, tmp_path / "m", rank=1, dtype="int8")
    assert not (tmp_path / "m").exists()


def test_adapters_of_different_bases_do_not_mix(tmp_path):
    for i in range(2):
        peft.write_folder(adapter(i, base="tiny", base_fingerprint=f"sha256:{i}"), tmp_path / str(i))
    with pytest.raises(AdapterError, match="different bases"):
        mix_adapters([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "m")


def test_resize_keeps_its_bound_and_reports_the_true_error(two, tmp_path):
    a, _, fa, _ = two
    for i, bound in enumerate(({"rank": 1}, {"error": 0.4}, {"energy": 0.8})):
        made = resize(fa, tmp_path / str(i), **bound)
        out = peft.read_folder(tmp_path / str(i))
        off = sum(float((delta(out, n) - delta(a, n)).square().sum()) for n in NAMES) ** 0.5
        size = sum(float(delta(a, n).square().sum()) for n in NAMES) ** 0.5
        assert made.error == pytest.approx(off / size, rel=1e-4)
        assert off / size <= {"rank": 1.0, "error": 0.4, "energy": 0.2**0.5}[next(iter(bound))]
    assert {p.rank for p in peft.read_folder(tmp_path / "0").pairs.values()} == {1}


def models(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = {f"layers.{i}.w.weight": noise(20, 30, seed=i).bfloat16() for i in range(3)}
    base |= {"embed_tokens.weight": noise(12, 8).bfloat16(), "norm.weight": noise(8), "conv.weight": noise(6, 4, 3, 3)}
    tuned = dict(base)
    for i in range(2):
        change = noise(20, 2, seed=10 + i) @ noise(2, 30, seed=20 + i)
        tuned[f"layers.{i}.w.weight"] = (base[f"layers.{i}.w.weight"].float() + change).bfloat16()
    tuned["conv.weight"] = base["conv.weight"] + (noise(6, 1, seed=5) @ noise(1, 36, seed=6)).view(6, 4, 3, 3)
    tuned["norm.weight"] = base["norm.weight"] + 1
    (folder / "base").mkdir()
    (folder / "tuned").mkdir()
    save_file(base, folder / "base/model.safetensors")
    half = sorted(tuned)[:3]
    save_file({n: tuned[n] for n in half}, folder / "tuned/model-1.safetensors")  # sharded differently from the base
    save_file({n: t for n, t in tuned.items() if n not in half}, folder / "tuned/model-2.safetensors")
    return base, tuned


def test_extract_lists_changes_it_cannot_express(tmp_path):
    base, tuned = models(tmp_path)
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", rank=4, prefix="unet.")
    out = peft.read_folder(tmp_path / "x")
    assert sorted(out.pairs) == ["conv", "layers.0.w", "layers.1.w"], "a PEFT folder has the model's own names"
    assert sorted(made.parts) == ["unet.conv", "unet.layers.0.w", "unet.layers.1.w"]
    assert [line.partition(":")[0] for line in made.left] == ["norm.weight"]
    off = size = 0.0
    for name, pair in out.pairs.items():
        key = name + ".weight"
        want = (tuned[key].double() - base[key].double()).flatten(1)
        got = pair.scale * (pair.B.double().flatten(1) @ pair.A.double().flatten(1))
        s = torch.linalg.svdvals(want)
        assert float((got - want).norm()) <= float(s[4:].square().sum().sqrt()) * 1.01 + 1e-5
        off, size = off + float((got - want).square().sum()), size + float(want.square().sum())
    assert made.error == pytest.approx((off / size) ** 0.5, rel=1e-3)
    exact = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "y", error=0.01, targets=r"conv")
    assert (exact.ranks, len(exact.left)) == ({"1": 1}, 3)
    with pytest.raises(BaseError, match="no target differs"):
        extract(tmp_path / "base", tmp_path / "base", tmp_path / "z", rank=1)
    with pytest.raises(ConfigError, match="regular expression"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "z", rank=1, targets="(")


def test_sharded_checkpoint_returns_each_tensor_unchanged(tmp_path):
    _, tuned = models(tmp_path)
    read = Checkpoint(tmp_path / "tuned")
    assert sorted(read) == sorted(tuned)
    assert all(torch.equal(read.tensor(n), t) and read.tensor(n).dtype == t.dtype for n, t in tuned.items())
    save_file({"norm.weight": noise(2)}, tmp_path / "tuned/again.safetensors")
    with pytest.raises(BaseError, match="in two files"):
        Checkpoint(tmp_path / "tuned")
    with pytest.raises(BaseError, match="no safetensors"):
        Checkpoint(tmp_path)


def test_two_adapters_are_compared_module_by_module(two):
    a, b, fa, fb = two
    found = diff(fa, f"{fb}:2")
    for name in NAMES[1:]:
        x, y = delta(a, name), 2 * delta(b, name)
        row = found["modules"][name]
        assert row["norm_a"] == pytest.approx(float(x.norm()))
        assert row["norm_b"] == pytest.approx(float(y.norm()))
        assert row["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
        assert row["difference"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
    assert found["only"] == {"a": [NAMES[0]], "b": []}
    same = diff(fa, fa)["all"]
    assert same["cosine"] == pytest.approx(1.0)
    assert same["difference"] < 1e-6


def test_strength_by_block_is_exact_and_reported(two, tmp_path):
    a, _, fa, _ = two
    report = strength(fa, tmp_path / "s", blocks="layers.1=0.5, mlp=0")
    out = peft.read_folder(tmp_path / "s")
    assert sorted(out.pairs) == sorted(NAMES[:2])
    assert torch.equal(out.pairs[NAMES[1]].A, a.pairs[NAMES[1]].A)
    assert out.pairs[NAMES[1]].scale == 0.5 * a.pairs[NAMES[1]].scale
    row = report["blocks"]["model.layers.1"]
    assert row["norm"] == pytest.approx(0.5 * float(delta(a, NAMES[1]).norm()))
    assert row["strengths"] == [0.0, 0.5]
    assert sum(r["share"] for r in report["blocks"].values()) == pytest.approx(1)
    assert strength(fa)["blocks"]["model.layers.0"]["norm"] == pytest.approx(float(delta(a, NAMES[0]).norm()))


UNET = [
    "unet.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.0.downsamplers.0.conv",
    "unet.mid_block.attentions.0.proj_in",
]  # fmt: skip


def test_block_patterns_match_whole_name_parts():
    names = [f"model.layers.{i}.mlp" for i in range(12)]
    got = parse_blocks("*=0.5,layers.1=2,layers.3-5=0", names)
    assert [got[n] for n in names] == [0.5, 2, 0.5, 0, 0, 0, *[0.5] * 6]
    wrong = {
        "layers.12=1": "matches no module",
        "layer=1": "matches no module",
        "mlp=x": "not a strength",
        "mlp=1,2": "PATTERN",
    }
    for text, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            parse_blocks(text, names)
    assert [block_of(n) for n in UNET] == [
        "unet.down_blocks.1.attentions.0",
        "unet.down_blocks.0.downsamplers.0",
        "unet.mid_block.attentions.0",
    ]
    assert block_of(names[3]) == "model.layers.3"
