"""Preference training from rows to gradients, compared with TRL's trainers on the same base and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_base import tiny_base_dir
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.formats import peft as peft_folder
from veneer.models.text.base import load_text
from veneer.train.config.load import config_from
from veneer.train.text.data import encode_split, planned_steps
from veneer.train.text.preference import Preference
from veneer.train.text.rows import read_rows

pytestmark = pytest.mark.peers

PAIRS = [
    {"prompt": f"The printer {i} does not", "chosen": f" answer. Sorry{' again' * i}.", "rejected": f" work, {i}!"}
    for i in range(4)
]
JUDGED = [
    {"prompt": "The printer does not", "completion": " answer. Sorry.", "label": True},
    {"prompt": "I was charged", "completion": " twice, so what?", "label": False},
]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, TRL's
    "dpo": ({}, {"loss_type": "sigmoid"}),
    "dpo, normalized": ({"length_normalized": True}, {"loss_type": "sigmoid_norm"}),
    "ipo": ({}, {"loss_type": "ipo"}),
    "kto": ({"desirable": 1.2}, {"desirable_weight": 1.2}),
    "orpo": ({"nll": 0.0}, {}),
    "simpo": ({}, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}),
}


def trainer_of(name: str, folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "beta": 0.1,
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    if name == "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        common["train_sampling_strategy"] = "sequential"
    elif name == "simpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    elif name == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-base")
    if name in ("orpo", "simpo"):
        tokenizer.bos_token = None  # both trainers add a BOS token, even if the tokenizer does not
    return Trainer(
        model=model,
        args=Config(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trls(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    name = case.partition(",")[0]
    ours, theirs = CASES[case]
    rows = JUDGED if name == "kto" else PAIRS
    tiny_base_dir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config, _ = config_from(
        {
            "base": "x",
            "data": {"train": str(tmp_path / "rows.jsonl"), "chat_template": "none"},
            "output": "x",
            "preference": {"loss": name, **ours},
            "adapter": {"rank": 4},
            "schedule": {"steps": 1},
        }
    )
    base = load_text(str(tmp_path / "tiny-base"), dtype="float32")
    found, _ = read_rows(config.data.files("train"), formats={"preference", "unpaired-preference"})
    part = encode_split(found, config, base)
    adapter = create(base.model, config.adapter.spec(), seed=0)
    gen = torch.Generator().manual_seed(1)
    for p in adapter.pairs.values():
        p.B = torch.randn(p.B.shape, generator=gen) * 0.05
    peft_folder.write_folder(adapter, tmp_path / "adapter", base_name="x", base=base.model)
    with attach(base.model) as attachment:
        attachment.add("run", adapter, trainable=True)
        attachment.use("run")
        preference = Preference(config, base, attachment)
        preference.load_reference(part.items)
        (step,) = planned_steps(part.items, config, part.rows)
        preference.begin(step)
        loss = sum(preference.loss(m.make()) for m in step.micros) / step.divisor
        torch.as_tensor(loss).backward()
        got = {n: p.grad for n, p in attachment.parameters("run").items() if p.grad is not None}

    trainer = trainer_of(name, tmp_path, rows, theirs)
    set_peft_model_state_dict(trainer.model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    trainer.model.eval()  # disables dropout, so that the losses and gradients are comparable
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model, batch)
    if name == "orpo":  # TRL averages the likelihood term over prompts and batch; compare only the odds ratio
        wanted = -trainer.odds_ratio_loss(*trainer.concatenated_forward(trainer.model, batch)[:2])[0].mean()
    wanted.backward()
    assert float(torch.as_tensor(loss).detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    for full, grad in grads.items():
        key = full.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".A")
        key = key.replace(".lora_B.default.weight", ".B")
        if key in got:
            assert (got[key] - grad).norm() <= 2e-3 * grad.norm() + 1e-7, key
    assert {k.rpartition(".")[0] for k in got} == {
        n.removeprefix("base_model.model.").partition(".lora_")[0] for n in grads
    }
