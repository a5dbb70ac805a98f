"""Adapters used by name on a text base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attached import attached, holding
from tests.edits import edit_json
from tests.families import llama3
from tests.tiny_base import VOCAB_SIZE, tiny_base_dir, tiny_tokenizer
from veneer.adapters.use import adapter_path, attach_adapters, load_adapter, parse_spec, stated_base
from veneer.core.adapter import Adapter, Card, LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import AdapterError, ConfigError, MismatchError, UnsafeFileError
from veneer.formats import convert, peft
from veneer.library.library import open_library
from veneer.models.text.base import TextBase, load_text

IDS = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> TextBase:
    return load_text(str(tiny_base_dir(tmp_path)))


def adapter_for(on: TextBase, seed: int = 0, **card: Any) -> Adapter:
    adapter = create(on.model, LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj")), seed=seed)
    for pair in adapter.pairs.values():
        pair.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    adapter.card = Card(**({"base": on.name, "base_fingerprint": on.fingerprint} | card))
    return adapter


def other_base(tmp_path: Path, **changes: Any) -> TextBase:
    folder = tmp_path / "other-base"
    llama3(**({"vocab_size": VOCAB_SIZE} | changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_text(str(folder))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a", ("a", 1.0)), ("runs/a:0.5", ("runs/a", 0.5)), ("a:-1", ("a", -1.0)), ("a:1e-1", ("a", 0.1)),
        ("a:0", ("a", 0.0)), ("a:b", ("a:b", 1.0)), ("a:b:2", ("a:b", 2.0)), (r"C:\runs\a", (r"C:\runs\a", 1.0)),
        (("a", 2), ("a", 2.0)), ("support@prod:0.8", ("support@prod", 0.8)), ("sha256:1234", ("sha256:1234", 1.0)),
        ("sha256:12ab:0.5", ("sha256:12ab", 0.5)),
    ],
)  # fmt: skip
def test_a_spec_is_a_name_and_a_strength(spec: Any, expected: tuple[str, float]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["", ":1"])
def test_a_spec_without_a_name_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigError, match="does not name an adapter"):
        parse_spec(spec)


@pytest.mark.parametrize("strength", ["nan", "-inf", "1e999", "1e200", "10001", "-1e5"])
def test_invalid_strength_error_names_the_adapter(strength: str) -> None:
    for spec in (f"runs/a:{strength}", ("runs/a", float(strength))):
        with pytest.raises(ConfigError, match=r"the strength of 'runs/a' is .*\n  fix: a number from -10000 to 10000"):
            parse_spec(spec)


@given(st.from_regex(r"[a-z/._-]{1,20}", fullmatch=True), st.floats(-1e4, 1e4))
def test_any_name_and_strength_survive_a_round_trip(name: str, strength: float) -> None:
    assert parse_spec(f"{name}:{strength!r}") == (name, strength)


def test_an_existing_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").mkdir()
    assert parse_spec("a:2") == ("a:2", 1.0)
    assert parse_spec("a:2:0.5") == ("a:2", 0.5)


def test_adapters_are_found_by_path_and_library_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: TextBase
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    adapter, other = adapter_for(base), adapter_for(base, 2)
    for place in ["plain", "run/adapter"]:
        peft.write_folder(adapter, tmp_path / place)
    peft.write_folder(other, tmp_path / "second")
    assert adapter_path("plain") == Path("plain")
    assert adapter_path("run") == Path("run/adapter")
    with pytest.raises(AdapterError, match=r"did you mean plain\?") as caught:
        adapter_path("plian")
    assert f"no library at {tmp_path / 'home/library'}" in (caught.value.where or "")
    assert not (tmp_path / "home/library").exists()
    with open_library() as library:
        library.add("plain", "kept")
        library.add("second", "kept")
        library.alias("kept@1", "prod")
    for name, wanted in {
        "kept": other,
        "kept@1": adapter,
        "kept@prod": adapter,
        adapter.digest()[:15]: adapter,
        "kept@latest": other,
    }.items():
        assert load_adapter(base, name).digest() == wanted.digest(), name
    (tmp_path / "kept").mkdir()
    assert adapter_path("kept") == Path("kept"), "what is here by that path goes first"
    for asked in ("plain:0.8@campaign=product", "kept@prod@steps=0-0.6"):
        with pytest.raises(AdapterError, match=r"after the @, .*, is for image bases"):
            load_adapter(base, asked)
    with pytest.raises(AdapterError, match="the library has no kept@7"):
        adapter_path("kept@7")
    with pytest.raises(AdapterError, match="there is no adapter 'runs/kept'"):
        adapter_path("runs/kept")


def test_base_name_comes_from_card_or_peft_config(tmp_path: Path, base: TextBase) -> None:
    folder = tmp_path / "a"
    peft.write_folder(adapter_for(base, base="some/base"), folder)
    assert stated_base(str(folder)) == "some/base"
    (folder / "veneer.json").unlink()
    assert stated_base(str(folder)) == "some/base"
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    assert stated_base(str(folder)) == ""


# -- on the base -------------------------------------------------------------------------------------------------------


def test_attached_adapters_act_like_those_in_memory(tmp_path: Path, base: TextBase) -> None:
    one, two = adapter_for(base, 1), adapter_for(base, 2)
    plain = base.model(IDS).logits
    with holding(base.model, one=one, two=two) as by_hand:
        by_hand.use(("one", 0.5), ("two", -1.0))
        expected = base.model(IDS).logits
    peft.write_folder(one, tmp_path / "one")
    peft.write_folder(two, tmp_path / "two")
    with attach_adapters(base, [f"{tmp_path / 'one'}:0.5", (str(tmp_path / "two"), -1.0)]) as attachment:
        assert torch.equal(base.model(IDS).logits, expected)
        assert set(attachment.adapters) == {str(tmp_path / "one"), str(tmp_path / "two")}
        assert attach_adapters(base, [str(tmp_path / "one")], attachment=attachment) is attachment
        assert len(attachment.adapters) == 2
    assert torch.equal(base.model(IDS).logits, plain)
    with attach_adapters(base, []):
        assert torch.equal(base.model(IDS).logits, plain)


@pytest.mark.parametrize("layout", ["gguf", "vllm"])
def test_an_adapter_of_another_layout_acts_the_same(tmp_path: Path, base: TextBase, layout: str) -> None:
    adapter = adapter_for(base)
    config = base.model.config
    out = tmp_path / ("a.gguf" if layout == "gguf" else "a")
    heads = {"family": "llama", "head_dim": config.hidden_size // config.num_attention_heads}
    convert.write(adapter, out, layout, **(heads if layout == "gguf" else {}))
    with attached(base.model, adapter):
        expected = base.model(IDS).logits
    with attach_adapters(base, [str(out)]):
        torch.testing.assert_close(base.model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_other_base_of_other_shapes_is_refused(tmp_path: Path, base: TextBase) -> None:
    peft.write_folder(adapter_for(base), tmp_path / "a")
    other = other_base(tmp_path, hidden_size=64, num_hidden_layers=1)
    for allowed in (False, True):
        with pytest.raises(MismatchError) as caught:
            load_adapter(other, str(tmp_path / "a"), allow_other_base=allowed)
        text = str(caught.value)
        assert base.fingerprint in text
        assert other.fingerprint in text
        assert "model.layers.0" in text
        assert "32" in text
        assert "64" in text
        assert "allow-other-base" not in text


def test_other_base_of_equal_shapes_needs_permission(tmp_path: Path, base: TextBase) -> None:
    peft.write_folder(adapter_for(base), tmp_path / "a")
    other = other_base(tmp_path, initializer_range=0.3)
    with pytest.raises(MismatchError, match="--allow-other-base") as caught:
        load_adapter(other, str(tmp_path / "a"))
    assert base.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    with attach_adapters(other, [str(tmp_path / "a")], allow_other_base=True):
        other.model(IDS)


def test_an_adapter_without_a_fingerprint_is_checked_by_shape_alone(tmp_path: Path, base: TextBase) -> None:
    peft.write_folder(adapter_for(base, base="", base_fingerprint=""), tmp_path / "a")
    load_adapter(base, str(tmp_path / "a"))
    with pytest.raises(AdapterError, match=r"model\.layers\.0"):
        load_adapter(other_base(tmp_path, hidden_size=64), str(tmp_path / "a"))


def test_no_adapter_is_attached_if_one_is_invalid(tmp_path: Path, base: TextBase) -> None:
    peft.write_folder(adapter_for(base), tmp_path / "good")
    before = [type(m) for m in base.model.modules()]
    for bad in ("missing", f"{tmp_path / 'good'}:2"):
        with pytest.raises((AdapterError, ConfigError)):
            attach_adapters(base, [str(tmp_path / "good"), bad])
    assert [type(m) for m in base.model.modules()] == before
    attach(base.model).detach()


def test_a_pickled_adapter_is_not_opened(tmp_path: Path, base: TextBase) -> None:
    peft.write_folder(adapter_for(base), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UnsafeFileError):
        load_adapter(base, str(tmp_path / "a"))
