"""The smallest card of an image base: its settings fit there by the plan, and none fits the next smaller one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from veneer.plan.cards import CARDS, CardFit, image_settings, loaded_bytes, smallest_card
from veneer.plan.fit import usable_memory
from veneer.plan.image import ImageLoad, image_counts, image_memory, is_denoiser
from veneer.plan.plan import TrainingJob, image_plan
from veneer.plan.tables import base_config, base_names, device_named
from veneer.plan.time import Rates

BASES = [name for name in base_names() if is_denoiser(base_config(name))]
RATES = Rates(1e14, 1e12, "of a test")


def needs(config: dict[str, Any], load: ImageLoad, card: int) -> int:
    """Bytes of a card for a run with these settings, by the plan and by what loading asks for."""
    counts = image_counts(config, height=load.height, width=load.width, rank=load.rank, targets=load.targets)
    device = device_named(CARDS[card])
    return max(image_memory(counts, load, device).peak, loaded_bytes(counts, config, load))


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("name", BASES)
def test_the_settings_fit_the_card_and_nothing_fits_the_next_smaller(name: str, side: int) -> None:
    config = base_config(name)
    fit = smallest_card(config, side=side)
    assert fit is not None
    plan = image_plan(name, config, fit.load, fit.device, RATES, TrainingJob(20, batch=1))
    assert plan.fits
    assert (plan.peak, plan.room) == (fit.training, fit.room)
    assert fit.loading == loaded_bytes(image_counts(config, height=side, width=side), config, fit.load) <= fit.room
    smaller = [card for card in CARDS if card < fit.card]
    if not smaller:
        assert fit.lacking is None
        return
    blocks = len(image_counts(config, height=side, width=side).blocks)
    start = ImageLoad(1, side, side, rank=16, blocks=blocks)
    least = min(needs(config, load, smaller[-1]) for load, _ in image_settings(start))
    assert least > usable_memory(device_named(CARDS[smaller[-1]]))
    assert fit.lacking == (smaller[-1], least)


def test_ways_go_from_fast_to_frugal_and_say_what_they_set() -> None:
    start = ImageLoad(1, 1024, 1024, rank=16, blocks=10)
    ways = list(image_settings(start))
    assert ways[0] == (start, ())
    assert len({load for load, _ in ways}) == len(ways)
    for load, said in ways:
        words = dict(line.split("=") for line in said)
        assert words.get("base.quantize") == load.quantize
        assert ("memory.activation_checkpointing" in words) == load.checkpointing
        assert int(words.get("memory.offload_blocks", 0)) == load.offload
        assert load.quantize is None or not load.offload, "quantized blocks stay on the card"
        assert load.checkpointing or not load.offload, "blocks that wait on the CPU are recomputed"
        assert int(words.get("adapter.rank", 16)) == load.rank
    assert {load.offload for load, _ in ways} == {0, 3, 5, 8, 10}
    assert {load.rank for load, _ in image_settings(replace(start, rank=2))} == {2}


def test_more_pixels_never_fit_a_smaller_card() -> None:
    found: list[CardFit] = []
    for side in (256, 512, 768, 1024, 1536, 2048):
        fit = smallest_card(base_config("flux.1-dev"), side=side)
        assert fit is not None
        found.append(fit)
    assert [fit.card for fit in found] == sorted(fit.card for fit in found)
    assert found[0].card < found[-1].card
    assert smallest_card(base_config("flux.2-dev"), side=16_384) is None


def test_loading_asks_for_no_more_than_is_planned() -> None:
    """A denoiser and text encoders in 4 bits, CLIP and the VAE in 16; then the planned rest is what encoding takes."""
    config = base_config("flux.1-dev")
    counts = image_counts(config, height=512, width=512)
    load = ImageLoad(1, 512, 512, quantize="nf4")
    weights = 0.6 * (counts.parameters + config["encoders"]["text_encoder_2"])
    weights += 2 * (config["encoders"]["text_encoder"] + config["vae"])
    more = loaded_bytes(counts, config, replace(load, height=1024, width=1024)) - loaded_bytes(counts, config, load)
    assert loaded_bytes(counts, config, load) > weights + more / 3
