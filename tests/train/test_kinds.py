"""LoHa and LoKr runs on text and pictures; PEFT and veneer read the saved files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.tiny_image_base import tiny_image_base
from tests.train.text.conftest import base as base
from tests.train.text.conftest import shared as shared
from tests.train.text.tiny_runs import train
from tests.train.tiny_pictures import run
from veneer.core.attach import attach
from veneer.files.safetensors import read_tensors
from veneer.formats.card import read_card
from veneer.formats.peft import read_folder
from veneer.formats.read import read
from veneer.models.image.base import load_image
from veneer.models.text.base import TextBase

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("adapter", [{"kind": "loha"}, {"kind": "lokr", "factor": 4}])
def test_text_run_learns_and_is_read_back(
    adapter: dict[str, Any], shared: Path, base: TextBase, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"adapter": {"rank": 4, "dropout": 0.0, **adapter}, "schedule": {"steps": 5}}
    settings["optimizer"] = {"learning_rate": 3e-3}
    whole = train(shared, tmp_path / "whole", base, **settings)
    assert whole.validation < whole.validation_before
    assert read_card(tmp_path / "whole").card.recipe["adapter"]["kind"] == adapter["kind"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "whole")
    tokens = torch.arange(8)[None]
    with torch.no_grad(), attach(base.model) as attachment:
        attachment.add("a", read_folder(tmp_path / "whole", base.model))
        attachment.use("a")
        torch.testing.assert_close(base.model(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("family", "targets", "layout", "adapter"),
    [
        ("flux1", "attention+ff", "kohya", {"kind": "lokr"}),
        ("sdxl", "attention+ff+conv", "kohya", {"kind": "loha"}),
        ("sdxl", "attention+ff+conv", "peft", {"kind": "lokr", "factor": 4}),
    ],
)
def test_image_run_learns_and_is_read_back(
    family: str, targets: str, layout: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "adapter": {"rank": 2, "dropout": 0.0, "targets": targets, **adapter},
        "schedule": {"steps": 2},
        "evaluation": {"keep": "last"},
    }
    out = tmp_path / "out"
    result = run(tmp_path, out, family, output={"directory": str(out), "layout": layout}, **settings)
    loaded = load_image(str(tiny_image_base(tmp_path, family)))
    found = read(Path(result.adapter), base=loaded.model).adapter
    assert found.deltas
    assert not found.pairs
    if layout == "kohya":
        tensors, metadata = read_tensors(Path(result.adapter))
        assert metadata["ss_network_module"] == "lycoris.kohya"
        wanted = ".lokr_w1" if adapter["kind"] == "lokr" else ".hada_w1_a"
        assert all(any(k.endswith(s) for s in (wanted, ".alpha", *_OTHERS)) for k in tensors)


_OTHERS = (".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
