"""Recorded defaults do not depend on the installed libraries."""

from __future__ import annotations

from transformers import LlamaConfig, Mistral3Config

from veneer.models.architecture import default_fields
from veneer.models.fingerprint import shaping_fields


class LaterLlama(LlamaConfig):
    """A config class of a later transformers, with a changed default and a new field."""

    rms_norm_eps: float = 1e-5
    head_gain: float = 2.0


def test_a_changed_default_changes_no_fingerprint() -> None:
    said = {"hidden_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-6}
    assert LaterLlama().rms_norm_eps == 1e-5
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    assert shaping_fields(LlamaConfig(**said)) == shaping_fields(LaterLlama(**said))
    assert shaping_fields(LaterLlama(**said)) == fields | {"model_type": "llama"}
    assert shaping_fields(LaterLlama(**said | {"rms_norm_eps": 1e-5}))["rms_norm_eps"] == 1e-5
    assert shaping_fields(LaterLlama(**said, head_gain=3.0))["head_gain"] == 3


def test_unrecorded_fields_and_models_have_installed_defaults() -> None:
    later = {"latent_channels": 99, "later": 5}
    assert default_fields("AutoencoderKL", later)["latent_channels"] == 4
    assert default_fields("AutoencoderKL", later)["later"] == 5
    assert default_fields("a kind of tomorrow", later) == later


def test_nested_config_keeps_explicit_defaults() -> None:
    installed = Mistral3Config().to_dict()
    text = installed["text_config"]
    changed = installed | {"text_config": text | {"hidden_size": text["hidden_size"] + 1, "later": 5}}
    usual = default_fields("mistral3", changed)["text_config"]
    assert (usual["hidden_size"], usual["later"]) == (text["hidden_size"], 5)
