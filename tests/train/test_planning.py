"""Plans from a configuration: the micro-batch that needs the most memory, and the text shown to the user."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError, DataError
from veneer.plan.memory import Load
from veneer.plan.plan import Plan, TrainingJob, text_plan
from veneer.plan.shape import text_shape
from veneer.plan.tables import Device, base_config, cpu_device, device_named
from veneer.train.config.load import TrainConfig, config_from, load_config
from veneer.train.planning import load_of, plan_of_config, sampled_at_once, suggested_settings

VALUES = {"base": "smollm2-135m", "data": {"train": "d.jsonl"}, "output": "o"}


def config(*overrides: str) -> TrainConfig:
    made, _ = config_from(VALUES, overrides)
    return made


def test_plan_uses_the_largest_micro_batch() -> None:
    lengths = [100] * 30 + [900, 1000]
    load = load_of(config("batching.rows=32"), lengths, trained=0.5, dtype="bfloat16", checkpointing=False)
    assert load.tokens == max(load.tokens, 1900)
    assert load.tokens <= 2048
    assert load.longest == 1000
    assert load.micros == 3  # 4,900 tokens in micro-batches of at most 2,048
    alone = load_of(config("batching.micro_rows=1"), lengths, trained=0.5, dtype="bfloat16", checkpointing=False)
    assert alone.lengths == (1000,)
    assert alone.micros == 16


def plan(load: Load, device: Device, room: int) -> Plan:
    shape = text_shape(base_config("meta-llama/Llama-3.1-8B"))
    return text_plan("b", shape, load, device, TrainingJob(100, 500, 1), available=room)


def test_suggested_settings_are_configuration_keys() -> None:
    card = device_named("h100-80gb")
    load = Load((500,) * 4)
    peak = plan(load, card, 1 << 62).peak
    assert suggested_settings(plan(load, card, peak - 1)) == "memory.activation_checkpointing=on"
    again = replace(load, lengths=(500,), checkpointing=True)
    peak = plan(again, card, 1 << 62).peak
    assert "data.long_rows=cut or drop" in suggested_settings(plan(again, card, peak - 1))
    assert suggested_settings(plan(load, card, 1 << 62)) == ""


PICTURES = {"base": "flux.1-dev", "data": {"pictures": "p", "resolution": 1024}, "output": "o"}


@pytest.mark.parametrize(
    ("values", "base", "own"),
    [
        (VALUES, "meta-llama/Llama-3.1-8B", ()),
        (VALUES, "meta-llama/Llama-3.1-70B", ("data.max_length=4096",)),
        (PICTURES, "flux.1-dev", ()),
        (PICTURES, "flux.1-dev", ("batching.micro_rows=1", "memory.activation_checkpointing=on")),
        (PICTURES, "stable-diffusion-xl-base-1.0", ("base.quantize=nf4",)),
        (PICTURES, "qwen-image", ("memory.offload_blocks=10",)),
    ],
)  # fmt: skip
def test_a_configuration_accepts_every_suggested_change(values: Any, base: str, own: tuple[str, ...]) -> None:
    asked = (f"base.name={base}", *own)
    made = config_from(values, asked)[0]
    advice: set[tuple[str, ...]] = set()
    card = device_named("rtx-4090")
    for gigabytes in (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 120, 160):
        small = replace(card, memory=gigabytes * 10**9)
        found = plan_of_config(made, small, rows=64, tokens_per_row=None if values is PICTURES else 2000)
        advice |= {change.settings for change in found.changes if change.device.count == small.count}
    assert len(advice) > 1
    for settings in advice:
        config_from(values, (*asked, *settings))


def test_a_configuration_without_data_is_planned_from_options(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base: smollm2-135m\ndata: {train: nowhere.jsonl}\noutput: o\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        plan_of_config(load_config(file)[0], cpu_device())
    assert "--rows and --tokens-per-row" in str(caught.value.fix)
    found = plan_of_config(load_config(file, ("schedule.epochs=2",))[0], cpu_device(), rows=64, tokens_per_row=100)
    assert (found.job.total_steps, found.job.tokens) == (8, 12800)
    with pytest.raises(ConfigError, match="no base 'smolm'"):
        plan_of_config(load_config(file, ("base.name=smolm",))[0], cpu_device(), rows=64, tokens_per_row=100)


@pytest.mark.parametrize(("key", "stored"), [("dtype", "float32"), ("torch_dtype", "float32"), ("dtype", "bfloat16")])
def test_auto_plans_the_dtype_that_the_base_is_stored_in(tmp_path: Path, key: str, stored: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**base_config("smollm2-135m"), key: stored}))
    base = f"base.name={tmp_path}"
    found = plan_of_config(config(base), cpu_device(), rows=64, tokens_per_row=100)
    given = plan_of_config(config(base, f"base.dtype={stored}"), cpu_device(), rows=64, tokens_per_row=100)
    assert found.memory == given.memory
    assert found.seconds == given.seconds


def test_sampling_adds_its_kv_cache_and_time() -> None:
    """The numbers are calculated by hand.

    SmolLM2-135M on a GPU, 64 prompts of 100 tokens, 4 completions each of at most 64 tokens, 32 at once."""
    card, own = device_named("h100-80gb"), ["reinforcement.loss=grpo", "reinforcement.rewards=[{kind: exact_match}]"]
    own += ["reinforcement.group=4", "reinforcement.max_tokens=64", "reinforcement.rows=32", "batching.rows=16"]

    def planned(*more: str, prompts: int = 64) -> Plan:
        return plan_of_config(config(*own, *more), card, rows=prompts, tokens_per_row=100)

    found = planned("schedule.epochs=1")
    assert (found.job.rows, found.job.batch, found.job.total_steps) == (64 * 4, 16 * 4, 4)
    assert found.job.tokens_per_row == 100 + 64
    # config.json: 30 layers, 3 key heads of size 64; 2 bytes per number; 32 contexts of 100 + 64 tokens
    kept = 2 * 30 * 3 * 64 * 2
    assert found.memory.cache == 32 * kept * (100 + 64)
    # A step of 32 completions reads the weights (with a tied head), the rank-16 adapter, and the keys and
    # values of contexts that are half full on average. Four completions share the computation of a prompt.
    parameters, pairs = 134_515_008, 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    read = 2 * parameters + 2 * pairs + 32 * kept * (100 / 4 + 64 / 2)
    prompt = 2 * (parameters + pairs) * 100 / 4 / found.rates.operations
    drawing = 64 * 4 * (64 * read / found.rates.bandwidth / 32 + prompt)
    assert f"256 sampled, 32 at once: {32 * kept * 164 / 1e6:.1f} MB" in dict(found.facts)["answers"]
    # the remaining time and memory are those of supervised training on the same rows
    values = {**VALUES, "batching": {"rows": 64, "micro_tokens": 2048}, "schedule": {"epochs": 1}}
    rows, _ = config_from(values)
    learned = plan_of_config(rows, card, rows=256, tokens_per_row=164)
    again = planned("schedule.epochs=1", "batching.micro_tokens=2048")
    assert again.peak - learned.peak == found.memory.cache
    assert again.seconds - learned.seconds == pytest.approx(drawing, rel=0.02)
    # if the cache leaves too little memory for training, the suggested changes leave space for the cache
    small = replace(card, memory=round((found.peak - found.memory.cache / 2) * card.memory / found.available))
    tight = plan_of_config(config(*own, "schedule.epochs=1"), small, rows=64, tokens_per_row=100)
    assert tight.available < tight.peak == found.peak < tight.available + found.memory.cache
    assert tight.changes
    assert all(change.peak + tight.memory.cache <= tight.available for change in tight.changes)
    # with two updates per rollout, the same number of steps needs half as many completions
    assert dict(planned("schedule.steps=8", "reinforcement.updates=2").facts)["answers"].startswith("256 sampled")
    assert dict(planned("schedule.steps=8").facts)["answers"].startswith("512 sampled")


def test_concurrent_samples_cover_a_step_or_the_validation_rows() -> None:
    own = ("distillation.teacher=base", "distillation.system=Be brief", "distillation.group=3", "batching.rows=4")
    assert [sampled_at_once(config(*own), held_out) for held_out in (0, 12, 20, 100)] == [12, 12, 20, 64]
    assert sampled_at_once(config(*own, "distillation.rows=5"), 20) == 5
    assert sampled_at_once(config(), 20) == 0


def test_images_are_counted_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for i in range(3):
        (tmp_path / "p" / f"{i}.png").write_bytes(b"")
    file = tmp_path / "c.yaml"
    file.write_text("base: catalogue-flux\ndata: {pictures: p}\noutput: o\nadapter: {rank: 8}\n", encoding="utf-8")
    found = plan_of_config(load_config(file, ("schedule.epochs=4",))[0], cpu_device())
    assert found.job.rows == 3
    assert dict(found.facts)["at once"].startswith("3 of 128 × 128")
    longer = plan_of_config(load_config(file, ("schedule.epochs=1000",))[0], cpu_device())
    assert ", 1,000 times: " in dict(longer.facts)["data"]


def test_a_second_base_adds_weights_and_one_forward_per_answer() -> None:
    """The numbers are calculated by hand.

    Teacher SmolLM2-1.7B, student SmolLM2-135M on a GPU, 32 prompts of 100 tokens, completions of 20
    tokens."""
    card, many = device_named("h100-80gb"), ["distillation.max_tokens=20", "data.split=0", "schedule.steps=2"]

    def planned(*own: str, device: Device = card) -> Plan:
        return plan_of_config(config(*many, *own), device, rows=32, tokens_per_row=100)

    name = "distillation.base=HuggingFaceTB/SmolLM2-1.7B-Instruct"
    beside = planned("distillation.teacher=base", name)
    one_each = ("reinforcement.loss=reinforce", "reinforcement.group=1", "reinforcement.exact=false")
    rewarded = ("reinforcement.rewards=[{kind: exact_match}]", "reinforcement.max_tokens=20", *many[1:])
    away = plan_of_config(config(*one_each, *rewarded), card, rows=32, tokens_per_row=100)
    # config.json: 24 layers of width 2048, 32 heads of size 64 and as many key heads, MLP of width 8192,
    # vocabulary of 49152 tokens, tied head
    d, inner, vocabulary, layers = 2048, 8192, 49152, 24
    matrices = layers * (4 * d * d + 3 * d * inner)
    weights = 2 * (matrices + layers * 2 * d + d + vocabulary * d)
    assert beside.memory.teacher == weights
    told = planned("distillation.teacher=base", "distillation.system=Be brief")
    assert beside.peak - told.peak == weights
    assert beside.available == told.available == away.available
    # 2 steps of 16 rows of 120 tokens; each token is multiplied by all matrices and attends to earlier tokens
    load = beside.planned[0]
    assert isinstance(load, Load)
    operations = 2.0 * load.tokens * matrices + 2.0 * load.trained_tokens * vocabulary * d
    operations += layers * 4.0 * 32 * 64 * sum(n * (n + 1) / 2 for n in load.lengths)
    one = operations / beside.rates.operations + weights / beside.rates.bandwidth
    assert beside.seconds - away.seconds == pytest.approx(32 * 120 / load.tokens * one, rel=0.02)
    assert "1,711,376,384 parameters" in dict(beside.facts)["teacher"]

    # a teacher adds no weights if it is an adapter, or the same base with a system message
    assert told.memory.teacher == 0
    assert away.seconds < told.seconds < beside.seconds  # type: ignore[operator]
    # if the teacher leaves too little memory, the suggested changes leave space for the teacher
    small = device_named("rtx-4090")
    alone, both = (
        planned("base.name=meta-llama/Llama-3.1-8B", "batching.rows=8", "distillation.teacher=base", more, device=small)
        for more in ("distillation.system=Be brief", "distillation.base=meta-llama/Llama-3.1-8B")
    )
    assert alone.fits
    assert not both.fits
    assert all(change.peak + both.memory.teacher <= both.available for change in both.changes)
