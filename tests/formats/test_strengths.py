"""Strengths by block, component and step: read, checked, and resolved to modules."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError
from veneer.formats.strengths import Strength, factors_by_module, parse_strength
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
    assert parse_strength("1,0,0,0,1,1,1,1,1,1,0,0").weights == (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0)
    assert str(Strength()) == "1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing stands"),
        ("down=x", "not a strength"),
        ("down=inf", "not a strength"),
        ("=1", "no key"),
        ("down=1,down=2", "twice"),
        ("steps=0-2", "not a range"),
        ("steps=0.6-0.2", "not a range"),
        ("steps=0-0.6+0.5-1", "overlap"),
        ("steps=half", "not a range"),
        ("steps=0-1,steps=0-1", "twice"),
        ("1,2,3", "a list of 3"),
        ("1,0,0,0,1,1,1,1,1,1,0,0,down=1", "two ways"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_strength(text)


def test_steps_act_within_their_ranges() -> None:
    some = parse_strength("steps=0-0.3:0.2+0.6-1")
    assert [some.at(i / 10) for i in range(10)] == [0.2] * 3 + [0.0] * 3 + [1.0] * 4
    assert some.edges == (0.0, 0.3, 0.6)
    assert Strength().at(0.5) == 1.0
    assert Strength().edges == (0.0,)


def test_blocks_become_modules() -> None:
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


def test_kohyas_list_goes_to_its_blocks() -> None:
    found = factors_by_module(parse_strength("0.1,0,0,0,1,0.5,1,1,1,1,0,0"), SDXL)
    assert {f for m, f in found.items() if m.startswith("text_encoder")} == {0.1}
    assert found["unet.mid_block.attentions.0.proj_in"] == 0.5
    assert found["unet.down_blocks.1.attentions.0.proj_in"] == 0.0  # IN04


@pytest.mark.parametrize(("key", "near"), [("dwon", "down"), ("txt", "text"), ("mid_blok", "mid"), ("down.7", "down.")])
def test_an_unknown_block_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match="no block") as caught:
        factors_by_module(Strength(blocks=((key, 1.0),)), SDXL)
    assert near in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="no block"):
        factors_by_module(Strength(blocks=(("down", 1.0),)), FLUX)
