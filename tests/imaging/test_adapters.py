"""Adapters by name on an image base: specs, plans, and strengths by block, against weights folded in by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.image_twins import diffusers_pipeline, fold, levels, picture
from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, ConfigError, MismatchError
from veneer.formats.file_hashes import hashes
from veneer.formats.strengths import Strength
from veneer.imaging.adapters import Mixer, parse_use
from veneer.imaging.make import Ask, Options, make
from veneer.models.image import ImageBase


@pytest.mark.parametrize(
    ("spec", "name", "text"),
    [
        ("brand", "brand", "1"),
        ("brand:0.8", "brand", "0.8"),
        ("brand:0.8@down=0.5,text=0", "brand", "0.8@down=0.5,text=0"),
        ("brand@steps=0-0.6", "brand", "1@steps=0-0.6"),
        ("brand@prod:0.8", "brand@prod", "0.8"),
        ("brand@2:0.8@mid=0", "brand@2", "0.8@mid=0"),
        ("runs/a.safetensors:-1@1,0,0,0,1,1,1,1,1,1,0,0", "runs/a.safetensors", "-1@1,0,0,0,1,1,1,1,1,1,0,0"),
        (("brand", 0.1), "brand", "0.1"),
        (("brand", Strength(0.3)), "brand", "0.3"),
    ],
)
def test_a_spec_is_a_name_and_a_strength(spec: Any, name: str, text: str) -> None:
    found, strength = parse_use(spec)
    assert (found, str(strength)) == (name, text)
    assert parse_use(f"{found}:{strength}") == (found, strength), "and comes back to the last bit"


def test_a_path_with_an_at_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b=1").mkdir()
    assert parse_use("a@b=1:0.5") == ("a@b=1", Strength(0.5))


@pytest.mark.parametrize("spec", ["brand@down=", "brand@down=x", "brand:0.8@steps=3-4", "brand@,"])
def test_what_is_no_spec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        parse_use(spec)


def one(base: ImageBase, *uses: Any, say: Any = None, **options: Any) -> Any:
    with Mixer(base, say=say) as mixer:
        ask = Ask("a cat", seed=1, uses=tuple(parse_use(use) for use in uses))
        return make(mixer, [ask], Options(**({"steps": 4} | options)))[0].image


@pytest.mark.parametrize("name", ["brand", "look"])
def test_strengths_by_block_are_weights_folded_in_by_hand(
    name: str, base: ImageBase, place: Path, request: pytest.FixtureRequest
) -> None:
    """`look` is DoRA: a strength is a multiple of its change of W, not of its factors."""
    adapter: Adapter = request.getfixturevalue(name)

    def by(module: str) -> float:
        if module.startswith("text_encoder"):
            return 0.4 * (0.5 if module.startswith("text_encoder_2.") else 2)
        if ".down_blocks.1." in module:
            return 0.0
        return 0.8 if ".mid_block." in module else 0.4

    pipe = diffusers_pipeline(place)
    fold(pipe, [(adapter, by)])
    found = one(base, f"{name}.safetensors:0.4@text=2,text_encoder_2=0.5,down.1=0,mid=2")
    assert levels(found, picture(pipe, "a cat", 1)) <= 1
    assert levels(found, one(base, f"{name}.safetensors:0.4")) > 2


def test_a_plan_has_a_phase_for_each_range(base: ImageBase) -> None:
    with Mixer(base) as mixer:
        plan = mixer.plan(["brand.safetensors:0.5@steps=0-0.6", "look.safetensors:2@steps=0.3-0.6:0.25+0.6-1"])
        assert plan.text == (("brand.safetensors", 0.5), ("look.safetensors", 2.0))
        assert plan.phases == (
            (0.0, (("brand.safetensors", 0.5),)),
            (0.3, (("brand.safetensors", 0.5), ("look.safetensors", 0.5))),
            (0.6, (("look.safetensors", 2.0),)),
        )
        assert [len(plan.at(i / 5)) for i in range(5)] == [1, 1, 2, 1, 1]
        before = set(mixer.attachment.adapters)
        mixer.plan(["brand.safetensors:0.7"])
        assert set(mixer.attachment.adapters) == before, "another strength needs nothing new"
        assert mixer.plan(["brand.safetensors:0"]).phases == ((0.0, ()),)


def test_a_source_has_the_hashes_of_its_file(base: ImageBase, files: Path) -> None:
    with Mixer(base) as mixer:
        source = mixer.add("brand.safetensors")
        assert source is mixer.add("brand.safetensors")
        assert source.label == "brand"
        file = hashes(files / "brand.safetensors")
        assert (source.sha256, source.autov3) == (file.sha256, file.autov3)


def test_what_has_no_effect_is_said(base: ImageBase, files: Path, brand: Adapter) -> None:
    from veneer.formats.convert import write

    alone = Adapter({n: p for n, p in brand.pairs.items() if n.startswith("unet.")})
    write(alone, files / "alone.safetensors", to="kohya", family="sdxl")
    said: list[str] = []
    with Mixer(base, say=said.append) as mixer:
        mixer.plan(["alone.safetensors@text=0,mid=1"])
        mixer.plan(["brand.safetensors@steps=0-0.5"])
    assert len(said) == 2
    assert "changes nothing in 'text'" in said[0]
    assert "acts throughout" in said[1]


def test_unknown_adapters_blocks_and_families_are_refused(base: ImageBase, files: Path) -> None:
    from tests.formats.image_adapters import random_adapter
    from veneer.formats.convert import write
    from veneer.formats.topology import families

    write(random_adapter(families()["flux1"]), files / "flux.safetensors", to="kohya", family="flux1")
    with Mixer(base) as mixer:
        with pytest.raises(AdapterError, match=r"did you mean brand.safetensors"):
            mixer.plan(["brnd.safetensors"])
        with pytest.raises(MismatchError, match=r"this is a FLUX.1 adapter, the base is SDXL"):
            mixer.plan(["flux.safetensors"])
        with pytest.raises(ConfigError, match="named twice"):
            mixer.plan(["brand.safetensors", "brand.safetensors:0.5"])
        with pytest.raises(ConfigError, match="no block") as caught:
            mixer.plan(["brand.safetensors@dwon=0.5"])
        assert "down" in (caught.value.fix or "")
        mixer.plan(["brand.safetensors"])
    assert not any(hasattr(m, "is_veneer_layer") for m in base.model.modules()), "and after it nothing is attached"
