"""A job's checkpoints are added to the library, or a warning gives the reason."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.files.safetensors import write_tensors
from veneer.formats import peft
from veneer.jobs.checkpoints import publish_checkpoints
from veneer.library.library import open_library
from veneer.models.text.base import load_text


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
    reason = "was not added to the library: its tensors differ in name or shape from the final adapter's"
    assert messages == [f"warning: the checkpoint of step {step} {reason}" for step in (2, 3, 4)]
