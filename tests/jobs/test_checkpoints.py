"""A job's checkpoints are added to the library or skipped; sample images are available during training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.run import run
from tests.jobs.small import STEPS, small_config
from tests.library.conftest import quick  # noqa: F401
from tests.tiny_base import tiny_base_dir
from tests.train.tiny_pictures import image_values
from veneer.adapters.use import load_adapter
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.errors import ConfigError, UnavailableError
from veneer.files.safetensors import write_tensors
from veneer.formats import peft
from veneer.jobs.checkpoints import checkpoint_name, publish_checkpoints, sample_file, store_checkpoint
from veneer.jobs.process import run_job
from veneer.jobs.store import Job, JobStore
from veneer.jobs.validate import submit_job
from veneer.library.library import open_library
from veneer.models.text.base import load_text
from veneer.plan.tables import Device, device_named
from veneer.train.config.load import config_from


@pytest.fixture
def store(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:  # noqa: F811
    with open_library(quick / "library") as library:
        monkeypatch.setenv("VENEER_LIBRARY", library.location)
        yield JobStore(library)


@pytest.fixture(scope="module")
def device() -> Device:
    return device_named("h100-80gb")  # a fixed device: nothing is benchmarked


def submitted(store: JobStore, device: Device, values: dict[str, Any]) -> Job:
    config, _ = config_from({"output": "runs/support", **values})
    job = submit_job(store, config, device=device)
    assert job.state == "queued", job.error
    return job


def trained(store: JobStore) -> Job:
    lease = store.acquire("here", 600)
    assert run_job(store.library, lease.job.id, lease.token) == 0
    job = store.get(None, lease.job.id)
    assert job.state == "succeeded", job.error
    return job


def test_steps_are_published_during_training(store, device, tmp_path, monkeypatch, capsys):
    values = small_config(tmp_path, checkpoint={"every": 1, "adapters": True, "keep": 2})
    submitted(store, device, values)
    add, away = store.library.add, [UnavailableError("the store is away")]

    def adding(path: Any, name: str, **options: Any) -> Any:
        if away:
            raise away.pop()
        return add(path, name, **options)

    monkeypatch.setattr(store.library, "add", adding)
    job = trained(store)
    events, _ = store.events(None, job.id)
    steps = [(event.kind, event.data["step"]) for event in events if event.kind in ("metrics", "checkpoint")]
    # although adding the first checkpoint failed once, checkpoints are added before the run ends
    assert [step for kind, step in steps if kind == "checkpoint"] == [1, 2, 3]
    assert steps.index(("checkpoint", 2)) < steps.index(("metrics", 3))
    metrics = next(event.data for event in events if event.kind == "metrics")
    assert metrics["memory_bytes"] > 0
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"], rel=0.01)
    name = checkpoint_name(job)
    points = store.checkpoints(None, job.id)
    assert [(point.step, point.reference) for point in points] == [(n, f"{name}@{n}") for n in (3, 2, 1)]
    result = store.library.find("support")
    assert store.library.find(f"{name}@{STEPS}").digest == result.digest  # the result equals the last checkpoint
    assert store.library.find(f"{name}@1").digest != result.digest
    first = store.library.find(f"{name}@1")
    assert first.card["metrics"]["steps"] == 1

    base = load_text(values["base"])
    start, final = (load_adapter(base, str(store.library.resolve(r))) for r in (first.reference, "support"))
    assert dict(final.tensors()).keys() == dict(start.tensors()).keys()

    output = run(capsys, "jobs", "--library", store.library.location, "show", job.id).out
    assert f"published    {name}@3, {name}@2, {name}@1" in output
    ran = run(capsys, "jobs", "--library", store.library.location, "keep", job.id, "--step", "2", "--json")
    assert json.loads(ran.out) == {"reference": "support@2", "aliases": []}
    version = store_checkpoint(store, job.id, 1, alias="prod")
    assert (version.name, version.digest) == ("support", first.digest)
    assert store.library.find("support@prod").digest == first.digest
    assert store_checkpoint(store, job.id).digest == result.digest
    with pytest.raises(ConfigError, match=r"(?s)step 9 .*is not in the library.*has steps 1, 2, 3"):
        store_checkpoint(store, job.id, 9)


def test_sample_images_are_available_during_training(store: JobStore, device: Device, tmp_path: Path) -> None:
    values = image_values(
        tmp_path,
        tmp_path / "support",
        samples={"prompts": ["sks, a house"], "every": 2, "steps": 2, "size": 32},
        checkpoint={"every": 2, "adapters": True},
        schedule={"steps": 4},
        data={"trigger": "sks", "split": 0},
    )
    submitted(store, device, values)
    job = trained(store)
    steps = [event.data["step"] for event in store.events_of(None, job.id, "sample")]
    assert steps == [0, 2, 4]
    for step in steps:
        with Image.open(sample_file(store, job, step)) as sheet:
            assert min(sheet.size) >= 32
    with pytest.raises(ConfigError, match="after steps 0, 2, 4"):
        sample_file(store, job, 3)
    name = checkpoint_name(job)
    assert [point.reference for point in store.checkpoints(None, job.id)] == [f"{name}@4", f"{name}@2"]
    version = store.library.find(f"{name}@2")
    assert (version.kind, version.trigger_words) == ("image", ["sks"])


def test_omitted_checkpoint_is_a_warning_with_the_reason(tmp_path: Path) -> None:
    base = load_text(str(tiny_base_dir(tmp_path)))
    adapter = create(base.model, LoraSpec(rank=2, targets="q_proj"), seed=0)
    peft.write_folder(adapter, tmp_path / "adapter")
    tensors = dict(adapter.tensors())
    first = next(iter(tensors))
    states = {
        1: tensors,
        2: {key: tensor for key, tensor in tensors.items() if key != first},
        3: {**tensors, "more": torch.zeros(1)},
        4: {**tensors, first: torch.zeros(5, 5)},
    }
    for step, state in states.items():
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        write_tensors(folder / "adapter.safetensors", state)
    messages: list[str] = []
    library = open_library(tmp_path / "library")
    references = publish_checkpoints(library, "job", tmp_path / "run", tmp_path / "adapter", messages.append)
    assert references == {1: "job@1"}
    shape = tuple(tensors[first].shape)
    assert [message.partition("library: ")[2] for message in messages] == [
        f"{first} is missing, but {shape} in the final adapter",
        "more is (1,), but missing in the final adapter",
        f"{first} is (5, 5), but {shape} in the final adapter",
    ]
