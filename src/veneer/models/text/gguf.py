"""GGUF files as bases: read by transformers and made a plain model again, dequantised or with its linear weights in
the blocks of the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from veneer.errors import BaseError
from veneer.models.loading import loading
from veneer.models.quantise import LazyTensor, forget_quantiser, load_state, quantised_weights
from veneer.ops.ggml import Ggml
from veneer.ops.quantised import Quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_gguf"]


def load_gguf(file: Path, dtype: torch.dtype, *, keep: bool = False) -> PreTrainedModel:
    """The model in a GGUF file: an ordinary module that computes in `dtype`.

    Every weight is dequantised, exactly in float32, rounded once in bfloat16. `keep`: linear weights and fused experts
    stay in their blocks (a `Quantised` of `Ggml`), and what is computed is the same. Raises what transformers raises,
    and BaseError for tensors that are missing."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from veneer.files.gguf_header import fast_headers

    if keep:
        return _kept(file, dtype)
    with loading(), _no_progress_bar(), fast_headers():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        )
    # What was read is dequantised, but transformers still takes the model for a quantised one, and refuses to save it.
    model.config.__dict__.pop("_model_name_or_path", None)
    forget_quantiser(model)
    return model


def _kept(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Tensors by transformers' table of names, each read when the loader asks for it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from veneer.files.gguf_header import Outline, fast_headers

    reader = Outline(str(file))
    with fast_headers():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    with loading(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    architecture = str(reader.get_field("general.architecture").contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(empty, processor)
    wanted = {n: tuple(empty.get_parameter(n).shape) for n in quantised_weights(empty)}
    stored: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        key = tensor.name.removesuffix(".weight")  # fused experts have no suffix in the model
        name = names.get(tensor.name) or names.get(key)
        if name is not None:
            stored.setdefault(name, []).append(tensor)
    state = {}
    for name, tensors in stored.items():
        if name in wanted and all(t.tensor_type.name not in _PLAIN for t in tensors):
            read = partial(_blocks, processor, tensors, wanted[name], dtype)
        else:
            read = partial(_dequantised, processor, tensors, tuple(empty.get_parameter(name).shape), str(file))
        state[name] = LazyTensor("BF16", tuple(empty.get_parameter(name).shape), read)
    model, info = load_state(type(empty), config, state, "", dtype)
    if missing := sorted(info["missing_keys"]):
        raise BaseError(
            f"{len(missing)} tensors of the model are not in the file, {missing[0]} among them", where=str(file)
        )
    return model


_PLAIN = ("F64", "F32", "F16", "BF16")


def _blocks(processor: Any, tensors: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A weight in its blocks: gate and up of fused experts joined for each expert, rows in transformers' order."""
    parts = sorted(tensors, key=lambda t: "_up_" in t.name)  # [gate; up]
    raw = [torch.from_numpy(t.data.copy()) for t in parts]
    types = {t.tensor_type.name for t in parts}
    if len(types) > 1:  # two types do not lie in one tensor
        whole = torch.cat([_values(t) for t in parts], 1).view(shape)
        return whole.to(dtype)
    one = raw[0] if len(raw) == 1 else torch.cat(raw, 1)
    if one.ndim == 2 and (order := _row_order(processor, parts[0], shape[0])) is not None:
        one = one[order]
    return Quantised(Ggml(types.pop(), shape, one.reshape(-1, one.shape[-1])), dtype)


def _row_order(processor: Any, tensor: Any, rows: int) -> torch.Tensor | None:
    """Which row of the file stands in each row of the model (llama.cpp turns those of q and k); None: as they are."""
    numbers = np.arange(rows, dtype=np.float32)[:, None]
    found = processor.process(weights=numbers, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}).weights
    order = torch.from_numpy(np.ascontiguousarray(found)).flatten().long()
    return None if torch.equal(order, torch.arange(rows)) else order


def _values(tensor: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    if tensor.tensor_type.name in _PLAIN:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    raw = torch.from_numpy(tensor.data.copy())
    shape = tuple(int(n) for n in reversed(tensor.shape))
    rows = raw.reshape(-1, raw.shape[-1])
    return Ggml(tensor.tensor_type.name, shape, rows).dense(torch.float32, 0, len(rows)).view(shape)


def _dequantised(processor: Any, tensors: list[Any], shape: tuple[int, ...], where: str) -> torch.Tensor:
    parts = sorted(tensors, key=lambda t: "_up_" in t.name)
    values = [_values(t) for t in parts]
    if len(values) > 1:
        return torch.cat(values, 1).view(shape)
    name = parts[0].name
    out = processor.process(weights=values[0].numpy(), name=name, tensor_key_mapping={}, parsed_parameters={}).weights
    made = torch.from_numpy(np.ascontiguousarray(out))
    if made.numel() != math.prod(shape):
        raise BaseError(f"{name} is {tuple(made.shape)}, the model has {shape}", where=where)
    return made.view(shape)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one here with tqdm itself, which its own switch for progress bars does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    drawn: Any = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = drawn
