"""Named adapters on an image base: specs, plans, and block strengths.

Pictures are compared with those of weights merged by the test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.image_twins import diffusers_pipeline, fold, levels, picture
from veneer.core.adapter import Adapter
from veneer.errors import AdapterError, ConfigError, MismatchError
from veneer.files.hashes import hashes
from veneer.formats.strengths import CAMPAIGN, Strength
from veneer.imaging.adapters import ImagePipeline, label_of, parse_use
from veneer.imaging.generate import ImageRequest, Options, generate
from veneer.models.image.base import ImageBase


@pytest.mark.parametrize(
    ("spec", "name", "text"),
    [
        ("brand", "brand", "1"),
        ("brand:0.8", "brand", "0.8"),
        ("brand:0.8@down=0.5,text=0", "brand", "0.8@down=0.5,text=0"),
        ("brand@steps=0-0.6", "brand", "1@steps=0-0.6"),
        ("brand@prod:0.8", "brand@prod", "0.8"),
        ("brand@2:0.8@mid=0", "brand@2", "0.8@mid=0"),
        ("runs/a.safetensors:-1@up.1=0", "runs/a.safetensors", "-1@up.1=0"),
        (("brand", 0.1), "brand", "0.1"),
        (("brand", Strength(0.3)), "brand", "0.3"),
        ("brand@2:0.8@campaign=lens", "brand@2", "0.8@campaign=lens"),
    ],
)
def test_adapter_spec_is_parsed(spec: Any, name: str, text: str) -> None:
    found, strength = parse_use(spec)
    assert (found, str(strength)) == (name, text)
    assert parse_use(f"{found}:{strength}") == (found, strength), "and comes back to the last bit"


def test_path_can_contain_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b=1").mkdir()
    assert parse_use("a@b=1:0.5") == ("a@b=1", Strength(0.5))


@pytest.mark.parametrize("spec", ["brand@down=", "brand@down=x", "brand:0.8@steps=3-4", "brand@,"])
def test_invalid_adapter_spec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        parse_use(spec)


def one(base: ImageBase, *uses: Any, say: Any = None, **options: Any) -> Any:
    with ImagePipeline(base, say=say) as mixer:
        ask = ImageRequest("a cat", seed=1, uses=tuple(parse_use(use) for use in uses))
        return generate(mixer, [ask], Options(**({"steps": 4} | options)))[0].image


@pytest.mark.parametrize("name", ["brand", "look"])
def test_block_strengths_equal_weights_merged_by_hand(
    name: str, base: ImageBase, place: Path, request: pytest.FixtureRequest
) -> None:
    """`look` is a DoRA: a strength multiplies its ΔW, not A and B."""
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
    with ImagePipeline(base) as mixer:
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


def test_roles_equal_the_same_strengths_typed_out(base: ImageBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNGs are equal byte for byte: the metadata contains the resolved strengths.

    The test replaces the table of roles, so that the roles differ from a plain sum."""
    row = {"product": "", "brand": "down=0.5,mid=0.7,up=1", "lens": "down=0.3,steps=0.4-1"}
    monkeypatch.setitem(CAMPAIGN, "noise", row)
    roles = {"brand.safetensors": "brand", "look.safetensors": "lens"}
    said: list[str] = []
    with ImagePipeline(base, say=said.append) as mixer:

        def made(*uses: str) -> Any:
            return generate(mixer, [ImageRequest("a cat", seed=1, uses=tuple(map(parse_use, uses)))], Options(steps=3))[
                0
            ]

        found = made(*(f"{name}:0.8@campaign={role}" for name, role in roles.items()))
        table = [row[role] for role in roles.values()]
        typed = made(*(f"{name}:0.8@{text}" for name, text in zip(roles, table, strict=True)))
        plain = made(*(f"{name}:0.8" for name in roles))
    assert found.png() == typed.png()
    assert levels(found.image, plain.image) > 2
    assert [text for _, text in found.record["rows"][0]["adapters"]] == [f"0.8@{text}" for text in table]
    assert f"note: look is the campaign's lens: {table[1]}" in said


def test_role_of_two_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="brand occurs twice: a, b"):
        ImageRequest("a cat", uses=(parse_use("a@campaign=brand"), parse_use("b@campaign=brand")))


def test_added_adapter_has_the_hashes_of_its_file(base: ImageBase, files: Path) -> None:
    with ImagePipeline(base) as mixer:
        source = mixer.add("brand.safetensors")
        assert source is mixer.add("brand.safetensors")
        assert source.label == "brand"
        file = hashes(files / "brand.safetensors")
        assert (source.sha256, source.autov3) == (file.sha256, file.autov3)


def test_adapters_without_effect_are_noted(base: ImageBase, files: Path, brand: Adapter) -> None:
    from veneer.formats.convert import write

    alone = Adapter({n: p for n, p in brand.pairs.items() if n.startswith("unet.")})
    write(alone, files / "alone.safetensors", to="kohya", family="sdxl")
    said: list[str] = []
    with ImagePipeline(base, say=said.append) as mixer:
        mixer.plan(["alone.safetensors@text=0,mid=1"])
        mixer.plan(["brand.safetensors@steps=0-0.5"])
    assert len(said) == 2
    assert "changes nothing in 'text'" in said[0]
    assert "acts in all steps" in said[1]
    said.clear()
    plain, late = one(base), one(base, "alone.safetensors@steps=0.9-1", say=said.append)
    assert levels(plain, late) == 0
    assert any("alone: steps=0.9-1 contains no step of" in text for text in said)


def test_unknown_adapters_blocks_and_families_are_refused(base: ImageBase, files: Path) -> None:
    from tests.formats.image_adapters import random_adapter
    from veneer.formats.convert import write
    from veneer.formats.topology import families

    write(random_adapter(families()["flux1"]), files / "flux.safetensors", to="kohya", family="flux1")
    with ImagePipeline(base) as mixer:
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


def test_switching_changes_no_module_or_weight(base: ImageBase, brand: Adapter) -> None:
    with ImagePipeline(base) as mixer:
        mixer.plan(["brand.safetensors", "look.safetensors"])
        for i in range(60):
            mixer.attachment.add(f"known {i}", brand)
        modules = {name: (module, module.__dict__.copy()) for name, module in base.model.named_modules()}
        weights = {name: (t.data_ptr(), t._version) for name, t in base.model.state_dict().items()}
        for use in ("brand.safetensors:0.8", "look.safetensors:0.5", "brand.safetensors:0.1"):
            mixer.attachment.use(*mixer.plan([use]).at(0.0))
        assert all(
            module is modules[name][0] and module.__dict__.keys() == modules[name][1].keys()
            for name, module in base.model.named_modules()
        )
        assert {name: (t.data_ptr(), t._version) for name, t in base.model.state_dict().items()} == weights


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("brand", "brand"), ("brand@2", "brand"), ("runs/brand/", "brand"), ("a/my.style.safetensors", "my.style"),
        ("runs/brand/adapter", "brand"), ("runs/brand/adapter_model.safetensors", "brand"),
        ("runs/brand/adapter/adapter_model.safetensors", "brand"),
        ("hub/look/pytorch_lora_weights.safetensors", "look"), ("adapter", "adapter"),
        ("a, b: <c>.safetensors", "a_ b_ _c_"), ("sha256:3fa9c1", "sha256_3fa9c1"),
    ],
)  # fmt: skip
def test_label_is_short_and_without_separators(name: str, label: str) -> None:
    assert label_of(name) == label


def test_one_adapter_under_two_names_is_noted(base: ImageBase, files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "brand.safetensors", tmp_path / "copy.safetensors")
    said: list[str] = []
    with ImagePipeline(base, say=said.append) as mixer:
        mixer.plan(["brand.safetensors", str(tmp_path / "copy.safetensors")])
    assert any("the same adapter as brand.safetensors" in line for line in said)


def test_lora_tag_in_a_prompt_is_noted(base: ImageBase) -> None:
    said: list[str] = []
    with ImagePipeline(base, say=said.append) as mixer:
        generate(mixer, [ImageRequest("a cat <lora:brand:0.8>")], Options(steps=1))
    assert any("plain text" in line for line in said)
