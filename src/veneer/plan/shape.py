"""The shape of a base, from its config: layers' matrices, heads and vocabulary.

    text_shape(config)            a language model's config.json, as a dict
    module_shape(model)           the same from a built model, on any device: for families not in the table here

A layer's matrices have transformers' names, so that targets mean the same as in training. Loads neither
torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, nearest, quoted
from veneer.models.compat_transformers import PRE_NORM_LAYERS
from veneer.models.config import layer_heads
from veneer.plan.pairs import PairCosts, PairForm

if TYPE_CHECKING:
    from veneer.core.adapter import LoraSpec


@dataclass(frozen=True)
class LinearShape:
    """One matrix of a layer, or `times` of one shape, of which a token uses `active`.

    product: matrices with the same product share their input and are multiplied as one.
    pair: whether all-linear includes it."""

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
        """Weights that one token is multiplied by."""
        return self.active * self.inputs * self.outputs


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    small: parameters of norms, biases and routers, never quantized.
    normed: values per token kept by norms other than those before attention and MLP.
    window: keys a query sees, None for all."""

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

    def product(self, name: str) -> tuple[LinearShape, ...]:
        return tuple(linear for linear in self.linears if linear.product == name)

    @cached_property
    def products(self) -> Mapping[str, tuple[LinearShape, ...]]:
        return {name: self.product(name) for name in dict.fromkeys(linear.product for linear in self.linears)}


@dataclass(frozen=True)
class TextShape:
    """A decoder-only language model.

    keeps: whether its last layer runs only on trained tokens, as in the fast paths (models/text/fast.py)."""

    family: str
    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    tied: bool
    context: int | None = None
    keeps: bool = False

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head if it is a separate matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.embedding + self.hidden + sum(layer.matrices + layer.small for layer in self.layers)

    @property
    def rows(self) -> int:
        """Outputs of all matrices."""
        return sum(linear.times * linear.outputs for layer in self.layers for linear in layer.linears)

    @property
    def largest(self) -> int:
        """Values of the largest weight that is multiplied as one."""
        products = (parts for layer in set(self.layers) for parts in layer.products.values())
        return max((sum(part.inputs * part.outputs for part in parts) for parts in products), default=0)

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied by.

        Includes the head; excludes the embedding."""
        each = sum(linear.multiplied for layer in self.layers for linear in layer.linears)
        return int(each) + self.vocabulary * self.hidden

    @property
    def matrices(self) -> int:
        """Parameters that a 4-bit or 8-bit base quantizes: every matrix of the layers."""
        return sum(layer.matrices for layer in self.layers)


def pair_parameters(shape: TextShape, spec: LoraSpec | None = None, *, rank: int = 16) -> int:
    """Return the trainable parameters of `spec` on the base.

    Without a spec: pairs of `rank` on all-linear. Raises TargetError for a pattern without a match."""
    return sum(count for _, _, count in _pairs(shape, spec, rank))


def _pairs(shape: TextShape, spec: LoraSpec | None, rank: int) -> Iterator[tuple[str, PairCosts, int]]:
    form = PairForm.of(spec)
    for i, layer in enumerate(shape.layers):
        if spec is not None and spec.layers is not None and i not in spec.layers:
            continue
        for linear in layer.linears:
            name = f"model.layers.{i}.{linear.name}"
            own = rank if spec is None else _rank(spec, name, linear)
            if own and (linear.pair or (spec is not None and spec.targets != "all-linear")):
                magnitude = linear.outputs if spec is not None and spec.dora else 0
                costs = form.beside((linear.outputs, linear.inputs), own)
                yield name, costs, linear.times * (costs.parameters + magnitude)


def _rank(spec: LoraSpec, name: str, linear: LinearShape) -> int:
    """Return the rank of the pair on a module, 0 if it has none."""
    if spec.targets != "all-linear" or spec.exclude or spec.rank_pattern:
        # needs torch, which a plan with default targets does not load
        from veneer.core.targets import target_matches

        patterns = (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)
        if any(target_matches(p, name) for p in spec.exclude):
            return 0
        if not any(linear.pair if p == "all-linear" else target_matches(p, name) for p in patterns):
            return 0
        return next((r for p, r in spec.rank_pattern.items() if target_matches(p, name)), spec.rank)
    return spec.rank if linear.pair else 0


def layer_pairs(shape: TextShape, spec: LoraSpec | None, rank: int) -> list[dict[str, PairCosts]]:
    """Return for each layer: matrix name -> cost of its pair.

    Matrices without a pair are omitted."""
    out: list[dict[str, PairCosts]] = [{} for _ in shape.layers]
    for name, costs, _ in _pairs(shape, spec, rank):
        _, _, index, leaf = name.split(".", 3)
        out[int(index)][leaf] = costs
    return out


# -- families ----------------------------------------------------------------------------------------------------------

Config = Mapping[str, Any]


def text_shape(config: Config, where: str = "config.json") -> TextShape:
    """Return the shape of a language model (the language part of a multimodal one).

    config: as in config.json.
    where: the base, for errors.

    Raises ConfigError for a family that is not in the table, and for a config without the required fields."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        own = {
            **inner,
            "text_config": None,
            "tie_word_embeddings": inner.get("tie_word_embeddings", config.get("tie_word_embeddings")),
        }
        kind = str(own.get("model_type") or f"{config.get('model_type')}_text")
        return text_shape({**own, "model_type": kind}, f"{where}: text_config")
    if config.get("model_type") is None:
        named = config.get("_class_name")  # diffusers' class
        other = f"veneer plan does not know the model {quoted(str(named))}"
        what = other if named else "this config.json names no model family"
        raise ConfigError(what, where=f"{where}: model_type", fix="give the config.json of the base's language model")
    family = str(config["model_type"])
    if family not in TEXT_FAMILIES:
        near = nearest(family, TEXT_FAMILIES, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"veneer plan does not know the model family {quoted(family)}",
            where=f"{where}: model_type",
            fix=f"{meant}It knows {', '.join(sorted(TEXT_FAMILIES))}; for others `veneer train CONFIG.yaml --dry-run` "
            "plans from the base itself",
        )
    values = {k: v for k, v in config.items() if v is not None}
    try:
        if family == "gemma3_text":
            values = {**_GEMMA, **values}
        layers = _layers(values)
        tied = bool(values.get("tie_word_embeddings", family.startswith("gemma")))
        return TextShape(
            family,
            values["hidden_size"],
            values["vocab_size"],
            layers,
            tied,
            values.get("max_position_embeddings"),
            keeps=family in PRE_NORM_LAYERS,
        )
    except KeyError as error:
        raise ConfigError(
            f"the config of this {family} has no {error.args[0]!r}", where=where, fix="give the whole config.json"
        ) from None


_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
"""Transformers' defaults, which Gemma 3's files omit."""


def _layers(c: Config) -> tuple[LayerShape, ...]:
    """Return the layers of a config without None values."""
    family, hidden, count = c["model_type"], c["hidden_size"], int(c["num_hidden_layers"])
    plain, width = _attention(c), c["intermediate_size"]
    dense = _with_mlp(plain, hidden, width)
    if family == "gemma3_text":
        every = c.get("sliding_window_pattern", 6)
        kinds = c.get("layer_types") or ["full_attention" if not (i + 1) % every else "" for i in range(count)]
        window = c.get("sliding_window", 4096)
        return tuple(replace(dense, window=None if kind == "full_attention" else window) for kind in kinds)
    if family == "mixtral":
        return (_with_experts(c, plain, width),) * count
    if family == "qwen3_moe":
        mixed = _with_experts(c, plain, c["moe_intermediate_size"])
        step, dense_at = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers", ()))
        return tuple(dense if i in dense_at or (i + 1) % step else mixed for i in range(count))
    if family == "llama4_text":
        step = c.get("interleave_moe_layer_step", 1)
        mixed_at = set(c.get("moe_layers") or range(step - 1, count, step))
        router = LinearShape("feed_forward.router", hidden, c["num_local_experts"], "router", pair=False)
        mixed = _with_experts(c, plain, width, "feed_forward", router)
        mixed = _with_mlp(mixed, hidden, width, "feed_forward.shared_expert")
        dense = _with_mlp(plain, hidden, c["intermediate_size_mlp"], "feed_forward")
        return tuple(mixed if i in mixed_at else dense for i in range(count))
    if family == "phi3":
        joined = sum(linear.outputs for linear in plain.product("qkv"))
        linears = (
            LinearShape("self_attn.qkv_proj", hidden, joined, "qkv"),
            *plain.product("o"),
            LinearShape("mlp.gate_up_proj", hidden, 2 * width, "gate_up"),
            LinearShape("mlp.down_proj", width, hidden, "down"),
        )
        return (replace(plain, linears=linears),) * count
    return (dense,) * count


def _attention(c: Config) -> LayerShape:
    """Return a layer with its attention and norms."""
    family, hidden, heads = c["model_type"], c["hidden_size"], c["num_attention_heads"]
    kv = c.get("num_key_value_heads", heads)
    dim = c.get("head_dim") or (128 if family.startswith("qwen3") else hidden // heads)
    q, k, small, normed = heads * dim, kv * dim, 2 * hidden, 0
    if family == "qwen2" or (family == "llama" and c.get("attention_bias")):
        small += q + 2 * k + (hidden if c.get("attention_bias") else 0)
    if family.startswith(("qwen3", "gemma3")):  # heads are normalized too
        small, normed = small + 2 * dim, q + k
    if family == "gemma3_text":
        small, normed = small + 2 * hidden, normed + 2 * hidden
    linears = (
        LinearShape("self_attn.q_proj", hidden, q, "qkv"),
        LinearShape("self_attn.k_proj", hidden, k, "qkv"),
        LinearShape("self_attn.v_proj", hidden, k, "qkv"),
        LinearShape("self_attn.o_proj", q, hidden, "o"),
    )
    window = c.get("sliding_window") if family in ("mistral", "mixtral") else None
    return LayerShape(linears, small, heads, kv, dim, normed, window)


def _with_mlp(layer: LayerShape, hidden: int, width: int, at: str = "mlp") -> LayerShape:
    mlp = (
        LinearShape(f"{at}.gate_proj", hidden, width, "gate_up"),
        LinearShape(f"{at}.up_proj", hidden, width, "gate_up"),
        LinearShape(f"{at}.down_proj", width, hidden, "down"),
    )
    return replace(layer, linears=(*layer.linears, *mlp))


def _with_experts(
    c: Config, layer: LayerShape, width: int, at: str = "mlp", router: LinearShape | None = None
) -> LayerShape:
    """Add experts as in transformers: two 3-d parameters, gate and up joined.

    router: None if it is a plain parameter."""
    hidden, active = c["hidden_size"], c["num_experts_per_tok"]
    experts = int(c["num_local_experts"] if "num_local_experts" in c else c["num_experts"])
    mlp = (
        LinearShape(f"{at}.experts.gate_up_proj", hidden, 2 * width, "experts.gate_up", experts, active),
        LinearShape(f"{at}.experts.down_proj", width, hidden, "experts.down", experts, active),
    )
    small = layer.small + (0 if router else experts * hidden)
    return replace(layer, linears=(*layer.linears, *mlp, *([router] if router else [])), small=small)


TEXT_FAMILIES = frozenset(
    ("gemma3_text", "llama", "llama4_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
)
"""transformers' model_type of the families whose configs define their shape."""


def model_shape(model: Any) -> TextShape:
    """Return the shape of a loaded model.

    From its config if the family is in the table, which has more detail; else from its modules."""
    config = model.config.get_text_config().to_dict()
    return text_shape(config) if config.get("model_type") in TEXT_FAMILIES else module_shape(model)


# -- any model ---------------------------------------------------------------------------------------------------------

_PRODUCTS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up",
    "up_proj": "gate_up", "gate_up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip


_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts")


def module_shape(model: Any) -> TextShape:
    """Return the shape of a built language model.

    Its parameters are exact for any family.

    The model can be attached. The config defines the attention; in a layer whose matrices do not have
    Llama's names, each matrix is a separate product. Weights outside the layers (Gemma 4's per-layer
    embeddings) count with the first layer."""
    from veneer.core.targets import base_modules, expert_parameters, kind_of

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    rows, hidden = (int(n) for n in embedding.weight.shape[:2])
    own = {id(embedding.weight), *([id(head.weight)] if head is not None else [])}
    attention = layer_heads(config)
    layers: dict[int, tuple[list[LinearShape], int]] = {i: ([], 0) for i in range(len(attention))}
    active = next((int(n) for key in _ACTIVE_EXPERTS if (n := getattr(config, key, None))), 1)
    for name, module in base_modules(model):
        index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        index = index if index in layers else 0
        linears, small = layers[index]
        leaf = name.split(f".{index}.", 1)[-1]
        fused = set(expert_parameters(module))
        sizes: Any = module
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in own:
                continue
            if key in fused:
                times, a, b = (int(n) for n in parameter.shape)
                linears.append(LinearShape(f"{leaf}.{key}", a, b, f"experts.{key}", times, min(active, times)))
            elif key == "weight" and hasattr(module, "in_features"):
                product = _PRODUCTS.get(leaf.rpartition(".")[2], leaf)
                inputs, outputs = int(sizes.in_features), int(sizes.out_features)
                linears.append(LinearShape(leaf, inputs, outputs, product, pair=kind_of(module) == "linear"))
            else:
                small += parameter.numel()
        layers[index] = linears, small
    linears, small = layers[0]
    layers[0] = linears, small - hidden  # the norm after the last layer, which TextShape.parameters counts
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [""] * len(attention)
    built = tuple(
        LayerShape(tuple(linears), small, *attention[i], window=None if kinds[i] == "full_attention" else window)
        for i, (linears, small) in layers.items()
    )
    tied = head is None or head.weight is embedding.weight
    return TextShape(
        str(config.model_type),
        hidden,
        rows,
        built,
        tied,
        getattr(config, "max_position_embeddings", None),
        keeps=str(config.model_type) in PRE_NORM_LAYERS,
    )
