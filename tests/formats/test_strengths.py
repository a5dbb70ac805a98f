"""Adapter strengths per block, component and step."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError
from veneer.formats.strengths import (
    CAMPAIGN,
    CAMPAIGN_ROLES,
    Strength,
    check_roles,
    factors_by_module,
    in_campaign,
    parse_blocks,
    parse_strength,
    split_strength,
)
from veneer.formats.topology import families

SDXL = list(families()["sdxl"].modules)
FLUX = list(families()["flux1"].modules)


def test_a_full_spec_is_read_and_written_back() -> None:
    text = "down=0.5,mid=1,up.1=0.2,text=0,steps=0-0.6"
    found = parse_strength(text, 0.8)
    assert found == Strength(
        0.8, blocks=(("down", 0.5), ("mid", 1.0), ("up.1", 0.2), ("text", 0.0)), steps=((0.0, 0.6, 1.0),)
    )
    assert str(found) == "0.8@" + text
    assert str(parse_strength("steps=0-0.3:0.2+0.3-1")) == "1@steps=0-0.3:0.2+0.3-1"
    assert str(Strength()) == "1"


INVALID_FACTORS = [
    ("", "nothing follows"), ("down=x", "not a strength"), ("down=inf", "not a strength"), ("=1", "the key is missing"),
    ("down=1,down=2", "twice"), ("steps=0-2", "not a range"), ("steps=0.6-0.2", "not a range"),
    ("steps=0-0.6+0.5-1", "overlap"), ("steps=half", "not a range"), ("steps=0-1,steps=0-1", "twice"),
    ("1,2,3", "BLOCK=NUMBER"), ("down=1,2", "BLOCK=NUMBER"),
    ("campaign=prodcut", "not a role of a campaign.*did you mean product"),
    ("campaign=", "not a role of a campaign"),
    ("campaign=brand,campaign=lens", "twice"), ("campaign=brand,steps=0-0.6", "sets blocks and steps"),
    ("campaign=brand,down=1", "sets blocks and steps"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), INVALID_FACTORS)
def test_invalid_factors_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        parse_strength(text)


@pytest.mark.parametrize(
    ("text", "strength"),
    [("down=20000", 1), ("down=1000,text=0", 100), ("steps=0-1:1e6", 1), ("down=30,steps=0-1:-4", 100)],
)
def test_strength_beyond_the_limit_is_refused(text: str, strength: float) -> None:
    with pytest.raises(ConfigError, match=r"the strength of .* is .*\n.*from -10000 to 10000"):
        parse_strength(text, strength)
    assert parse_strength(text, strength / 1e3)


def test_block_strength_beyond_the_limit_is_refused() -> None:
    assert parse_blocks("down_blocks=1e4", ["unet.down_blocks.0.a"]) == {"unet.down_blocks.0.a": 1e4}
    with pytest.raises(ConfigError, match="the strength of a block is 1e\\+300"):
        parse_blocks("down_blocks=1e300", ["unet.down_blocks.0.a"])


NAMES_AND_STRENGTHS = [
    ("a", ("a", None)), ("a:0.5", ("a", 0.5)), ("a:b", ("a:b", None)), ("sha256:12", ("sha256:12", None)),
    ("sha256:12:2", ("sha256:12", 2.0)), ("a@prod:-1", ("a@prod", -1.0)), ("a:", ("a:", None)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), NAMES_AND_STRENGTHS)
def test_name_and_strength_are_split(text: str, wanted: tuple[str, float | None]) -> None:
    assert split_strength(text) == wanted


def test_steps_act_within_their_ranges() -> None:
    some = parse_strength("steps=0-0.3:0.2+0.6-1")
    assert [some.factor_at(i / 10) for i in range(10)] == [0.2] * 3 + [0.0] * 3 + [1.0] * 4
    assert some.edges == (0.0, 0.3, 0.6)
    assert Strength().factor_at(0.5) == 1.0
    assert Strength().edges == (0.0,)


def test_range_without_a_step_has_no_effect() -> None:
    some = parse_strength("steps=0-0.2+0.4-0.45:2+0.7-1")
    assert some.idle(3) == ["0.4-0.45", "0.7-1"]
    assert some.idle(4) == ["0.4-0.45"]
    assert some.idle(20) == Strength().idle(1) == []


def test_block_strengths_become_module_strengths() -> None:
    found = factors_by_module(parse_strength("down=0.5,down.1=0.3,mid=2,text=0,text_encoder_2=0.1"), SDXL)
    for module, factor in found.items():
        want = 1.0
        if module.startswith("unet.down_blocks."):
            want = 0.3 if module.startswith("unet.down_blocks.1.") else 0.5
        elif module.startswith("unet.mid_block."):
            want = 2.0
        elif module.startswith("text_encoder."):
            want = 0.0
        elif module.startswith("text_encoder_2."):
            want = 0.1
        assert factor == want, module
    flux = factors_by_module(parse_strength("double.0-2=0.5,single.3=0"), FLUX)
    for module, factor in flux.items():
        double = any(module.startswith(f"transformer.transformer_blocks.{i}.") for i in range(3))
        assert factor == (
            0.5 if double else 0.0 if module.startswith("transformer.single_transformer_blocks.3.") else 1.0
        )
    attention = factors_by_module(parse_strength("attn2=0"), SDXL)
    assert {m for m, f in attention.items() if f == 0} == {m for m in SDXL if ".attn2." in m}


@pytest.mark.parametrize(("key", "near"), [("dwon", "down"), ("txt", "text"), ("mid_blok", "mid"), ("down.7", "down")])
def test_an_unknown_block_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match="no block") as caught:
        factors_by_module(Strength(blocks=((key, 1.0),)), SDXL)
    assert near in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="no block"):
        factors_by_module(Strength(blocks=(("down", 1.0),)), FLUX)


@pytest.mark.parametrize(
    ("prediction", "family"),
    [("flow", "flux1"), ("flow", "flux2"), ("epsilon", "sdxl"), ("v", "sd2"), ("epsilon", "sd15")],
)
@pytest.mark.parametrize("role", CAMPAIGN_ROLES)
def test_role_strengths_come_from_the_bases_table(prediction: str, family: str, role: str) -> None:
    modules = list(families()[family].modules)
    text = CAMPAIGN["flow" if prediction == "flow" else "noise"][role]
    asked = parse_strength(f"campaign={role}", 0.8)
    found = in_campaign(asked, prediction, modules)
    assert found == (parse_strength(text, 0.8) if text else Strength(0.8))
    assert factors_by_module(found, modules), "the base has every block of it"
    assert in_campaign(found, prediction, modules) == found
    assert str(asked) == f"0.8@campaign={role}"
    assert parse_strength(str(asked).partition("@")[2], 0.8) == asked


def test_role_without_matching_blocks_is_a_plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.formats import strengths as campaign

    asked = Strength(0.5, campaign="lens")
    for text, other, meant in (
        ("", "double=1", "0.5"),
        ("steps=0.4-1", "", "0.5@steps=0.4-1"),
        ("single=1", "", "0.5"),
        ("", "single=1", "0.5"),
    ):
        monkeypatch.setitem(campaign.CAMPAIGN, "flow", {"product": other, "brand": "", "lens": text})
        assert str(in_campaign(asked, "flow", list(families()["sd3"].modules))) == meant


def test_role_of_two_adapters_is_refused() -> None:
    check_roles([("a", Strength()), ("b", Strength()), ("c", Strength(campaign="lens"))])
    with pytest.raises(ConfigError, match="product occurs twice: lock, mug"):
        check_roles([("lock", Strength(campaign="product")), ("mug", Strength(0.5, campaign="product"))])
