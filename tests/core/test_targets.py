"""Target patterns and their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.attached import holding
from tests.families import FAMILIES
from veneer.core import LoraSpec, create, resolve_targets
from veneer.core.targets import full_modules, kind_of, matches_per_pattern, target_matches
from veneer.errors import TargetError


def names(spec: LoraSpec, family: str = "llama3") -> list[str]:
    return [t.name for t in resolve_targets(FAMILIES[family](), spec)]


PATTERNS = [
    ("q_proj", "model.layers.0.self_attn.q_proj", True),
    ("q_proj", "q_proj", True),
    (".q_proj", "model.layers.0.self_attn.q_proj", True),
    ("proj", "model.layers.0.self_attn.q_proj", False),
    ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
    ("*_proj", "model.layers.0.self_attn.q_proj", True),
    ("layers.[01].*.?_proj", "model.layers.1.self_attn.q_proj", True),
    ("layers.[01].*.?_proj", "model.layers.2.self_attn.q_proj", False),
    ("layers.1.self_attn.*", "model.layers.1.self_attn.q_proj", True),
    (r"re:.*\.layers\.\d+\..*q_proj", "model.layers.1.self_attn.q_proj", True),
    ("re:q_proj", "model.layers.1.self_attn.q_proj", False),
    ("Q_proj", "q_proj", False),
]


@pytest.mark.parametrize(("pattern", "name", "hit"), PATTERNS)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert target_matches(pattern, name) is hit


def test_string_is_one_pattern_and_matches_have_model_order() -> None:
    assert names(LoraSpec(targets="v_proj")) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert names(LoraSpec(targets=("v_proj", "q_proj", "q_proj"))) == [
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"
    ]


def test_all_linear_excludes_the_head_unless_named() -> None:
    assert len(names(LoraSpec())) == 14
    assert names(LoraSpec(targets=("all-linear", "lm_head")))[-1] == "lm_head"


def test_layers_and_excludes() -> None:
    assert names(LoraSpec(targets="q_proj", layers=(1,))) == ["model.layers.1.self_attn.q_proj"]
    assert names(LoraSpec(exclude=("mlp.*", "re:.*[kv]_proj", "layers.0.*"))) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_experts_are_named_by_parameter_and_excluded_by_module() -> None:
    found = resolve_targets(FAMILIES["mixtral"](), LoraSpec(targets=("experts.down_proj",)))
    assert [(t.name, t.kind, t.module_name, t.parameter) for t in found] == [
        (f"model.layers.{i}.mlp.experts.down_proj", "experts", f"model.layers.{i}.mlp.experts", "down_proj")
        for i in (0, 1)
    ]
    assert all(t.kind == "linear" for t in resolve_targets(FAMILIES["mixtral"](), LoraSpec(exclude=("experts",))))


def test_matches_per_pattern_are_counted_after_exclusions() -> None:
    found = matches_per_pattern(FAMILIES["llama3"](), LoraSpec(targets=("q_proj", "mlp.*"), layers=(0,)))
    assert {p: len(n) for p, n in found.items()} == {"q_proj": 1, "mlp.*": 3}


EMPTY_SELECTIONS = [
    (LoraSpec(targets=("q_porj",)), "q_proj"),
    (LoraSpec(targets=("q_proj", "wq")), "'wq' matches nothing"),
    (LoraSpec(targets=("norm",)), "do not support a pair: model.norm"),
    (LoraSpec(targets=("re:(",)), "not a regular expression"),
    (LoraSpec(exclude=("q_porj",)), "q_proj"),
    (LoraSpec(layers=(0, 7)), r"layers \[7\] do not exist"),
    (LoraSpec(targets=("q_proj", "lm_head"), layers=(0,)), "'lm_head' selects 1 module,"),
    (LoraSpec(targets=("q_proj",), exclude=("self_attn.*",)), "drop them all"),
    (LoraSpec(targets=("q_proj",), rank_pattern={"v_proj": 4}), "rank_pattern 'v_proj' matches nothing"),
    (LoraSpec(targets=("q_proj",), alpha_pattern={"v_proj": 4}), "alpha_pattern 'v_proj' matches nothing"),
    (LoraSpec(modules_to_save=("lm_haed",)), "lm_head"),
    (LoraSpec(targets=("lm_head",), modules_to_save=("lm_head",)), "drop them all"),
    (LoraSpec(token_rows={"wte": (1,)}), "embed_tokens"),
    (LoraSpec(token_rows={"embed_tokens": (1, 160)}), r"token ids \[160\]"),
]


@pytest.mark.parametrize(("spec", "say"), EMPTY_SELECTIONS)
def test_nothing_selected_is_an_error(spec: LoraSpec, say: str) -> None:
    with pytest.raises(TargetError, match=say):
        create(FAMILIES["llama3"](), spec, seed=0)


def test_kinds() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return super().forward(x), x

    class Linear4bit(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    attention = nn.MultiheadAttention(4, 1)
    assert kind_of(nn.Linear(2, 2)) == kind_of(Linear4bit(2, 2)) == "linear"
    assert kind_of(nn.Conv1d(2, 2, 1)) == kind_of(nn.Conv2d(2, 2, 1)) == "conv"
    assert kind_of(nn.Embedding(2, 2)) == "embedding"
    for module in (Router(2, 2), attention.out_proj, nn.ConvTranspose2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.LayerNorm(2)):
        assert kind_of(module) is None


def test_an_attached_model_resolves_as_the_base() -> None:
    model = FAMILIES["mixtral"]()
    spec = LoraSpec(rank=2, targets=("all-linear", "embed_tokens", "lm_head"))
    before = resolve_targets(model, spec)
    with holding(model, a=create(model, spec, seed=0)):
        assert resolve_targets(model, spec) == before
        assert resolve_targets(model, LoraSpec()) == [
            t for t in before if t.name not in ("model.embed_tokens", "lm_head")
        ]


def test_full_modules_are_the_outermost() -> None:
    model = FAMILIES["llama3"]()
    spec = LoraSpec(modules_to_save=("gate_proj", "layers.0.*", "norm"))
    found = full_modules(model, spec)
    assert found == [
        *(f"model.layers.0.{n}" for n in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")),
        "model.layers.1.mlp.gate_proj",
        "model.norm",
    ]
    assert all(t.name.startswith("model.layers.1") and "gate" not in t.name for t in resolve_targets(model, spec))
