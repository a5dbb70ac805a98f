"""Load a base in 4 or 8 bits.

Each weight is read, quantized and freed before the next weight is read. Peak memory is the size of the
quantized model plus one weight.

Linear layers and fused experts (3-d parameters) are quantized. Embeddings, norms, routers and the output head
are not quantized, as in QLoRA (arXiv 2305.14314). The model's modules and parameter names do not change. A
quantized weight is a tensor (ops.quantized), so adapters, fast paths and merging work as usual.

4-bit and 8-bit checkpoints of bitsandbytes keep their quantization. This module registers a transformers
quantizer and provides tensors that are read on demand. transformers does the rest: it knows the families,
renames weights and merges experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core.targets import expert_parameters
from veneer.errors import BaseError, ConfigError, nearest
from veneer.files.weights import StoredTensor, read_values
from veneer.models.loading import device_map_to, loading
from veneer.ops.cpu import memory
from veneer.ops.quantization_formats import (
    KINDS,
    SAVED_KINDS,
    Blocks4,
    Rows8,
    dynamic_map,
    empty_format,
    four_bit_values,
)
from veneer.ops.quantized import Quantized, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def quantized_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters that quantized loading quantizes."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            names.append(f"{name}.weight")
        names += [f"{name}.{key}" for key in expert_parameters(module)]
    return names


def put_empty_codes(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace each of the `quantized_weights` with an empty quantized weight."""
    for name in quantized_weights(model):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        code = empty_format(module.get_parameter(key).shape, kind, device)
        module._parameters[key] = nn.Parameter(Quantized(code, dtype), requires_grad=False)


def quantized_bytes(shape: Iterable[int], kind: str) -> int:
    """Return the number of bytes of a weight quantized as `kind`.

    A weight in 4 bits takes 4.127 bits per value, including its doubly quantized constants."""
    shape = tuple(shape)
    n = math.prod(shape)
    if kind == "int8":
        return n + 4 * (n // shape[-1])
    blocks = -(-n // 64)
    return (n + 1) // 2 + blocks + 4 * -(-blocks // 256) + 4


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor for transformers' loader, which is read from disk when indexed."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()


def load_quantized(
    path: Path,
    config: PreTrainedConfig,
    table: list[StoredTensor],
    kind: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a base directory as a model with quantized linear weights.

    Returns (model, transformers' loading info). `kind`: one of ops.quantization_formats.KINDS, or "" to keep
    a checkpoint's quantization. The model computes in `dtype`. `device`: where the weights are quantized and
    stored; the CPU by default."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    try:
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        message = f"{config.model_type} is not a causal language model that transformers knows"
        raise BaseError(message, where=str(path)) from None
    return load_state(cls, config, lazy_state(table), kind, dtype, device)


def load_state(
    cls: Any,
    config: PreTrainedConfig,
    state: Mapping[str, LazyTensor],
    kind: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model of the transformers class `cls` from the tensors in `state`.

    Returns (model, transformers' loading info). `kind`: format for the `quantized_weights`, or "" to keep the
    tensors as they are. `device`: as in `load_quantized`."""
    with loading(), memory.return_freed_memory():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtype,
            quantization_config=_quantizer(kind),
            output_loading_info=True,
            device_map=device_map_to(device),
        )
    forget_quantizer(model)
    loop_over_experts(model, device)
    return model, info


def loop_over_experts(model: Any, device: torch.device | None) -> None:
    """Choose the implementation of quantized experts.

    On the CPU, loop over the experts in use, because batched products would dequantize a whole layer at once.
    On a GPU, use batched products, because a loop would make the host wait for the list of experts in use."""
    if any(expert_parameters(m) for m in model.modules()):
        there = device is not None and device.type == "cuda"
        model.set_experts_implementation("grouped_mm" if there else "eager")


def load_part(
    cls: Any, folder: Path, table: list[StoredTensor], kind: str, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Load a model of the diffusers class `cls` with quantized linear weights.

    The parameter names of the model must equal the tensor names in the files. Returns (model, loading info),
    like `load_state`."""
    from accelerate import init_empty_weights

    config = {k: v for k, v in cls.load_config(folder).items() if k != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config)
    wide = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
    names, targets = set(quantized_weights(model)), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    info: dict[str, Any] = {"missing_keys": set(model.state_dict()), "unexpected_keys": set(), "mismatched_keys": set()}
    with memory.return_freed_memory():
        for name, lazy in lazy_state(table).items():
            if name not in targets:
                info["unexpected_keys"].add(name)
                continue
            info["missing_keys"].discard(name)
            owner, _, key = name.rpartition(".")
            value = lazy[...]
            if value.shape != targets[name].shape:
                info["mismatched_keys"].add((name, tuple(value.shape), tuple(targets[name].shape)))
                continue
            if value.is_floating_point():
                value = value.to(torch.float32 if any(part in name.split(".") for part in wide) else dtype)
            if name in names and kind and not isinstance(value, Quantized):
                value = quantize(value, kind)
            module = model.get_submodule(owner)
            if key in module._buffers:
                module._buffers[key] = value
            else:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    return model.eval(), info


def forget_quantizer(model: Any) -> None:
    """Make transformers treat `model` as unquantized.

    The model can then be moved, cast and trained."""
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        model.config.__dict__.pop(name, None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        model.__dict__.pop(name, None)


def _quantizer(kind: str) -> Any:
    """Return the transformers config object of veneer's quantizer.

    If `kind` is "", the quantizer keeps the tensors as read."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    config, quantizer = _quantizer_classes()
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD], AUTO_QUANTIZER_MAPPING[_METHOD] = config, quantizer
    settings = config(quant_method=_METHOD)
    settings.kind = kind
    return settings


_METHOD = "veneer"


@cache
def _quantizer_classes() -> tuple[Any, Any]:
    """Return veneer's config and quantizer classes for transformers.

    Each config object stores its own `kind`, because several loads can run at the same time."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        kind = ""

    class Quantize(ConversionOps):  # type: ignore[misc]
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for name, value in input_dict.items():
                value = value[0] if isinstance(value, list) else value
                if self.kind and not isinstance(value, Quantized):
                    value = quantize(value, self.kind)
                out[name] = nn.Parameter(value, requires_grad=False)
            return out

    class Quantizer(HfQuantizer):
        names: frozenset[str] = frozenset()

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.names = frozenset(quantized_weights(model))
            return model

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return param_name in self.names

        def get_quantize_ops(self) -> Any:
            config: Any = self.quantization_config
            return Quantize(config.kind)

        def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
            """Return the bytes per value; transformers uses this to preallocate GPU memory."""
            config: Any = self.quantization_config
            if param_name in self.names and config.kind:
                return quantized_bytes(param.shape, config.kind) / float(math.prod(param.shape))
            plain: float = super().param_element_size(model, param_name, param)
            return plain

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Config, Quantizer


def original_weight(path: Path, stored: Mapping[str, StoredTensor], name: str) -> Tensor:
    """Return the unquantized weight of a base that is quantized while loading.

    Raises BaseError if the files store the weight under another name or in parts (transformers joins and
    renames the weights of some families)."""
    tensor = stored.get(name)
    if tensor is None:
        raise BaseError(f"the files have no weight {name}", where=str(path), fix="use an init other than loftq")
    return read_values(tensor)


# -- bitsandbytes checkpoints ------------------------------------------------------------------------------------------

_STATE = ".quant_state.bitsandbytes__"


def saved_kind(config: Mapping[str, Any], where: str | None = None) -> str:
    """Return the quantization format in a config: nf4, fp4 or int8, or "" for none.

    Raises BaseError for a quantization method that veneer does not support."""
    settings = config.get("quantization_config")
    if not settings:
        return ""
    method = settings.get("quant_method")
    if method == "bitsandbytes":
        return str(settings.get("bnb_4bit_quant_type", "fp4")) if settings.get("load_in_4bit") else "int8"
    fix = "use the 16-bit weights with base.quantize=nf4, or a bitsandbytes or GGUF file"
    raise BaseError(f"the weights are quantized by {method}, which veneer does not read", where=where, fix=fix)


def lazy_state(table: list[StoredTensor]) -> dict[str, Any]:
    """Return a mapping from names to weights, which are read from disk when indexed.

    The parts of a quantized weight are joined. Scaled 8-bit float weights are multiplied by their scales in
    float32."""
    by_name = {t.name: t for t in table}
    scaled = scaled_weights(table)
    consumed: set[str] = {name for name in by_name if scaled and name.rpartition(".")[2] == _SCALED_MARKER}
    out: dict[str, Any] = {}
    for name, stored in by_name.items():
        states = [n for n in by_name if n.startswith(name + _STATE)] if stored.dtype == "U8" else []
        scale = name.removesuffix("weight") + "SCB"
        if states:
            state_names = [n for n in by_name if n.startswith(f"{name}.")]
            consumed |= set(state_names)
            read = partial(_blocks, stored, states[0], [by_name[n] for n in state_names])
            out[name] = LazyTensor("BF16", stored.shape, read)
        elif stored.dtype == "I8" and scale in by_name:
            consumed |= {scale, f"{name}_format"}
            out[name] = LazyTensor("BF16", stored.shape, partial(_rows, stored, by_name[scale]))
        elif name in scaled:
            module = name.removesuffix("weight")
            consumed |= {scaled[name].name, *(f"{module}{end}" for end in _SCALED_EXTRAS)}
            marker = by_name.get(f"{module}{_SCALED_FORMAT}")
            out[name] = LazyTensor("F32", stored.shape, partial(_scaled_values, stored, scaled[name], marker))
        else:
            out[name] = LazyTensor(stored.dtype, stored.shape, partial(read_values, stored))
    return {name: value for name, value in out.items() if name not in consumed}


def _rows(codes: StoredTensor, scale: StoredTensor) -> Tensor:
    code = Rows8(codes.shape, read_values(codes), read_values(scale).float().flatten())
    return Quantized(code, torch.bfloat16)


_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALED_MARKER = "scaled_fp8"
_SCALED_FORMAT = "comfy_quant"
_SCALED_EXTRAS = ("scale_input", "input_scale", _SCALED_FORMAT)
"""Tensors stored with a scaled weight: the scale of its inputs, and its format.

The scale of the inputs is needed only for 8-bit products."""
_PLAIN_FIX = "use the 16-bit weights of this base"


def scaled_weights(table: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Return weight name -> scale, for scaled 8-bit float weights: w = stored · scale.

    ComfyUI writes either `scale_weight` and a `scaled_fp8` marker, or `weight_scale` and `comfy_quant`."""
    by_name = {t.name: t for t in table}
    scales = {}
    for name, stored in by_name.items():
        if stored.dtype in _FP8 and name.rpartition(".")[2] == "weight":
            for end in ("scale_weight", "weight_scale"):
                if (scale := by_name.get(name.removesuffix("weight") + end)) is not None:
                    scales[name] = scale
    return scales


def _scaled_values(weight: StoredTensor, scale: StoredTensor, marker: StoredTensor | None) -> Tensor:
    """Read a weight and return stored · scale, rounded once to float32.

    The scale is a scalar or has one value per row."""
    where = f"{weight.file}: {weight.name}"
    if not weight.shape or scale.elements not in (1, weight.shape[0]) or (scale.shape or (1,))[0] != scale.elements:
        message = f"a weight of shape {weight.shape} has scales of shape {scale.shape}; "
        message += "veneer reads one scale per weight, or one per row"
        raise BaseError(message, where=where, fix=_PLAIN_FIX)
    if marker is not None:
        text = bytes(read_values(marker).to(torch.uint8).flatten().tolist())
        try:
            kind = json.loads(text)["format"]
        except (ValueError, TypeError, KeyError, RecursionError):
            kind = text[:60]
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise BaseError(f"veneer cannot read weights in the format {kind!r}", where=where, fix=_PLAIN_FIX)
    factor = read_values(scale).float().reshape(-1, *[1] * (len(weight.shape) - 1))
    if not factor.isfinite().all():
        raise BaseError("a scale is NaN or infinite", where=where, fix=_PLAIN_FIX)
    return (read_values(weight).float() * factor).view(weight.shape)


def _blocks(packed: StoredTensor, state: str, parts: list[StoredTensor]) -> Tensor:
    """Read a bitsandbytes 4-bit weight.

    The codes are in `weight`, the constants in `weight.absmax` and similar tensors. Settings are JSON, stored
    as the bytes of a tensor."""
    kind = state.rpartition("__")[2]
    tensors = {p.name.removeprefix(f"{packed.name}."): read_values(p) for p in parts}
    metadata = json.loads(bytes(tensors[state.removeprefix(f"{packed.name}.")].tolist()))
    where = f"{packed.file}: {packed.name}"
    if kind not in SAVED_KINDS:
        raise BaseError(f"a 4-bit weight in {kind!r}, a type that bitsandbytes does not define", where=where)
    if not torch.equal(tensors["quant_map"].float(), four_bit_values(kind)):
        raise BaseError(f"the weight's table of values is not {kind}'s", where=where)
    nested = tensors.get("nested_quant_map")
    if nested is not None and not torch.equal(nested.float(), dynamic_map()):
        raise BaseError("the constants are quantized with a map that is not bitsandbytes' own", where=where)
    mean = torch.tensor(float(metadata["nested_offset"])) if nested is not None else None
    codes, shape = read_values(packed).flatten(), tuple(metadata["shape"])
    constants = tensors["absmax"], tensors.get("nested_absmax"), mean
    sizes = int(metadata["blocksize"]), int(metadata.get("nested_blocksize") or 256)
    code = Blocks4(kind, shape, codes, *constants, *sizes)
    return Quantized(code, torch.bfloat16)


def check_kind(kind: str) -> None:
    """Raise ConfigError for an unknown quantization format."""
    if kind not in KINDS:
        suggestion = nearest(kind.lower(), [*KINDS, "keep"])
        message = f"{kind!r} is not a known quantization" + (f"; nearest: {suggestion[0]}" if suggestion else "")
        raise ConfigError(message, fix=f"{', '.join(KINDS)}, or keep")
