"""Adapters that PEFT creates for each task type have the same outputs in veneer.

The models are tiny instances of the task's class."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.edits import edit_json
from tests.formats.twins import our_outputs, peft_folder
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.convert import write
from veneer.formats.read import read

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 60, "max_position_embeddings": 64}
DECODER = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "pad_token_id": 0, "num_labels": 3}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 60}

TASKS = {
    "SEQ_CLS Llama": ("SEQ_CLS", "LlamaForSequenceClassification", DECODER),
    "SEQ_CLS BERT": ("SEQ_CLS", "BertForSequenceClassification", {**SMALL, "num_labels": 3}),
    "SEQ_CLS RoBERTa": ("SEQ_CLS", "RobertaForSequenceClassification", {**SMALL, "num_labels": 3}),
    "SEQ_CLS GPT-2": ("SEQ_CLS", "GPT2ForSequenceClassification", GPT2),
    "TOKEN_CLS BERT": ("TOKEN_CLS", "BertForTokenClassification", {**SMALL, "num_labels": 3}),
    "TOKEN_CLS Qwen 3": ("TOKEN_CLS", "Qwen3ForTokenClassification", {**DECODER, "head_dim": 8}),
    "QUESTION_ANS BERT": ("QUESTION_ANS", "BertForQuestionAnswering", SMALL),
    "SEQ_2_SEQ_LM T5": ("SEQ_2_SEQ_LM", "T5ForConditionalGeneration", T5),
    "FEATURE_EXTRACTION BERT": ("FEATURE_EXTRACTION", "BertModel", SMALL),
    "CAUSAL_LM GPT-2": ("CAUSAL_LM", "GPT2LMHeadModel", GPT2),
    "no task, Llama": (None, "LlamaForSequenceClassification", DECODER),
}


def build(case: str) -> nn.Module:
    _, name, settings = TASKS[case]
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return kind(kind.config_class(**settings)).double().eval()


def outputs(net: nn.Module) -> Tensor:
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    more = {"decoder_input_ids": ids[:, :4]} if "T5" in type(getattr(net, "base_model", net)).__name__ else {}
    if hasattr(net, "peft_config"):
        more = {"decoder_input_ids": ids[:, :4]} if net.config.model_type == "t5" else {}
    with torch.no_grad():
        out = net(input_ids=ids, **more)
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(out)


def made(case: str, path: Path, **config: object) -> Tensor:
    """Write a folder with PEFT's default targets and heads; return PEFT's outputs."""
    return peft_folder(build(case), path, outputs, **{"task_type": TASKS[case][0], "r": 4, **config})


def ours(case: str, path: Path) -> Tensor:
    net = build(case)
    return our_outputs(net, peft.read_folder(path, net), outputs)


@pytest.mark.parametrize("case", TASKS)
def test_every_task_type_matches_pefts_outputs(tmp_path, case):
    """PEFT chooses its default targets for the architecture, and adds the task's head."""
    want = made(case, tmp_path / "a")
    torch.testing.assert_close(ours(case, tmp_path / "a"), want, rtol=1e-9, atol=1e-9)
    peft.read_folder(tmp_path / "a")  # reading also works without the base


@pytest.mark.parametrize("case", ["SEQ_CLS Llama", "SEQ_CLS GPT-2"])
def test_all_linear_excludes_the_head(tmp_path, case):
    want = made(case, tmp_path / "a", target_modules="all-linear")
    torch.testing.assert_close(ours(case, tmp_path / "a"), want, rtol=1e-9, atol=1e-9)


def test_unmatched_target_names_are_only_noted(tmp_path):
    """Scripts often use one list of target modules for several architectures."""
    targets = ["q_proj", "v_proj", "query", "value", "c_attn"]
    want = made("SEQ_CLS Llama", tmp_path / "a", target_modules=targets)
    torch.testing.assert_close(ours("SEQ_CLS Llama", tmp_path / "a"), want, rtol=1e-9, atol=1e-9)
    notes = peft.load_folder(tmp_path / "a", build("SEQ_CLS Llama")).notes
    assert sum("it has no effect" in note for note in notes) == 3


def test_targeted_module_without_tensors_is_refused(tmp_path):
    made("SEQ_CLS Llama", tmp_path / "a", target_modules=["q_proj", "v_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if "v_proj" not in k}, path)
    with pytest.raises(AdapterError, match="v_proj: target_modules selects this linear module"):
        peft.read_folder(tmp_path / "a", build("SEQ_CLS Llama"))


def test_missing_targets_mean_pefts_defaults(tmp_path):
    want = made("CAUSAL_LM GPT-2", tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", "target_modules")
    torch.testing.assert_close(ours("CAUSAL_LM GPT-2", tmp_path / "a"), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", TASKS)
def test_converted_folder_keeps_its_task_in_peft(tmp_path, case):
    from peft import PeftModel

    want = made(case, tmp_path / "a")
    write(read(tmp_path / "a").adapter, tmp_path / "b", "peft")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] == TASKS[case][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(build(case), str(tmp_path / "b")).eval()
    torch.testing.assert_close(outputs(again), want, rtol=1e-9, atol=1e-9)
    assert peft.load_folder(tmp_path / "b").adapter.card.extra.get("task_type", "CAUSAL_LM") == (
        TASKS[case][0] or "CAUSAL_LM"
    )
