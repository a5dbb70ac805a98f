"""A training step of every family on a GPU that is not there: nothing waits, and the bytes are those of the plan."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES
from tests.tiny_image_base import SMALL_DENOISERS
from veneer.plan.image import ImageLoad
from veneer.plan.memory import Load
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config, device_named
from veneer.plan.time import text_work
from veneer.plan.traced import TracedStep
from veneer.train.traced import traced_pictures, traced_together, traced_training

pytestmark = pytest.mark.usefixtures("gpu_that_is_not_there")

GPU = device_named("h100-80gb")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_waits_for_nothing(family: str) -> None:
    config = FAMILIES[family]().config.to_dict()
    found = traced_training(config, Load((24, 24, 17), trained=0.5, rank=4), GPU)
    assert not found.waits
    assert "rows without padding" in found.ways
    assert found.trace.at_peak["weights"] > 0
    assert found.trace.at_peak["optimizer"] >= 2 * found.trace.at_peak["adapter"]


NARROW = {
    "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip


@pytest.mark.parametrize(("trained", "quantise"), [(1.0, None), (1.0, "nf4"), (0.3, None)])
def test_what_comes_beside_the_base_is_as_it_is_counted(trained: float, quantise: str | None) -> None:
    """Flash attention's q, k, v and output are kept, nothing of them is copied, and the last layer goes on with the
    tokens that are read."""
    load = Load((1024, 1024), trained, quantise=quantise)
    found = traced_training({**base_config("meta-llama/Llama-3.1-8B"), **NARROW}, load, GPU)
    assert found.counted is not None
    base = found.counted.weights + found.counted.constants
    assert found.counted_peak - base == pytest.approx(found.trace.peak - found.trace.at_peak["weights"], rel=0.05)
    made = " ".join(found.trace.makers("forward"))
    assert "_varlen_attn" in made
    assert "index_copy" not in made


@pytest.mark.parametrize(
    ("name", "quantise"),
    [
        ("sdxl", None),
        ("flux.1-dev", None),
        pytest.param("flux.1-dev", "int8", marks=pytest.mark.slow),
        ("flux.2-dev", None),
        ("sd3.5-medium", "nf4"),
        ("z-image", "nf4"),
        ("qwen-image", None),
    ],
)
def test_a_step_on_pictures_waits_for_nothing(name: str, quantise: str | None) -> None:
    load = ImageLoad(pictures=2, height=64, width=64, rank=4, quantise=quantise)
    found = traced_pictures({**base_config(name), **SMALL_DENOISERS[name]}, load, GPU)
    assert not found.waits
    assert "Attention" in found.ways
    assert found.trace.at_peak["optimizer"] >= 2 * found.trace.at_peak["adapter"]


def test_runs_in_one_pass_read_the_base_once_and_compute_what_each_does_alone() -> None:
    """By hand, of 16 bits: each matrix forward and backward, but q, k and v of the first layer, below which nothing
    learns; the head both ways; norms are next to nothing."""
    fields = {**base_config("meta-llama/Llama-3.1-8B"), **NARROW, "num_hidden_layers": 2}
    load = Load((128,), rank=8)
    alone, together = traced_training(fields, load, GPU), traced_together(fields, [load] * 3, GPU)
    d, up, kv = 512, 1792, 2 * 64
    layer = 2 * d * d + 2 * d * kv + 3 * d * up
    by_hand = 2 * (2 * (2 * layer + 4096 * d) - d * (d + 2 * kv))
    assert alone.trace.weights == pytest.approx(by_hand, rel=0.01)
    assert together.trace.weights == alone.trace.weights

    def operations(found: TracedStep) -> int:
        return sum(n * each for (each, _), n in found.trace.work.items())

    assert operations(together) == pytest.approx(3 * operations(alone), rel=1e-6)
    assert operations(alone) == pytest.approx(text_work(text_shape(fields, "narrow"), load, GPU).operations, rel=0.03)
    for part in ("adapter", "optimizer"):
        assert together.trace.at_peak[part] == 3 * alone.trace.at_peak[part]
    assert not together.waits
    assert abs(together.off) < 0.1, (together.trace.at_peak, together.counted)
    assert alone.trace.kernels < together.trace.kernels < 3 * alone.trace.kernels


def test_inputs_that_wait_on_the_host_are_not_on_the_device() -> None:
    load = Load((2048,), checkpointing=True, inputs_on_host=True)
    found = traced_training(base_config("meta-llama/Llama-3.1-8B") | NARROW | {"num_hidden_layers": 12}, load, GPU)
    assert not found.waits, found.waits
    assert found.counted is not None
    assert found.counted.host == 2 * 2048 * 512 * 12
    assert abs(found.off) < 0.05, (found.trace.at_peak, found.counted)
    assert found.trace.peak < 0.95 * (found.counted_peak + found.counted.host * 8 / 12)  # eight of twelve are away


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "off"),
    [("sdxl", 0.07), ("flux.1-dev", 0.05), ("black-forest-labs/FLUX.2-klein-4B", 0.05), ("qwen-image", 0.05)],
)
def test_pictures_at_true_size_are_as_they_are_counted(name: str, off: float) -> None:
    found = traced_pictures(base_config(name), ImageLoad(), GPU)
    assert not found.waits
    assert abs(found.off) < off, (found.trace.at_peak, found.counted)
    assert name == "sdxl" or not found.trace.wide, found.trace.wide


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("meta-llama/Llama-3.1-8B", Load((600,) * 3)),
        ("meta-llama/Llama-3.1-8B", Load((2048,) * 8, checkpointing=True)),
        ("meta-llama/Llama-3.1-70B", Load((600,) * 3, quantise="nf4")),
        ("google/gemma-3-27b-it", Load((600,) * 3, quantise="nf4")),
    ],
)
def test_at_true_size_counted_and_traced_agree(name: str, load: Load) -> None:
    found = traced_training(base_config(name), load, GPU)
    assert not found.waits
    assert abs(found.off) < 0.05, (found.trace.at_peak, found.counted)


@pytest.mark.parametrize("micros", [1, 2])
def test_at_its_end_a_step_reads_its_losses_and_its_norm_and_no_more(micros: int) -> None:
    found = traced_training(FAMILIES["llama3"]().config.to_dict(), Load((24, 17), rank=4, micros=micros), GPU)
    assert sum(found.trace.waits.values()) == micros + 1, found.trace.waits
    assert not found.waits
    place = next(place for place in found.trace.waits if place.endswith(" read_losses"))
    found.trace.waits[place] += 1
    assert list(found.waits) == [place]
