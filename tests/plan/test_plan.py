"""Plans: whether a run fits, which settings make it fit, and its cost; GPUs; serving."""

from __future__ import annotations

import json

import pytest

from veneer.core.adapter import LoraSpec
from veneer.errors import ConfigError
from veneer.ops.profile import profile
from veneer.plan.fit import usable_memory
from veneer.plan.image import ImageLoad
from veneer.plan.memory import Load, dtype_bytes, text_counts
from veneer.plan.plan import Plan, TrainingJob, image_plan, text_plan
from veneer.plan.render import plan_text, rough_duration
from veneer.plan.serving import Traffic, serving
from veneer.plan.shape import pair_parameters, text_shape
from veneer.plan.tables import base_config, cpu_device, device_by_cuda_name, device_named
from veneer.plan.time import rates_of


def plan(base: str, gpu: str, load: Load, *, count: int = 1, **more: object) -> Plan:
    device = device_named(gpu, count=count, price=2.5)
    return text_plan(base, text_shape(base_config(base)), load, device, TrainingJob(5000, 600, 3), **more)  # type: ignore[arg-type]


TICKETS = Load((600,) * 3, micros=6)


def test_a_70b_model_fits_80_gb_only_in_4_bits() -> None:
    found = plan("meta-llama/Llama-3.1-70B", "h100-80gb", TICKETS)
    assert not found.fits
    assert found.changes[0].settings[-1] == "base.quantize=nf4"
    assert found.changes[0].peak <= found.available
    assert found.cost == pytest.approx(found.seconds / 3600 * 2.5)  # type: ignore[operator]
    text = plan_text(found)
    assert text.splitlines()[0].startswith("It does not fit")
    assert "$" in text.splitlines()[2]


def test_an_8b_model_fits_without_changed_settings() -> None:
    found = plan("meta-llama/Llama-3.1-8B", "h100-80gb", TICKETS)
    assert found.fits
    assert not found.changes
    assert plan_text(found).startswith("It fits: ")


def test_every_proposed_change_fits_and_is_different() -> None:
    found = plan("meta-llama/Llama-3.1-8B", "rtx-4090", Load((600,) * 6))
    assert not found.fits
    kinds = [change.names for change in found.changes]
    assert len(set(kinds)) == len(kinds) > 3
    assert all(change.peak <= found.available < found.peak for change in found.changes)
    assert kinds[0] == ("recompute activations",)
    assert found.changes[0].slower > 1


def test_a_run_that_cannot_fit_has_no_price() -> None:
    found = plan("meta-llama/Llama-3.1-405B", "rtx-3060-12gb", Load((2048,) * 4))
    assert not found.changes
    assert found.seconds is None
    assert found.cost is None
    assert "no three changes together make it fit" in plan_text(found)


def test_more_devices_divide_the_weights() -> None:
    one = plan("meta-llama/Llama-3.1-70B", "h100-80gb", TICKETS)
    four = plan("meta-llama/Llama-3.1-70B", "h100-80gb", TICKETS, count=4)
    assert not one.fits
    assert four.fits
    assert four.memory == one.memory
    assert four.peak < one.peak / 2


def test_a_plan_is_json() -> None:
    found = plan("meta-llama/Llama-3.1-70B", "h100-80gb", TICKETS, traffic=Traffic())
    again = json.loads(json.dumps(found.to_dict()))
    assert again["fits"] is False
    assert sum(v for k, v in again["memory"].items() if k != "host") == found.memory.peak


def test_flux_fits_24_gb_with_recomputing_and_nf4() -> None:
    device = device_named("rtx-4090")
    found = image_plan("flux.1-dev", base_config("flux.1-dev"), ImageLoad(), device, TrainingJob(20, 1, 35, 1))
    assert set(found.changes[0].settings) == {"memory.activation_checkpointing=on", "base.quantize=nf4"}
    assert "text encoders and VAE" in plan_text(found)


def test_each_pass_takes_two_operations_per_weight_and_token() -> None:
    """Frozen weights need no gradient, but A and B do. DoRA and dropout together multiply each weight twice."""
    shape, device = text_shape(base_config("meta-llama/Llama-3.1-8B")), device_named("h100-80gb")
    counts = text_counts(shape, Load((1,) * 64), device)
    pairs = 2 * 64 * pair_parameters(shape)
    assert counts.forward == pytest.approx(2 * 64 * shape.matrices + pairs, rel=0.01)
    assert counts.backward == pytest.approx(2 * 64 * shape.matrices + 2 * pairs, rel=0.01)
    assert counts.head == 4 * 64 * 128256 * 4096
    for more, times in (({"dropout": 0.1}, 1), ({"dora": True}, 1), ({"dora": True, "dropout": 0.1}, 2)):
        found = text_counts(shape, Load((1,) * 64, spec=LoraSpec(**more)), device)
        assert found.forward - pairs == pytest.approx(times * (counts.forward - pairs), rel=0.01)


def test_experts_count_only_for_tokens_routed_to_them() -> None:
    shape, device = text_shape(base_config("Qwen/Qwen3-30B-A3B")), device_named("h100-80gb")
    assert text_counts(shape, Load((64,)), device).forward < 2 * 64 * 3.4e9


def test_time_grows_with_rows_and_with_recomputing() -> None:
    shape, device = text_shape(base_config("smollm2-135m")), device_named("rtx-4090")

    def seconds(load: Load, rows: int = 100) -> float:
        found = text_plan("b", shape, load, device, TrainingJob(rows, 512, 1)).seconds
        assert found is not None
        return found

    assert seconds(Load((512,)), 200) == pytest.approx(2 * seconds(Load((512,))))
    assert seconds(Load((512,), checkpointing=True)) > 1.2 * seconds(Load((512,)))


def test_gpus_are_found_by_similar_names() -> None:
    assert device_named("RTX 4090").name == device_named("rtx4090").name == "rtx-4090-24gb"
    assert device_named("h100-80gb", price=1.0).price == 1.0
    with pytest.raises(ConfigError, match="no GPU 'h900'"):
        device_named("h900")


@pytest.mark.parametrize(
    ("name", "mib", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA L40S", 46068, "l40s-48gb"),
        ("NVIDIA Something 9000", 10000, "NVIDIA Something 9000"),
    ],
)
def test_a_card_is_recognized_by_its_cuda_name(name: str, mib: int, found: str) -> None:
    device = device_by_cuda_name(name, mib << 20)
    assert device.name == found
    assert device.memory == pytest.approx(mib << 20, rel=0.01)


def test_a_plan_for_a_card_names_its_assumptions() -> None:
    shape, device = text_shape(base_config("meta-llama/Llama-3.1-70B")), device_named("h100-80gb")
    made = text_plan("b", shape, Load((600,) * 3), device, TrainingJob(5000, 600.0))
    text = plan_text(made)
    assert "both assumed" in text
    assert "its allocator cannot place are assumed" in text
    assert "from CPU memory, assumed" not in text
    pictures = image_plan(
        "flux.1-dev",
        base_config("flux.1-dev"),
        ImageLoad(checkpointing=True),
        device,
        TrainingJob(20, 1, 35, 1),
        available=20 * 10**9,
    )
    assert any("memory.offload_blocks=" in change.text for change in pictures.changes)
    assert "from CPU memory, assumed" in plan_text(pictures)
    small = text_plan("b", shape, Load((600,), quantize="nf4"), device, TrainingJob(5000, 600.0))
    assert "from CPU memory, assumed" not in plan_text(small)


def test_a_cpu_is_as_fast_as_its_profile() -> None:
    found = {dtype: rates_of(cpu_device(), dtype) for dtype in ("float32", "bfloat16")}
    measured = profile()
    for dtype, rates in found.items():
        assert rates.operations < 1e9 * measured.rate(dtype) < 4 * rates.operations
        assert rates.bandwidth < 1e9 * measured.bandwidth < 4 * rates.bandwidth
    card = device_named("h100-80gb")
    assert 3 * rates_of(card, "float32").operations < rates_of(card).operations


def test_adapters_fill_the_memory_that_the_base_leaves() -> None:
    shape, device = text_shape(base_config("meta-llama/Llama-3.1-8B")), device_named("h100-80gb", price=2.5)
    found = serving(shape, device, rates_of(device), Traffic())
    assert found.adapter_bytes == dtype_bytes("bfloat16") * pair_parameters(shape)
    assert found.cache_bytes == 2 * 32 * 8 * 128 * 2 * 700 * 32  # keys and values of every layer, position and request
    held = 2 * shape.parameters + found.cache_bytes + found.adapters * found.adapter_bytes
    assert held <= device.memory < held + 0.1 * device.memory
    quantized = serving(shape, device, rates_of(device), Traffic(), quantize="nf4")
    assert quantized.adapters > found.adapters


def test_one_request_is_bound_by_bandwidth_many_by_operations() -> None:
    shape, device = text_shape(base_config("meta-llama/Llama-3.1-8B")), device_named("h100-80gb")
    rates = rates_of(device)
    alone = serving(shape, device, rates, Traffic(prompt=1, answer=1000, together=1))
    weights = 2 * (shape.parameters - 128256 * 4096)  # looking up a token reads only one row of the embedding
    assert alone.tokens_per_second == pytest.approx(rates.bandwidth / weights, rel=0.1)
    many = serving(shape, device, rates, Traffic(prompt=1, answer=1000, together=64))
    assert 10 * alone.tokens_per_second < many.tokens_per_second < 64 * alone.tokens_per_second


def test_a_large_base_is_served_by_several_devices() -> None:
    device = device_named("h100-80gb", price=2.5)
    found = serving(text_shape(base_config("meta-llama/Llama-3.1-70B")), device, rates_of(device), Traffic())
    assert found.devices == 2


def test_usable_memory_leaves_a_margin() -> None:
    device = device_named("h100-80gb")
    assert 0.9 * device.memory < usable_memory(device) < device.memory


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "under 1 s"), (40, "40 s"), (720, "12 min"), (12000, "3 h 20 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text
