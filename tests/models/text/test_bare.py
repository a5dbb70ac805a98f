"""A base of its config alone against one with weights: the same modules, shapes and bytes, and the same fast paths."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, OTHERS
from veneer.errors import ConfigError
from veneer.models.quantise import quantised_weights
from veneer.models.text.bare import bare_text, config_of, twin
from veneer.models.text.fast import fast
from veneer.ops.quantised import Quantised, quantise


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_base_has_the_shapes_of_a_real_one_and_no_bytes(family: str) -> None:
    real = FAMILIES[family]()
    bare = bare_text(real.config, dtype=torch.bfloat16)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_it_has_the_codes_that_a_load_would_make(kind: str) -> None:
    real = FAMILIES["qwen3_moe"]()
    bare = bare_text(real.config, dtype=torch.bfloat16, quantise=kind)
    names = quantised_weights(real)
    assert names == [n for n, p in bare.named_parameters() if isinstance(p, Quantised)]
    for name in names:
        made, found = quantise(real.get_parameter(name), kind), bare.get_parameter(name)
        assert isinstance(found, Quantised)
        assert {k: (t.shape, t.dtype) for k, t in found.stored.tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in made.stored.tensors().items()
        }


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4"])
def test_a_twin_finds_what_the_model_itself_would(family: str) -> None:
    real = (FAMILIES | OTHERS)[family]()
    how = twin(real.config, torch.float32)
    with fast(real) as tried:
        pass
    with fast(real, like=how) as believed:
        assert believed.rows == tried.rows
        assert believed.swapped == tried.swapped
        assert believed.keeps == tried.keeps


def test_the_part_for_text_is_taken_of_a_model_that_sees_pictures() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2}
    assert config_of({"model_type": "gemma3", "text_config": text}).hidden_size == 32


def test_fields_that_transformers_refuses_are_a_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"transformers makes no configuration of this: .*number of attention heads"):
        config_of({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7})
    with pytest.raises(ConfigError, match="knows no model family 'lama'"):
        config_of({"model_type": "lama"})
