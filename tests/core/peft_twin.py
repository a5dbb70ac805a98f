"""Apply veneer's adapter with PEFT to a copy of the base, and read PEFT's gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from veneer.core import Adapter, Pair

PREFIX = "base_model.model."


def twin(model: nn.Module, adapter: Adapter, **config: Any) -> nn.Module:
    """Return a copy of `model` with `adapter` applied by PEFT.

    `config`: further fields of LoraConfig (use_dora, …)."""
    linear = [n for n, p in adapter.pairs.items() if p.kind != "experts"]
    experts = [n for n, p in adapter.pairs.items() if p.kind == "experts"]
    ranks = {n: p.rank for n, p in adapter.pairs.items()}
    config = {
        "r": next((ranks[n] for n in (*experts, *linear)), 8),
        "rank_pattern": {n.replace(".", r"\."): r for n, r in ranks.items() if n in linear},
        "target_modules": linear or None,
        "target_parameters": experts or None,
        "modules_to_save": list(adapter.modules) or None,
        "trainable_token_indices": {n: list(r.indices) for n, r in adapter.token_rows.items()} or None,
    } | config
    base = copy.deepcopy(model)
    if getattr(base, "config", None) is not None:
        # For a known mixture of experts, PEFT treats the names gate_proj and up_proj as those of transformers
        # 4 and moves their pairs to the experts. Dense layers with these names (Qwen3-MoE's mlp_only_layers)
        # would then have no pair.
        base.config.model_type = "as it is"
    out = peft.get_peft_model(base, peft.LoraConfig(**config))
    out.train(model.training)
    with torch.no_grad():
        for name, mine, theirs in _tensors(out, adapter):
            assert mine.shape == theirs.shape, (name, mine.shape, theirs.shape)
            theirs.copy_(mine)
    for name, pair in adapter.pairs.items():
        _layer(out, name, pair).scaling["default"] = pair.scale
    return out


def gradients(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return PEFT's gradients with veneer's names and shapes."""
    out = {}
    for name, mine, theirs in _tensors(model, adapter):
        grad = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
        out[name] = _back(adapter, name, grad, mine)
    return out


def _layer(model: nn.Module, name: str, pair: Pair) -> Any:
    if pair.kind != "experts":
        return model.get_submodule(PREFIX + name)
    owner, _, parameter = name.rpartition(".")
    layer = model.get_submodule(PREFIX + owner)
    while isinstance(layer, ParamWrapper) and layer.parameter_name != parameter:
        layer = layer.base_layer
    return layer


def _tensors(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (veneer's name, veneer's tensor in PEFT's shape, PEFT's tensor)."""
    for name, pair in adapter.pairs.items():
        layer = _layer(model, name, pair)
        if pair.kind == "experts":
            yield f"{name}.A", pair.A.flatten(0, 1), layer.lora_A["default"].weight
            yield f"{name}.B", pair.B.permute(1, 2, 0).flatten(1), layer.lora_B["default"].weight
        elif pair.kind == "embedding":
            yield f"{name}.A", pair.A, layer.lora_embedding_A["default"]
            yield f"{name}.B", pair.B, layer.lora_embedding_B["default"]
        else:
            yield f"{name}.A", pair.A, layer.lora_A["default"].weight
            yield f"{name}.B", pair.B, layer.lora_B["default"].weight
        if pair.magnitude is not None:
            theirs = layer.lora_magnitude_vector["default"].weight
            yield f"{name}.magnitude", pair.magnitude.view(theirs.shape), theirs
    for name, tensors in adapter.modules.items():
        copies = dict(model.get_submodule(PREFIX + name).modules_to_save["default"].named_parameters())
        for key, tensor in tensors.items():
            yield f"{name}={key}", tensor, copies[key]
    for name, rows in adapter.token_rows.items():
        yield (
            f"{name}#rows",
            rows.rows,
            model.get_submodule(PREFIX + name).token_adapter.trainable_tokens_delta["default"],
        )


def _back(adapter: Adapter, name: str, grad: Tensor, mine: Tensor) -> Tensor:
    module, _, part = name.rpartition(".")
    pair = adapter.pairs.get(module)
    if pair is not None and pair.kind == "experts":
        e, r = pair.A.shape[:2]
        return grad.view(e, r, -1) if part == "A" else grad.view(len(grad), r, e).permute(2, 0, 1)
    return grad.reshape(dict(adapter.tensors())[name].shape)
