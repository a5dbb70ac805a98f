"""Merged models compute what the same mix computes when attached."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.twins import model, our_outputs, outputs, random_adapter
from veneer.adapters.merge import MergeReport, merge_shards, merged_model
from veneer.core.adapter import Adapter, LoraSpec, Pair
from veneer.core.init import create
from veneer.errors import AdapterError, BaseError, ConfigError
from veneer.files.weights import Checkpoint
from veneer.formats import peft

SPECS = {
    "llama": ("llama3", LoraSpec(rank=4, alpha=8)),
    "dora": ("llama3", LoraSpec(rank=4, alpha=8, targets=("q_proj",), dora=True)),
    "tied embedding": ("llama3", LoraSpec(rank=4, alpha=8, targets=("embed_tokens",))),
    "tied head": ("llama3", LoraSpec(rank=4, alpha=8, targets=("lm_head",))),
    "token rows, tied": ("llama3", LoraSpec(targets=(), token_rows={"embed_tokens": (1, 9)})),
    "full copies": ("mistral", LoraSpec(rank=2, alpha=4, modules_to_save=("lm_head", "model.norm"))),
    "mixtral": ("mixtral", LoraSpec(rank=2, alpha=4)),
    "llama 4": ("llama4", LoraSpec(rank=2, alpha=4)),
    "phi": ("phi3", LoraSpec(rank=2, alpha=4)),
    "gemma": ("gemma3", LoraSpec(rank=2, alpha=4, targets=("embed_tokens", "q_proj"))),
}


@pytest.mark.parametrize("case", SPECS)
def test_saved_merge_equals_attached_model(tmp_path, case):
    name, spec = SPECS[case]
    net = model(name)
    before = copy.deepcopy(net.state_dict())
    adapter = random_adapter(create(net, spec, seed=0, dtype=torch.float64))
    want = our_outputs(net, adapter)
    report = MergeReport()
    merged_model(net, [(adapter, 1.0)], torch.float64, report).save_pretrained(tmp_path / "m")
    again = type(net).from_pretrained(tmp_path / "m", dtype=torch.float64, experts_implementation="eager").eval()
    torch.testing.assert_close(outputs(again), want, rtol=1e-6, atol=1e-6)
    assert report.delta_error < 1e-6
    assert report.untied == (case in ("tied embedding", "tied head", "gemma"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_mix_is_the_sum_of_its_parts():
    net = model("llama3")
    one, two = (random_adapter(create(net, LoraSpec(rank=2, alpha=4), seed=s, dtype=torch.float64), s) for s in (1, 2))
    mixed = merged_model(net, [(one, 0.5), (two, -1.0)], torch.float64)
    name = "model.layers.0.mlp.down_proj.weight"
    base, pairs = net.state_dict()[name], [a.pairs[name.removesuffix(".weight")] for a in (one, two)]
    want = base + 0.5 * pairs[0].scale * pairs[0].B @ pairs[0].A - pairs[1].scale * pairs[1].B @ pairs[1].A
    torch.testing.assert_close(mixed.state_dict()[name], want, rtol=1e-12, atol=1e-12)


def test_sixteen_bits_are_rounded_once_from_the_exact_sum():
    net = model("llama3", torch.float32)
    adapter = random_adapter(create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0))
    merged = merged_model(net, [(adapter, 1.0)], torch.bfloat16)
    for name, pair in adapter.pairs.items():
        exact = net.get_submodule(name).weight + pair.scale * (pair.B @ pair.A)
        assert torch.equal(merged.get_submodule(name).weight, exact.to(torch.bfloat16))
    assert {t.dtype for t in merged.state_dict().values()} == {torch.bfloat16}


def test_merge_report_measures_the_delta_kept():
    net = model("llama3", torch.bfloat16)
    adapter = random_adapter(create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0))
    reports = {}
    for strength in (1.0, 1e-2, 1e-4, 1e-7):
        merged_model(net, [(adapter, strength)], torch.bfloat16, reports.setdefault(strength, MergeReport()))
    shares = [r.changed for r in reports.values()]
    errors = [r.delta_error for r in reports.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.01
    assert errors[0] < 0.05
    assert errors[-1] > 0.5
    # compute the error of one report independently
    merged = merged_model(net, [(adapter, 1e-2)], torch.bfloat16)
    error = size = 0.0
    for name, pair in adapter.pairs.items():
        delta = 1e-2 * pair.scale * (pair.B @ pair.A)
        kept = (merged.get_submodule(name).weight.float() - net.get_submodule(name).weight.float()).detach()
        error, size = error + float((kept - delta).square().sum()), size + float(delta.square().sum())
    assert reports[1e-2].delta_error == pytest.approx((error / size) ** 0.5, rel=1e-3)


def test_overflow_in_float16_is_refused():
    net = model("llama3", torch.float32)
    adapter = create(net, LoraSpec(rank=2, alpha=4, targets=("q_proj",)), seed=0)
    for pair in adapter.pairs.values():
        pair.B += 1e6
    with pytest.raises(AdapterError, match="do not fit into"):
        merged_model(net, [(adapter, 1.0)], torch.float16)


# -- shard by shard ----------------------------------------------------------------------------------------------------

SHARDED = ["llama", "dora", "token rows, tied", "full copies", "phi"]


@pytest.fixture
def saved(tmp_path):
    def make(case, dtype=torch.bfloat16, shard="20KB"):
        name, spec = SPECS[case]
        net = model(name, dtype)
        adapter = random_adapter(create(net, spec, seed=0))
        net.save_pretrained(tmp_path / "base", max_shard_size=shard)
        (tmp_path / "base" / "tokenizer.json").write_text("{}", encoding="utf-8")
        peft.write_folder(adapter, tmp_path / "a", base=net)
        return net, adapter

    return make


@pytest.mark.parametrize("case", SHARDED)
def test_merge_by_shard_writes_the_merged_model(saved, tmp_path, case):
    net, adapter = saved(case)
    wanted = MergeReport()
    want = merged_model(net, [(adapter, 0.5)], torch.bfloat16, wanted) if "copies" not in case else None
    report = merge_shards(tmp_path / "base", [f"{tmp_path / 'a'}:{0.5 if want else 1}"], tmp_path / "out")
    want = want or merged_model(net, [(adapter, 1.0)], torch.bfloat16, wanted)
    got, state = Checkpoint(tmp_path / "out"), want.state_dict()
    assert len(got.files) > 1
    for name in got:
        assert torch.equal(got.tensor(name), state[name]), name
    assert report.dtype == "bfloat16"
    if "tied" not in case:
        assert (report.changed, report.weights) == (wanted.changed, wanted.weights)
        assert report.delta_error == pytest.approx(wanted.delta_error)
    assert (tmp_path / "out/tokenizer.json").read_text(encoding="utf-8") == "{}"
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()
    again = type(net).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_expert_pairs_merge_into_files_as_the_base_stores_them(tmp_path, name):
    """Experts are stored separately (also under Mixtral's names) or fused (also as (experts, in, out)).

    The adapter also changes a router."""
    net = model(name, torch.float32, **({"intermediate_size": 32} if name == "gpt_oss" else {}))  # square
    adapter = random_adapter(create(net, LoraSpec(rank=2, alpha=4), seed=0))
    router = "model.layers.1." + {"gpt_oss": "mlp.router", "llama4": "feed_forward.router"}.get(name, "mlp.gate")
    adapter.pairs[router] = Pair(torch.rand(2, 32), torch.rand(4, 2), 0.5)
    net.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    peft.write_folder(adapter, tmp_path / "a", base=net)
    want = our_outputs(net, adapter)
    merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out")
    again = type(net).from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation="eager").eval()
    torch.testing.assert_close(outputs(again), want, rtol=1e-4, atol=1e-4)
    assert set(Checkpoint(tmp_path / "out").entries) == set(Checkpoint(tmp_path / "base").entries)


def test_a_pair_of_too_few_experts_is_refused_by_shard(tmp_path):
    model("mixtral").save_pretrained(tmp_path / "base")
    pair = Pair(torch.rand(3, 2, 24), torch.rand(3, 32, 2), 1.0, "experts")
    peft.write_folder(Adapter({"model.layers.0.mlp.experts.down_proj": pair}), tmp_path / "a")
    with pytest.raises(AdapterError, match="a pair of 3 experts, but the base has more"):
        merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out")


def test_untouched_weights_keep_their_bytes(saved, tmp_path):
    _, adapter = saved("dora")
    merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out")
    old, new = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "out")
    changed = {n for n in old if not torch.equal(old.tensor(n), new.tensor(n))}
    assert changed == {f"{n}.weight" for n in adapter.pairs}
    assert {f.name: h for f, h in old.files.items()} == {f.name: h for f, h in new.files.items()}


def test_stochastic_merge_is_unbiased_and_seeded(saved, tmp_path):
    saved("llama")
    spec = f"{tmp_path / 'a'}:1e-4"
    near = merge_shards(tmp_path / "base", [spec], tmp_path / "near")
    runs = [merge_shards(tmp_path / "base", [spec], tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2))]
    for run in runs:
        # The variance of delta_kept is at most Σ Δ²·step²/4 over ‖Δ‖⁴, and delta_error² is the mean of the
        # squared rounding error over ‖Δ‖²: about (error/√weights)² if Δ and step are independent.
        assert abs(run.delta_kept - 1) < 5 * run.delta_error / run.weights**0.5
        assert run.delta_error > near.delta_error
    files = [sorted((tmp_path / str(i)).glob("*.safetensors")) for i in range(3)]
    same = [[a.read_bytes() == b.read_bytes() for a, b in zip(files[0], f, strict=True)] for f in files]
    assert all(same[1])
    assert not all(same[2])


@pytest.mark.parametrize("case", ["llama", "token rows, tied"])
def test_loaded_models_and_files_get_the_same_stochastic_rounding(saved, tmp_path, case):
    """Merging in memory and merging by shard give equal weights, and tied weights stay tied."""
    net, adapter = saved(case)
    merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out", seed=3)
    report = MergeReport()
    state = merged_model(net, [(adapter, 1.0)], torch.bfloat16, report, seed=3).state_dict()
    got = Checkpoint(tmp_path / "out")
    assert all(torch.equal(got.tensor(name), state[name]) for name in got)
    assert report.rounding == "stochastic, seed 3"
    assert not report.untied
    nearest = merged_model(net, [(adapter, 1.0)], torch.bfloat16).state_dict()
    assert not all(torch.equal(t, nearest[n]) for n, t in state.items())


def test_a_merge_mostly_lost_to_rounding_needs_accept_loss(saved, tmp_path):
    saved("llama")
    small, out = [f"{tmp_path / 'a'}:1e-4"], tmp_path / "out"
    with pytest.raises(
        AdapterError, match=r"rounding to bfloat16 gives the merged change a relative error of \d+%"
    ) as error:
        merge_shards(tmp_path / "base", small, out, accept_loss=False)
    assert "--stochastic 0" in str(error.value)
    assert not out.exists()
    assert "relative error" in merge_shards(tmp_path / "base", small, out).warning
    chance = merge_shards(tmp_path / "base", small, tmp_path / "chance", seed=0, accept_loss=False)
    assert chance.warning == ""


def test_a_diffusers_folder_is_merged_by_component(tmp_path):
    base = tmp_path / "base"
    W = {"unet": torch.rand(6, 4), "text_encoder": torch.rand(5, 4)}
    for part, weight in W.items():
        (base / part).mkdir(parents=True)
        key = "blocks.0.to_q.weight" if part == "unet" else "encoder.fc1.weight"
        save_file({key: weight.half(), "other": torch.rand(3)}, base / part / "model.safetensors")
    (base / "model_index.json").write_text("{}", encoding="utf-8")
    pairs = {
        "unet.blocks.0.to_q": Pair(torch.rand(2, 4), torch.rand(6, 2), 0.5),
        "text_encoder.text_model.encoder.fc1": Pair(
            torch.rand(2, 4), torch.rand(5, 2), 2.0
        ),  # named as in transformers 4
    }
    peft.write_folder(Adapter(pairs), tmp_path / "a")
    merge_shards(base, [str(tmp_path / "a")], tmp_path / "out")
    for part, key, name in zip(W, ("blocks.0.to_q.weight", "encoder.fc1.weight"), pairs, strict=True):
        got = Checkpoint(tmp_path / "out" / part).tensor(key)
        exact = W[part].half().float() + pairs[name].scale * (pairs[name].B @ pairs[name].A)
        assert torch.equal(got, exact.half())
    assert (tmp_path / "out/model_index.json").is_file()


def test_all_misfits_are_listed_and_nothing_is_written(saved, tmp_path):
    saved("tied embedding")
    wrong = Pair(torch.rand(2, 4), torch.rand(6, 2), 1.0)
    bad = Adapter({"model.layers.0.nope": wrong, "model.layers.0.mlp.down_proj": wrong})
    peft.write_folder(bad, tmp_path / "bad")
    with pytest.raises(AdapterError, match="3 problems") as error:
        merge_shards(tmp_path / "base", [str(tmp_path / "a"), str(tmp_path / "bad")], tmp_path / "out")
    for words in ("lm_head.weight shares this weight", "no such weight", "it changes (6, 4)"):
        assert words in str(error.value)
    with pytest.raises(BaseError, match="no such model folder"):
        merge_shards(tmp_path / "nowhere", [str(tmp_path / "a")], tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_shards(tmp_path / "base", [], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "bad", "base"]


@pytest.mark.parametrize("spec", ["pair", "full copy", "head"])
@pytest.mark.parametrize("stated", [True, False])
def test_by_shard_refuses_a_change_of_one_tied_weight(tmp_path, spec, stated):
    specs = {
        "pair": LoraSpec(rank=2, alpha=4, targets=("embed_tokens",)),
        "full copy": LoraSpec(targets=(), modules_to_save=("embed_tokens",)),
        "head": LoraSpec(rank=2, alpha=4, targets=("lm_head",)),
    }
    net = model("gemma3", torch.float32)
    net.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text(encoding="utf-8"))
    if not stated:  # the class's default is tied
        del config["tie_word_embeddings"]
        (tmp_path / "base/config.json").write_text(json.dumps(config), encoding="utf-8")
    peft.write_folder(random_adapter(create(net, specs[spec], seed=0)), tmp_path / "a", base=net)
    with pytest.raises(AdapterError, match="shares this weight, but the change is for only one"):
        merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out")


def test_by_shard_token_rows_change_a_stored_head_too(tmp_path):
    net = model("llama3", torch.float32)
    net.save_pretrained(tmp_path / "base")
    state = {n: t.clone() for n, t in net.state_dict().items()}
    save_file(state, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter = random_adapter(create(net, LoraSpec(targets=(), token_rows={"embed_tokens": (1, 9)}), seed=0))
    peft.write_folder(adapter, tmp_path / "a", base=net)
    merge_shards(tmp_path / "base", [str(tmp_path / "a")], tmp_path / "out")
    got = Checkpoint(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(got.tensor(name)[[1, 9]], adapter.token_rows["model.embed_tokens"].rows), name
