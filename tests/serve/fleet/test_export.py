"""Exported folders: the deltas that vLLM and TGI read from them, and adapters that they cannot read."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.cli.run import run
from tests.formats.twins import model, our_outputs, outputs, peft_outputs, random_adapter
from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.init import create
from veneer.errors import AdapterError, ConfigError
from veneer.formats import peft
from veneer.models.builtin import BUILTIN, builtin_folder
from veneer.models.text.base import load_text
from veneer.serve.fleet.export import export
from veneer.serve.fleet.mixes import served_name
from veneer.serve.request import make_mix

PATTERNS = LoraSpec(rank=4, alpha=6, rank_pattern={"q_proj": 2, "down_proj": 3}, alpha_pattern={"v_proj": 7})
STABLE = LoraSpec(rank=6, alpha=5, targets=("k_proj", "up_proj"), rslora=True)
SOME_LAYERS = LoraSpec(rank=2, alpha=3, targets=("o_proj", "gate_proj"), layers=(1,))


def made(net: nn.Module, spec: LoraSpec) -> Adapter:
    return random_adapter(create(net, spec, seed=0)).mapped(lambda t: t.double())


def saved(tmp_path: Path, adapter: Adapter) -> tuple[str, Path]:
    """(base's folder, adapter's folder): the tiny base, with this adapter."""
    base = tiny_base_dir(tmp_path)
    adapter.card = replace(adapter.card, base=str(base))
    return str(base), peft.write_folder(adapter, tmp_path / "adapter").folder


def as_tgi_reads(folder: Path, layers: int) -> dict[str, Tensor]:
    """ΔW by module as TGI's loader makes them: `prepare_weights` in server/text_generation_server/adapters/lora.py and
    the kernels' `pad_rank`, on one GPU; the oversights are TGI's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    rank, kinds = config["r"], defaultdict(dict)
    for key in tensors:
        if found := re.fullmatch(r"base_model\.model\.(model\.layers\.(\d+)\.\w+\.(\w+))\.lora_A\.weight", key):
            kinds[found[3]][int(found[2])] = found[1]
    out = {}
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        if set(kinds[kind]) != set(range(layers)):
            continue  # dropped in all layers
        scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
        ranks = set()
        for name in kinds[kind].values():
            A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            out[name] = scale * B @ A
            ranks.add(len(A))
        assert len(ranks) == 1  # they are stacked
        own = ranks.pop()
        rank = 8 if own <= 8 else -(-own // 16) * 16  # the configuration is changed for the kinds that follow
    return out


@pytest.mark.parametrize("spec", [PATTERNS, STABLE, SOME_LAYERS])
def test_vllms_folder_has_the_same_delta_in_peft(tmp_path, spec):
    net = model("llama3")
    adapter = made(net, spec)
    base, place = saved(tmp_path, adapter)
    done = export(str(place), "vllm", tmp_path / "out")
    ours = our_outputs(net, adapter)
    assert (ours - outputs(net)).abs().max() > 1e-3
    torch.testing.assert_close(peft_outputs(net, tmp_path / "out"), ours, rtol=1e-9, atol=1e-9)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert done.name == served_name(make_mix([(adapter.digest(), 1.0)]))
    assert done.command == f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules {done.name}={done.folder}"
    again = export(str(place), "vllm", tmp_path / "out")
    assert again == done


@pytest.mark.parametrize("spec", [PATTERNS, STABLE, SOME_LAYERS])
def test_tgi_reads_every_delta_exactly(tmp_path, spec):
    net = model("llama3")
    adapter = made(net, spec)
    _, place = saved(tmp_path, adapter)
    layers = net.config.num_hidden_layers
    done = export(str(place), "tgi", tmp_path / "out")
    want = {name: p.scale * p.B.double() @ p.A.double() for name, p in adapter.pairs.items()}

    def right(read: dict[str, Tensor]) -> bool:
        return set(want) <= set(read) and all(
            torch.allclose(read[n], want.get(n, torch.zeros_like(read[n])), rtol=1e-6, atol=1e-6) for n in read
        )

    assert right(as_tgi_reads(tmp_path / "out", layers))
    if spec is not PATTERNS:  # whose ranks TGI cannot stack
        assert not right(as_tgi_reads(place, layers))
    ours = our_outputs(net, adapter)  # before PEFT puts its layers into the model
    torch.testing.assert_close(peft_outputs(net, tmp_path / "out"), ours, rtol=1e-9, atol=1e-9)
    assert set(done.ranks) == {16}
    assert done.command.startswith(f"LORA_ADAPTERS={done.name}=")
    if spec is SOME_LAYERS:
        assert any("pairs of zeros" in note for note in done.notes)


@pytest.mark.parametrize(
    ("spec", "server", "why"),
    [
        (LoraSpec(rank=2, targets=("q_proj",), dora=True), "vllm", "does not support DoRA"),
        (LoraSpec(rank=2, targets=("q_proj",), dora=True), "tgi", "does not support DoRA"),
        (LoraSpec(rank=2, targets=("q_proj",), modules_to_save=("lm_head",)), "vllm", "no full copies"),
        (LoraSpec(rank=2, targets=("q_proj", "lm_head")), "tgi", "drops a pair of any but"),
        (LoraSpec(rank=2, targets=("q_proj", "embed_tokens")), "tgi", "does not support a pair of an embedding"),
    ],
)
def test_unsupported_adapters_are_refused_and_can_be_merged(tmp_path, spec, server, why):
    adapter = made(model("llama3", torch.float32), spec)
    _, place = saved(tmp_path, adapter)
    with pytest.raises(AdapterError, match=why) as refusal:
        export(str(place), server, tmp_path / "out")
    assert "--merge" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_merged_export_is_a_full_model(tmp_path):
    base = load_text(str(tiny_base_dir(tmp_path)), dtype="float32")
    adapter = random_adapter(create(base.model, LoraSpec(rank=2, targets=("q_proj",), dora=True), seed=0))
    _, place = saved(tmp_path, adapter.mapped(lambda t: t.float()))
    done = export(str(place), "vllm", tmp_path / "out", merge=True)
    assert done.command == f"vllm serve {tmp_path / 'out'}"
    merged = load_text(str(tmp_path / "out"), dtype="float32")
    want = our_outputs(base.model, adapter)
    torch.testing.assert_close(outputs(merged.model), want, rtol=1e-4, atol=1e-5)


def test_an_export_without_a_known_base_is_refused(tmp_path):
    adapter = made(model("llama3", torch.float32), STABLE)
    place = peft.write_folder(adapter, tmp_path / "adapter").folder
    with pytest.raises(ConfigError, match="which base"):
        export(str(place), "tgi", tmp_path / "out")
    with pytest.raises(ConfigError, match="no export for 'sglang'"):
        export(str(place), "sglang", tmp_path / "out")
    assert "vllm serve BASE" in export(str(place), "vllm", tmp_path / "out").command


def test_export_prints_the_serving_command(tmp_path, capsys):
    base, place = saved(tmp_path, made(model("llama3", torch.float32), STABLE))
    ran = run(capsys, "export", str(place), str(tmp_path / "out"), "--for", "vllm")
    assert ran.code == 0, ran.err
    assert "serve it: vllm serve" in ran.out
    ran = run(capsys, "export", str(place), str(tmp_path / "tgi"), "--for", "tgi", "--json")
    assert json.loads(ran.out)["ranks"] == {"16": 4}
    converted = str(tmp_path / "converted")
    ran = run(capsys, "adapter", "convert", str(place), "--to", "tgi", "--base", base, "-o", converted)
    assert ran.code == 0, ran.err
    assert peft.read_folder(converted).digest() == peft.read_folder(tmp_path / "tgi").digest()
    ran = run(capsys, "adapter", "convert", str(place), "--to", "tgi", "-o", converted)
    assert "--base" in ran.err
    ran = run(capsys, "export", str(place), str(tmp_path / "x"), "--for", "ollama")
    assert ran.code == 2
    assert "vllm or tgi" in ran.err


def test_exports_serve_built_in_bases_by_folder_or_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    _, adapter = saved(tmp_path, made(model("llama3", torch.float32), STABLE))
    elsewhere = export(str(adapter), "vllm", tmp_path / "a", base="smollm2-135m")
    assert elsewhere.command.startswith("vllm serve HuggingFaceTB/SmolLM2-135M-Instruct ")
    place = builtin_folder(BUILTIN["smollm2-135m"])
    place.mkdir(parents=True)
    (place / "base.json").write_text("{}")
    here = export(str(adapter), "vllm", tmp_path / "b", base="smollm2-135m")
    assert here.command.startswith(f"vllm serve {place} ")
    assert any("HuggingFaceTB/SmolLM2-135M-Instruct" in note for note in here.notes)
