"""The shape of a language model, from its config: layers, heads and vocabulary.

    text_shape(config)            from a config.json, as a dict: transformers builds the model without weights
    module_shape(model)           from a built model, on any device
    PairForm("loha").costs((out, in), rank)    the cost of an adapter's form on one frozen matrix

Matrices are named as in transformers, so that targets mean the same as in training.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from veneer.core.forms import trained_shapes
from veneer.errors import ConfigError, nearest, quoted
from veneer.models.compat_transformers import PRE_NORM_LAYERS
from veneer.models.config import layer_heads
from veneer.models.loading import build_errors

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


@dataclass(frozen=True)
class PairCosts:
    """The cost of one pair.

    forward: operations per token in the forward pass.
    operations: operations per token in both passes.
    rank: saved values per token.
    delta_values: float32 values that are computed from the parts and saved once, for any number of tokens."""

    parameters: int
    forward: float
    rank: int
    delta_values: int = 0

    @property
    def operations(self) -> float:
        return (3 if self.rank else 4) * self.forward  # the forward pass runs twice if nothing is saved


@dataclass(frozen=True)
class PairForm:
    """The form of pairs: `kind`, `factor` and `decompose_both` of an adapter.

    A LoHa of rank r is multiplied as a pair of rank r²; a LoKr is multiplied one factor at a time
    (core.layers). Values that are not saved are recomputed in the backward pass."""

    kind: Literal["lora", "loha", "lokr"] = "lora"
    factor: int | None = None
    both: bool = False

    @classmethod
    def of(cls, spec: LoraSpec | None) -> PairForm:
        return cls() if spec is None else cls(spec.kind, spec.factor, spec.decompose_both)

    def costs(self, shape: tuple[int, ...], rank: int) -> PairCosts:
        """Return the cost of a pair on a frozen weight of shape (out, in, k…)."""
        rows, columns = shape[0], math.prod(shape[1:])
        if self.kind == "lora":
            return PairCosts(rank * (rows + columns), 2.0 * rank * (rows + columns), rank)
        parts = trained_shapes(self.kind, shape, rank, self.factor, self.both)
        count = sum(map(math.prod, parts.values()))
        if self.kind == "loha":
            delta_values = rank * rank * (rows + columns)
            if delta_values <= rows * columns:
                return PairCosts(count, 2.0 * delta_values, rank**2, delta_values)
            return PairCosts(count, 2.0 * rows * columns, 0)
        l, m = parts["w1"] if "w1" in parts else (parts["a1"][0], parts["b1"][1])
        return PairCosts(count, 2.0 * (rows // l * columns + m * rows), 0)


PAIRS = PairForm()
"""The form of plain LoRA pairs."""


@dataclass(frozen=True)
class LinearShape:
    """One matrix of a layer, or several of the same shape.

    times: number of matrices, of which a token uses `active`.
    product: name of the fused product. Matrices of the same product share their input and are multiplied as
        one.
    pair: whether the target all-linear includes the matrix."""

    name: str
    inputs: int
    outputs: int
    product: str
    times: int = 1
    active: float = 1.0
    pair: bool = True

    @property
    def parameters(self) -> int:
        return self.times * self.inputs * self.outputs

    @property
    def multiplied(self) -> float:
        """Return the number of weights that one token is multiplied by."""
        return self.active * self.inputs * self.outputs


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    small: parameters of norms, biases and routers, which are never quantized.
    normed: values per token that norms save, not counting the norms before attention and MLP.
    window: number of keys that a query sees; None for all."""

    linears: tuple[LinearShape, ...]
    small: int
    heads: int
    kv_heads: int
    head_dim: int
    normed: int = 0
    window: int | None = None

    @property
    def matrices(self) -> int:
        return sum(linear.parameters for linear in self.linears)

    @cached_property
    def products(self) -> Mapping[str, tuple[LinearShape, ...]]:
        out: dict[str, tuple[LinearShape, ...]] = {}
        for linear in self.linears:
            out[linear.product] = (*out.get(linear.product, ()), linear)
        return out


@dataclass(frozen=True)
class TextShape:
    """A decoder-only language model.

    keeps: whether the last layer runs only on trained tokens, as on the fast paths (models/text/fast.py)."""

    family: str
    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    tied: bool
    keeps: bool = False

    @property
    def embedding(self) -> int:
        """Return the parameters of the embedding, and of the head if it is a separate matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.embedding + self.hidden + sum(layer.matrices + layer.small for layer in self.layers)

    @property
    def rows(self) -> int:
        """Return the total number of outputs of all matrices."""
        return sum(linear.times * linear.outputs for layer in self.layers for linear in layer.linears)

    @property
    def largest(self) -> int:
        """Return the size of the largest weight that is multiplied at once."""
        products = (parts for layer in set(self.layers) for parts in layer.products.values())
        return max((sum(part.inputs * part.outputs for part in parts) for parts in products), default=0)

    @property
    def active_parameters(self) -> int:
        """Return the number of weights that one token is multiplied by.

        The head is included, and the embedding is not."""
        each = sum(linear.multiplied for layer in self.layers for linear in layer.linears)
        return int(each) + self.vocabulary * self.hidden

    @property
    def matrices(self) -> int:
        """Return the number of parameters that quantization applies to: all matrices in layers."""
        return sum(layer.matrices for layer in self.layers)


def pair_parameters(shape: TextShape, spec: LoraSpec | None = None, *, rank: int = 16) -> int:
    """Return the number of trainable parameters of `spec` on the base.

    Without a spec, the target is all-linear and every pair has rank `rank`. Raises TargetError for a pattern
    that matches nothing."""
    return sum(count for _, _, count in _pairs(shape, spec, rank))


def _pairs(shape: TextShape, spec: LoraSpec | None, rank: int) -> Iterator[tuple[str, PairCosts, int]]:
    form = PairForm.of(spec)
    for i, layer in enumerate(shape.layers):
        if spec is not None and spec.layers is not None and i not in spec.layers:
            continue
        for linear in layer.linears:
            name = f"model.layers.{i}.{linear.name}"
            module_rank = rank if spec is None else _rank(spec, name, linear)
            if module_rank and (linear.pair or (spec is not None and spec.targets != "all-linear")):
                magnitude = linear.outputs if spec is not None and spec.dora else 0
                costs = form.costs((linear.outputs, linear.inputs), module_rank)
                yield name, costs, linear.times * (costs.parameters + magnitude)


def _rank(spec: LoraSpec, name: str, linear: LinearShape) -> int:
    """Return the rank of the pair on a module, or 0 if the module has no pair."""
    if spec.targets != "all-linear" or spec.exclude or spec.rank_pattern:
        # This import needs torch, which a plan with default targets does not load.
        from veneer.core.targets import target_matches

        patterns = (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)
        if any(target_matches(p, name) for p in spec.exclude):
            return 0
        if not any(linear.pair if p == "all-linear" else target_matches(p, name) for p in patterns):
            return 0
        return next((r for p, r in spec.rank_pattern.items() if target_matches(p, name)), spec.rank)
    return spec.rank if linear.pair else 0


def layer_pairs(shape: TextShape, spec: LoraSpec | None, rank: int) -> list[dict[str, PairCosts]]:
    """Return the cost of each pair: for each layer, matrix name -> PairCosts.

    Matrices without a pair are left out."""
    out: list[dict[str, PairCosts]] = [{} for _ in shape.layers]
    for name, costs, _ in _pairs(shape, spec, rank):
        _, _, index, module_name = name.split(".", 3)
        out[int(index)][module_name] = costs
    return out


# -- from transformers -------------------------------------------------------------------------------------------------


def text_shape(config: Mapping[str, Any], where: str = "config.json") -> TextShape:
    """Return the shape of a language model (the language part of a multimodal model).

    config: as in config.json; missing fields have the defaults of transformers.
    where: name of the base in error messages.

    Raises ConfigError for a family that transformers does not support, and for values that transformers
    rejects."""
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "text_config")}
    if isinstance(inner := config.get("text_config"), Mapping):
        kind = inner.get("model_type") or f"{config.get('model_type')}_text"
        tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        fields = {**inner, "model_type": kind} | ({} if tied is None else {"tie_word_embeddings": tied})
        where = f"{where}: text_config"
    if fields.get("model_type") is None:
        named = fields.get("_class_name")  # diffusers' class
        unknown = f"veneer plan does not know the model {quoted(str(named))}"
        message = unknown if named else "this config.json names no model family"
        place = f"{where}: model_type"
        raise ConfigError(message, where=place, fix="give the config.json of the base's language model")
    return _built_shape(json.dumps(fields, sort_keys=True, default=str), where)


def model_shape(model: Any) -> TextShape:
    """Return the shape of a loaded model.

    Uses the model's config if transformers supports the family, because loading can replace layers."""
    from veneer.models.text.meta_model import text_families

    fields = model.config.get_text_config().to_dict()
    return text_shape(fields) if fields.get("model_type") in text_families() else module_shape(model)


@functools.lru_cache(maxsize=64)
def _built_shape(fields: str, where: str) -> TextShape:
    from veneer.models.text.meta_model import meta_text, text_families

    settings = json.loads(fields)
    family = settings["model_type"]
    if not isinstance(family, str) or family not in text_families():
        suggestion = nearest(str(family), text_families(), 1)
        hint = f"did you mean {suggestion[0]}? " if suggestion else ""
        text = f"veneer plan does not know the model family {quoted(str(family))}"
        raise ConfigError(text, where=f"{where}: model_type", fix=f"{hint}Supported: transformers' language models")
    fix = "take the base's own config.json again"
    with build_errors("transformers cannot build a model", where=where, fix=fix):
        return module_shape(meta_text(settings))


_PRODUCTS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up",
    "up_proj": "gate_up", "gate_up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip


_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts")


def module_shape(model: Any) -> TextShape:
    """Return the shape of a built language model, with exact parameters for any family.

    Adapters can be attached to the model. Attention heads and windows come from the config. Each matrix that
    is not named as in Llama is a separate product. Weights outside the layers (Gemma 4's per-layer
    embeddings) count toward the first layer."""
    from veneer.core.targets import base_modules, expert_parameters, kind_of

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    rows, hidden = (int(n) for n in embedding.weight.shape[:2])
    vocabulary = {id(embedding.weight), *([id(head.weight)] if head is not None else [])}
    attention = layer_heads(config)
    layers: dict[int, tuple[list[LinearShape], int]] = {i: ([], 0) for i in range(len(attention))}
    normed = [-2 * hidden] * len(attention)  # excludes the norms before attention and MLP
    active = next((int(n) for key in _ACTIVE_EXPERTS if (n := getattr(config, key, None))), 1)
    for name, module in base_modules(model):
        index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        index = index if index in layers else 0
        linears, small = layers[index]
        module_name = name.split(f".{index}.", 1)[-1]
        if "Norm" in type(module).__name__ and module_name != name:
            heads, kv, dim = attention[index]
            of_heads = {"self_attn.q_norm": heads * dim, "self_attn.k_norm": kv * dim}
            normed[index] += of_heads.get(module_name, sum(p.numel() for p in module.parameters(recurse=False)))
        fused = set(expert_parameters(module))
        sizes: Any = module
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in vocabulary:
                continue
            if key in fused:
                times, a, b = (int(n) for n in parameter.shape)
                # The hidden size is the input, except for down, where the hidden size is the output. Some
                # families store the input dimension first, and others the output dimension.
                if ("down" in key) == (a == hidden):
                    a, b = b, a
                linears.append(LinearShape(f"{module_name}.{key}", a, b, f"experts.{key}", times, min(active, times)))
            elif key == "weight" and hasattr(module, "in_features"):
                product = _PRODUCTS.get(module_name.rpartition(".")[2], module_name)
                inputs, outputs = int(sizes.in_features), int(sizes.out_features)
                linears.append(LinearShape(module_name, inputs, outputs, product, pair=kind_of(module) == "linear"))
            else:
                small += parameter.numel()
        layers[index] = linears, small
    linears, small = layers[0]
    layers[0] = linears, small - hidden  # The norm after the last layer is counted in TextShape.parameters.
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [""] * len(attention)
    built = tuple(
        LayerShape(
            tuple(linears), small, *attention[i], max(0, normed[i]), None if kinds[i] == "full_attention" else window
        )
        for i, (linears, small) in layers.items()
    )
    tied = head is None or head.weight is embedding.weight
    family = str(config.model_type)
    return TextShape(family, hidden, rows, built, tied, keeps=family in PRE_NORM_LAYERS)
