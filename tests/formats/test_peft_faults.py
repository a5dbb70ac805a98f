"""All faults of a PEFT folder are listed in one AdapterError."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.edits import edit_json
from tests.formats.twins import linear_pairs, model, our_outputs, outputs, peft_folder, randomise
from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.errors import AdapterError, UnsafeFileError
from veneer.formats import peft
from veneer.formats.folder import CONFIG_FILE, TENSOR_FILE

NAMES = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
KEY = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peft.write_folder(linear_pairs(NAMES, rank=2), tmp_path / "a", base_name="a/base", base=NAMES)
    return tmp_path / "a"


def edit(folder: Path, config: dict[str, Any] | None = None, drop: str = "", **tensors: Tensor) -> None:
    """Change a folder's configuration and tensors. `drop`: prefix of tensor keys to remove."""
    edit_json(folder / CONFIG_FILE, **(config or {}))
    have = safetensors.torch.load_file(folder / TENSOR_FILE)
    have = {k: v for k, v in have.items() if not drop or not k.startswith(drop)} | tensors
    safetensors.torch.save_file(have, folder / TENSOR_FILE)


def refused(folder: Path, *words: str, base: Any = None, kind: type[AdapterError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        peft.read_folder(folder, base)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_valid_folder_has_a_minimal_config(folder):
    assert sorted(peft.read_folder(folder).pairs) == sorted(NAMES)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 4, {})


A, B = KEY + "lora_A.weight", KEY + "lora_B.weight"
OTHER = {name.replace("q_proj", "o_proj"): torch.ones(shape) for name, shape in ((A, (2, 4)), (B, (4, 2)))}
FAULTS: list[tuple[str, dict[str, Tensor], list[str]]] = [
    ("", {"layers.0.k_proj.lora_A.weight": torch.ones(2, 4)}, ["1 of 9 tensors have the wrong prefix", "(2, 4)"]),
    ("", OTHER, ["model.layers.0.self_attn.o_proj: A (2, 4), B (4, 2)", "target_modules omits"]),
    (KEY + "lora_B", {}, ["model.layers.0.self_attn.q_proj: B missing, only A (2, 4)"]),
    ("", {B: torch.ones(4, 3)}, ["A and B do not fit together", "A (2, 4), B (4, 3)"]),
    ("", {"base_model.model.model.norm.base_layer.weight": torch.ones(4)}, ["the file has no pair"]),
    ("", {A: torch.ones(2, 4, dtype=torch.int8)}, ["dtype torch.int8"]),
    ("", {A: torch.full((2, 4), float("nan"))}, ["NaN or infinity", KEY]),
    ("base_model", {}, ["no tensors in the file"]),
    ("", {KEY + "lora_A.default.weight": torch.ones(2, 4)}, ["the adapter's name ('default') is still in the key"]),
    ("", {KEY + "lora_B.bias": torch.ones(4)}, ["lora_bias is not set"]),
    ("", {KEY + "lora_magnitude_vector": torch.ones(4)}, ["use_dora is not set, but there is a"]),
    ("", {KEY + "lora_diag": torch.ones(2)}, ["not a tensor of plain LoRA"]),
    ("", {KEY + "weight": torch.ones(4, 4)}, ["nothing in the config accounts for this tensor", "(4, 4)"]),
    ("", {KEY + "token_adapter.trainable_tokens_delta": torch.ones(1, 4)}, ["trainable_token_indices does not name"]),
]


@pytest.mark.parametrize(("drop", "tensors", "words"), FAULTS)
def test_tensors_that_do_not_fit_the_config_are_refused(folder, drop, tensors, words):
    edit(folder, drop=drop, **tensors)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {KEY + "base_layer.weight": torch.ones(4, 4)}, "ignored"),  # a copy of the base weight of a target
        # PEFT saves a target name that matched no module, provided that another name matched
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, {}, "'c_attn', but the file has no tensors for it"),
        ({"rank_pattern": {"k_proj": 3}}, {}, "'k_proj' matches no module"),
    ],
)
def test_options_without_effect_are_noted(folder, config, tensors, words):
    edit(folder, config, **tensors)
    assert any(words in note for note in peft.load_folder(folder).notes)


def test_targets_without_any_tensors(folder):
    edit(folder, {"target_modules": ["query_key_value", "c_attn"]})
    refused(folder, "target_modules names 'c_attn', 'query_key_value', but there are no tensors for any")


def test_a_missing_layer_is_seen_with_the_base(tmp_path):
    peft_folder(model("llama3"), tmp_path / "a", target_modules=["q_proj"])
    edit(tmp_path / "a", drop="base_model.model.model.layers.1.")
    peft.read_folder(tmp_path / "a")
    refused(tmp_path / "a", "model.layers.1.self_attn.q_proj: target_modules selects this linear", base=model("llama3"))


def test_rank_that_contradicts_the_config_is_refused(folder):
    edit(folder, {"rank_pattern": {"layers.1.self_attn.v_proj": 3}})
    refused(folder, "rank_pattern['layers.1.self_attn.v_proj'] says rank 3, the tensors have 2")
    edit(folder, {"rank_pattern": {}, "r": 5})
    assert refused(folder).count("config's r says rank 5") == 4


def test_unknown_config_keys_and_bad_values_are_all_listed(folder):
    edit(
        folder,
        {"lora_alfa": 3, "r": "8", "lora_dropout": 1.5, "use_rslora": "yes", "target_modules": 7, "bias": "some"},
    )
    words = ("r = '8'", "lora_dropout = '1.5'", "use_rslora = 'yes'", "target_modules = '7'", "bias = 'some'")
    refused(folder, "unknown key 'lora_alfa' = 3, did you mean 'lora_alpha'?", *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("alora_invocation_tokens", [1, 2], "not supported"),
        ("arrow_config", {"top_k": 3}, "not supported"),
        ("nvfp4_merge_aware", {"scale_mode": "fresh"}, "not supported"),
        ("use_nora", True, "not supported"),
        ("use_paca", True, "not supported"),
        ("init_lora_weights", "astra", "path_initial_model_for_weight_conversion"),
        ("kasa_config", {"beta": 1e-4}, "not supported"),
        ("layer_replication", [[0, 2]], "not supported"),
        ("lora_bias", True, "lora_bias is set, but there is no lora_B.bias"),
        ("megatron_config", {"a": 1}, "not supported"),
        ("monteclora_config", {"num_samples": 8}, "not supported"),
        ("use_bdlora", {"nblocks": 2}, "not supported"),
        ("use_qalora", True, "not supported"),
        ("peft_type", "VERA", "convert_to_lora"),
        ("peft_type", "IA3", "only LORA, LOHA and LOKR"),
        ("init_lora_weights", "pissa", "changed the base"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "changed the base"),
        ("init_lora_weights", "corda", "changed the base"),
        ("init_lora_weights", "lora_ga", "changed the base"),
        ("init_lora_weights", "loftq", "changed the base"),
        ("init_lora_weights", "magic", "not understood"),
        ("rank_pattern", {"(": 3}, "not a regular expression"),
        ("rank_pattern", {"q_proj": 0}, "at least 1"),
        ("alpha_pattern", {"q_proj": None}, "a number"),
        ("layers_pattern", ["h"], "layers_pattern needs layers_to_transform"),
        ("trainable_token_indices", [1, 1], "appears twice"),
        ("trainable_token_indices", [1], "rows for 0 modules"),
        ("trainable_token_indices", {"embed_tokens": [3]}, "0 modules have rows"),
        ("modules_to_save", ["lm_head"], "no tensors for it"),
        ("target_parameters", ["experts.down_proj"], "no tensors for it"),
        ("use_dora", True, "there is no lora_magnitude_vector"),
    ],
)
def test_unsupported_settings_are_refused_with_advice(folder, key, value, words):
    edit(folder, {key: value})
    refused(folder, words, str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("velora_config", {"num_groups": 4}),  # affects only the backward pass
        ("eva_config", {"rho": 2.0}),
        ("loftq_config", {}),
        ("init_lora_weights", False),
        ("init_lora_weights", "orthogonal"),
        ("bias", "lora_only"),
        ("layers_to_transform", []),
        ("qalora_group_size", 16),
        ("megatron_core", "megatron.core"),
    ],
)
def test_harmless_settings_are_accepted(folder, key, value):
    before = peft.read_folder(folder).digest()
    edit(folder, {key: value})
    assert peft.read_folder(folder).digest() == before


def test_many_faults_are_one_error(folder):
    edit(
        folder,
        {"mystery": 1, "target_modules": ["q_proj", "v_proj", "gate"]},
        drop=KEY + "lora_B",
        **{"stray": torch.ones(1), KEY.replace("q_proj", "v_proj") + "lora_B.weight": torch.ones(3, 3)},
    )
    message = refused(folder, "mystery", "stray", "B missing", "do not fit together")
    assert re.search(r"\((\d+) problem", message)[1] == str(message.count("\n  - "))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), AdapterError, "has no adapter_config.json"),
        (lambda f: (f / TENSOR_FILE).unlink(), AdapterError, "has no adapter_model.safetensors"),
        (lambda f: (f / TENSOR_FILE).rename(f / "adapter_model.bin"), UnsafeFileError, "pickle"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), AdapterError, "not a JSON object"),
        (lambda f: (f / CONFIG_FILE).write_text('{"r": 1, "r": 2}'), AdapterError, "'r' appears twice"),
        (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), AdapterError, "not valid JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("{}"), AdapterError, "peft_type is None"),
        (lambda f: (f / TENSOR_FILE).write_bytes((f / TENSOR_FILE).read_bytes()[:-1]), UnsafeFileError, "truncated"),
        (lambda f: (f / "veneer.json").write_text("{"), AdapterError, "not valid JSON"),
    ],
)
def test_folders_that_are_not_adapters_are_refused(folder, make: Callable[[Path], Any], kind, words):
    make(folder)
    refused(folder, words, str(folder), kind=kind)


def test_a_folder_that_is_not_there_names_the_nearest(folder):
    shutil.copytree(folder, folder.parent / "tickets")
    refused(folder.parent / "tickts", "no such adapter folder", "nearest: tickets")
    shutil.copytree(folder, folder.parent / "run" / "inner")
    refused(folder.parent / "run", "has no adapter_config.json", "inner")


def test_a_hostile_pattern_does_not_hang(folder, monkeypatch):
    monkeypatch.setattr("veneer.formats.peft_config.PATTERN_SECONDS", 0.2)
    edit(folder, {"target_modules": r"(model|mod|el|[a-z._0-9])+x"})
    refused(folder, "omits this module")
    edit(folder, {"target_modules": r"(.|.)*(?<=Z)"})
    refused(folder, "takes longer than")


def test_names_missing_in_the_base_are_refused(folder):
    refused(
        folder, "model.layers.1.self_attn.q_proj: no such module", base=[n for n in NAMES if "1.self_attn.q" not in n]
    )
    refused(folder, "A is (2, 4), the base needs (2, 32)", base=model("llama3"))


def test_a_pair_on_a_module_of_another_kind(tmp_path):
    peft.write_folder(linear_pairs(["model.embed_tokens"]), tmp_path / "a")
    refused(tmp_path / "a", "a pair of kind linear does not fit a Embedding", base=model("llama3"))


# -- copies of embeddings ----------------------------------------------------------------------------------------------


def test_embedding_copy_equal_to_the_base_is_ignored(tmp_path):
    peft_folder(model("mistral"), tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    assert sum("base_layer.weight" in k for k in safetensors.torch.load_file(tmp_path / "a" / TENSOR_FILE)) == 2
    assert sum("an exact copy" in n for n in peft.load_folder(tmp_path / "a", model("mistral")).notes) == 2
    assert sum("no base to compare it with" in n for n in peft.load_folder(tmp_path / "a").notes) == 2


def test_an_embedding_copy_that_differs_is_refused(tmp_path):
    peft_folder(model("mistral"), tmp_path / "a", target_modules=["embed_tokens"])
    net = model("mistral")
    net.model.embed_tokens.weight.data[[3, 8]] += 1
    refused(tmp_path / "a", "2 rows differ from the base's", base=net)
    refused(tmp_path / "a", "resize", base=model("mistral", vocab_size=128))


def test_saved_whole_embedding_replaces_that_of_the_base(tmp_path):
    """With save_embedding_layers=True, PEFT writes whole embeddings, for example of a larger vocabulary.

    When loading, it uses them instead of the base's embeddings."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = get_peft_model(model("mistral"), LoraConfig(target_modules=["q_proj"]))
        net.get_input_embeddings().weight.data[5] += 1
        net.get_output_embeddings().weight.data[7] += 1
        want = outputs(net.eval())
        net.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    base = model("mistral")
    loaded = peft.load_folder(tmp_path / "a", base)
    assert sorted(loaded.adapter.modules) == ["lm_head", "model.embed_tokens"]
    assert sum("read as a full copy" in n for n in loaded.notes) == 2
    torch.testing.assert_close(our_outputs(base, loaded.adapter), want, rtol=1e-9, atol=1e-9)


# -- layouts of experts ------------------------------------------------------------------------------------------------


def rewrite_as_before_0_19_1(folder: Path, version: str | None) -> None:
    """Rewrite the adapter in the layout of PEFT before 0.19.1, with A and B of every expert exchanged.

    Those versions treated the first of an expert's two dimensions as the input."""
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    rank = json.loads((folder / CONFIG_FILE).read_text())["r"]
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        e = len(A) // rank
        a, b = A.view(e, rank, -1), B.view(len(B), rank, e).permute(2, 0, 1)
        tensors[key] = b.transpose(1, 2).flatten(0, 1).contiguous()
        tensors[key.replace("lora_A", "lora_B")] = a.permute(2, 1, 0).flatten(1).contiguous()
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE)
    edit_json(folder / CONFIG_FILE, "peft_version", **({"peft_version": version} if version else {}))


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2.dev0", "0.19.0", None])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama4"])
def test_old_expert_layout_is_recognized_by_base_shapes(tmp_path, name, version):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    want = peft_folder(model(name), tmp_path / "a", target_modules=[], target_parameters=parameters, r=3)
    rewrite_as_before_0_19_1(tmp_path / "a", version)
    net = model(name)
    torch.testing.assert_close(our_outputs(net, peft.read_folder(tmp_path / "a", net)), want, rtol=1e-9, atol=1e-9)
    refused(tmp_path / "a", "laid out expert weights differently", "pass the base")


@pytest.mark.parametrize(("version", "flipped"), [("0.21.2", False), ("0.19.1", False), ("0.18.0", True), (None, None)])
def test_square_experts_are_read_by_peft_version(tmp_path, version, flipped):
    square = {"hidden_size": 32, "intermediate_size": 32}
    want = peft_folder(
        model("mixtral", **square), tmp_path / "a", target_modules=[], target_parameters=["experts.down_proj"], r=3
    )
    if flipped or flipped is None:
        rewrite_as_before_0_19_1(tmp_path / "a", version)
    else:
        edit(tmp_path / "a", {"peft_version": version})
    net = model("mixtral", **square)
    if flipped is None:
        refused(tmp_path / "a", "the layout is unknown without peft_version", base=net)
    else:
        torch.testing.assert_close(our_outputs(net, peft.read_folder(tmp_path / "a", net)), want, rtol=1e-9, atol=1e-9)


def test_experts_that_fit_no_layout_are_refused(tmp_path):
    net = model("mixtral")
    peft_folder(net, tmp_path / "a", target_modules=["q_proj"], target_parameters=["experts.down_proj"], r=3)
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    edit(tmp_path / "a", **{key: torch.ones(12, 25)})
    refused(tmp_path / "a", "A (12, 25), B (32, 12) do not fit the base's", base=model("mixtral"))
    edit(tmp_path / "a", **{key: torch.ones(11, 24)})
    refused(tmp_path / "a", "do not fit rank 3", base=model("mixtral"))


def test_config_with_too_few_expert_parameters_is_refused(tmp_path):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    peft_folder(model("mixtral"), tmp_path / "a", target_modules=["q_proj"], target_parameters=parameters)
    edit(tmp_path / "a", {"target_parameters": ["experts.down_proj"]})
    refused(tmp_path / "a", "tensors for 2 parameter(s)", "names 1 of this module: down_proj")


def test_version_and_date_stamps_are_kept_and_shown(folder):
    edit(folder, {"unsloth_version": "2026.9.6", "created_at": "2026-09-20", "astra_config": None})
    found = peft.load_folder(folder)
    assert found.adapter.card.extra["adapter_config"] == {"unsloth_version": "2026.9.6", "created_at": "2026-09-20"}
    assert any("unsloth_version = 2026.9.6: metadata, stored unchanged" in note for note in found.notes)


def test_velora_adapter_has_the_outputs_of_peft(tmp_path):
    """PEFT saves the groups' means with the pairs, but only the backward pass uses them."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import VeloraConfig

    ids = torch.randint(0, 160, (2, 8), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # from PEFT and transformers
        config = LoraConfig(r=4, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
        wrapped = get_peft_model(model("llama3"), config).train()
        wrapped(ids, labels=ids).loss.backward()
    randomise(wrapped)
    want = outputs(wrapped.eval())
    wrapped.save_pretrained(str(tmp_path / "a"))
    net = model("llama3")
    found = peft.load_folder(tmp_path / "a", net)
    torch.testing.assert_close(our_outputs(net, found.adapter), want, rtol=1e-9, atol=1e-9)
    assert sum("lora_velora_embed" in note for note in found.notes) == 1


# -- limits of the format ----------------------------------------------------------------------------------------------


def pair(kind: str = "linear", **changes: Any) -> Pair:
    shapes = {"linear": ((2, 4), (4, 2)), "experts": ((3, 2, 4), (3, 4, 2))}[kind]
    return Pair(**({"A": torch.ones(shapes[0]), "B": torch.ones(shapes[1]), "scale": 1.0, "kind": kind} | changes))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (Adapter(), "it is empty"),
        (Adapter({"a": pair(), "b": pair(magnitude=torch.ones(4))}), "use_dora applies to all pairs"),
        (Adapter({"m.p": pair("experts", magnitude=torch.ones(4))}), "DoRA on expert parameters"),
        (Adapter({"a": pair(scale=float("nan"))}), "the scale is nan"),
        (Adapter({"a": pair(B=torch.ones(4, 3))}), "A and B do not fit together (A (2, 4), B (4, 3))"),
        (Adapter({"a": pair(A=torch.full((2, 4), float("inf")))}), "NaN or infinity"),
        (Adapter({"a": pair(magnitude=torch.ones(5))}), "lora_magnitude_vector is (5,), expected (4,)"),
        (Adapter({"a.b": pair()}, modules={"a": {"b.weight": torch.ones(1)}}), "a pair inside a, which is a full copy"),
        (Adapter({"a": pair()}, token_rows={"a": TokenRows((1,), torch.ones(1, 4))}), "a pair and token rows at once"),
        (Adapter(token_rows={"a": TokenRows((1, 2), torch.ones(1, 4))}), "2 token indices, rows of shape (1, 4)"),
        (Adapter(modules={"a": {}}), "a full copy without tensors"),
        (Adapter({"a.base_layer": pair()}), "could not read the folder back"),
        (Adapter({"../a": pair()}), "cannot hold"),
        (Adapter({"m.x": pair("experts"), "m.y": pair("experts")}), "is known only with a base"),
    ],
)
def test_unwritable_adapter_leaves_no_files(tmp_path, adapter, words):
    with pytest.raises(AdapterError) as caught:
        peft.write_folder(adapter, tmp_path / "a")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


one_name = st.from_regex(r"(model\.)?layers\.[0-3]\.(attn|m\+p)\.[qkv]_proj", fullmatch=True)
names = st.lists(one_name, min_size=1, max_size=8, unique=True)
OTHERS = ["layers.9.attn.q_proj", "x.layers.0.attn.k_proj", "q_proj"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=names, data=st.data(), rslora=st.booleans())
def test_any_ranks_and_scales_survive_a_round_trip(names, data, rslora):
    """For any names, ranks and scales, the configuration gives each module its own values.

    It selects no other module. Scales are exact, up to the last bit that alpha/r can represent."""
    pairs = {}
    for name in names:
        rank = data.draw(st.integers(1, 5))
        scale = data.draw(st.sampled_from([1.0, 2.0, 0.5]) | st.floats(1e-3, 1e3))
        pairs[name] = Pair(torch.ones(rank, 4), torch.ones(4, rank), scale)
    more = data.draw(st.lists(st.sampled_from(OTHERS), unique=True))
    config, tensors = peft.encode_folder(Adapter(pairs, rslora=rslora), base=[*names, *more])
    read = peft.interpret(config, tensors).adapter
    for name, p in pairs.items():
        assert read.pairs[name].scale == pytest.approx(p.scale, rel=1e-12)

    from veneer.formats.peft_config import parse_config, selects

    parsed, problems = parse_config(config)
    assert not problems
    assert [n for n in more if selects(parsed, n) and n not in names] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzzed_configuration_raises_only_adapter_errors(data):
    from veneer.formats.peft_config import FIELDS, IGNORED, UNSUPPORTED

    config, tensors = peft.encode_folder(linear_pairs(NAMES))
    keys = st.sampled_from(sorted({*FIELDS, *IGNORED, *UNSUPPORTED, "peft_type", "init_lora_weights"})) | st.text(
        max_size=5
    )
    changed = config | data.draw(st.dictionaries(keys, json_values, max_size=4))
    try:
        adapter = peft.interpret(changed, tensors).adapter
    except AdapterError:
        return
    assert sorted(adapter.pairs) == sorted(NAMES)
