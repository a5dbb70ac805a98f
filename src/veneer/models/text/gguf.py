"""Load bases and their tokenizers from GGUF files.

The weights are dequantized, or stay in GGUF's quantized blocks. transformers reads headers with the gguf
package, which takes 12 seconds for a vocabulary of 262,144 tokens. `fast_headers` makes transformers use the
reader in files/gguf.py instead.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor

from veneer.errors import BaseError
from veneer.files.gguf import SCALARS, SkippedArray, read_gguf_file
from veneer.models.loading import loading
from veneer.models.quantize import LazyTensor, load_state, quantized_weights
from veneer.ops.quantization_formats import GgmlBlocks
from veneer.ops.quantized import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_gguf(file: Path, dtype: torch.dtype, *, keep: bool = False) -> PreTrainedModel:
    """Load the model of a GGUF file as an ordinary module that computes in `dtype`.

    Each tensor is read when transformers' loader asks for it, and dequantized: exactly in float32, rounded
    once in bfloat16. `keep`: linear weights and fused experts stay in their blocks (a `Quantized` of
    `GgmlBlocks`), with the same results. Raises transformers' errors, and BaseError for missing tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GgufReader(str(file), long_arrays=False)
    architecture = str(reader.fields["general.architecture"].contents())
    with fast_headers():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(empty, processor)
    in_blocks = set(quantized_weights(empty)) if keep else set()
    stored: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        key = tensor.name.removesuffix(".weight")  # In the model, fused experts have no ".weight" suffix.
        name = names.get(tensor.name) or names.get(key)
        if name is not None:
            stored.setdefault(name, []).append(tensor)
    state = {}
    for name, tensors in stored.items():
        shape = tuple(empty.get_parameter(name).shape)
        if name in in_blocks and all(t.tensor_type.name not in _PLAIN for t in tensors):
            read = partial(_blocks, processor, tensors, shape, dtype)
        else:
            read = partial(_dequantized, processor, tensors, shape, str(file))
        state[name] = LazyTensor("BF16", shape, read)
    model, info = load_state(type(empty), config, state, "", dtype)
    model.config.__dict__.pop("_model_name_or_path", None)
    if missing := sorted(info["missing_keys"]):
        message = f"{len(missing)} tensors of the model are not in the file, {missing[0]} among them"
        raise BaseError(message, where=str(file))
    return model


_PLAIN = ("F64", "F32", "F16", "BF16")


def _blocks(processor: Any, tensors: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in quantized blocks, with rows in transformers' order.

    The gate and up projections of each fused expert are joined."""
    parts = sorted(tensors, key=lambda t: "_up_" in t.name)  # [gate; up]
    raw = [torch.from_numpy(t.data.copy()) for t in parts]
    types = {t.tensor_type.name for t in parts}
    if len(types) > 1:  # One tensor cannot contain blocks of two types.
        joined = torch.cat([_values(t) for t in parts], 1).view(shape)
        return joined.to(dtype)
    rows = raw[0] if len(raw) == 1 else torch.cat(raw, 1)
    if rows.ndim == 2 and (order := _row_order(processor, parts[0], shape[0])) is not None:
        rows = rows[order]
    return Quantized(GgmlBlocks(types.pop(), shape, rows.reshape(-1, rows.shape[-1])), dtype)


def _row_order(processor: Any, tensor: Any, rows: int) -> torch.Tensor | None:
    """Return the file's row index of each model row, or None if the rows are in order.

    The orders differ if llama.cpp has permuted q and k."""
    numbers = np.arange(rows, dtype=np.float32)[:, None]
    weights = processor.process(weights=numbers, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}).weights
    order = torch.from_numpy(np.ascontiguousarray(weights)).flatten().long()
    return None if torch.equal(order, torch.arange(rows)) else order


def _values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def _dequantized(processor: Any, tensors: list[Any], shape: tuple[int, ...], where: str) -> torch.Tensor:
    parts = sorted(tensors, key=lambda t: "_up_" in t.name)
    values = [_values(t) for t in parts]
    if len(values) > 1:
        return torch.cat(values, 1).view(shape)
    name = parts[0].name
    out = processor.process(weights=values[0].numpy(), name=name, tensor_key_mapping={}, parsed_parameters={}).weights
    tensor = torch.from_numpy(np.ascontiguousarray(out))
    if tensor.numel() != math.prod(shape):
        raise BaseError(f"{name} is {tuple(tensor.shape)}, but the model expects {shape}", where=where)
    return tensor.view(shape)


# -- the file reader for transformers --------------------------------------------------------------------------------


class GgufReader:
    """A reader for transformers, with the `fields` and `tensors` of gguf's GGUFReader.

    Uses files/gguf.py to read the file. Without `long_arrays`, a tokenizer's arrays have a length but no
    elements. Raises the errors of `read_gguf_file`."""

    def __init__(self, path: str, *, long_arrays: bool = True) -> None:
        file = read_gguf_file(path, long_arrays=long_arrays)
        counts = (
            ("version", file.version, 4),
            ("tensor_count", len(file.entries), 10),
            ("kv_count", len(file.fields), 10),
        )
        self.fields: dict[str, ReaderField] = {}
        for name, value, kind in counts:
            parts, data = [np.array([value], SCALARS[kind])], [0]
            self.fields[f"GGUF.{name}"] = ReaderField(0, f"GGUF.{name}", parts, data, [GGUFValueType(kind)])
        for name, value in file.fields.items():
            self.fields[name] = _field(name, value, file.types[name])
        self.tensors = []
        for name, entry in file.entries.items():
            kind, size = gguf.GGMLQuantizationType(entry.type), entry.end - entry.begin
            shape = np.array(entry.shape[::-1], np.uint64)
            values = file.raw(name)
            elements, version = math.prod(entry.shape), self.fields["GGUF.version"]
            tensor = ReaderTensor(name, kind, shape, elements, size, entry.begin, values, version)
            self.tensors.append(tensor)


def _field(name: str, value: Any, types: tuple[int, ...]) -> ReaderField:
    """Return a header field as in gguf's reader: key length, key, type, data."""
    parts: list[Any] = [np.array([len(name)], np.uint64), _bytes(name), np.array([types[0]], np.uint32)]
    kinds = [GGUFValueType(kind) for kind in types]
    if len(types) == 1:
        if isinstance(value, str):
            parts += [np.array([len(value.encode())], np.uint64), _bytes(value)]
        else:
            parts.append(np.array([value], SCALARS[types[0]]))
        return ReaderField(0, name, parts, [len(parts) - 1], kinds)
    if isinstance(value, SkippedArray):  # Keep the length of a text array: it is the size of the vocabulary.
        texts = types[1] == GGUFValueType.STRING
        return ReaderField(0, name, parts, [0] * value.count if texts else [], [kinds[0], GGUFValueType.BOOL])
    values = [_bytes(text) for text in value] if types[1] == GGUFValueType.STRING else [*value.reshape(-1, 1)]
    places = [*range(len(parts), len(parts) + len(values))]
    return ReaderField(0, name, parts + values, places, kinds if values else kinds[:1])


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def dequantize(data: np.ndarray, kind: Any) -> np.ndarray:
    """Dequantize like gguf's `dequantize`, with compiled kernels where available.

    (…, bytes per row) -> (…, values per row) float32."""
    if kind.name in _PLAIN:
        return np.asarray(gguf.dequantize(data, kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = torch.from_numpy(np.array(data).reshape(-1, data.shape[-1]))
    shape = (*data.shape[:-1], data.shape[-1] // size * block)
    out: np.ndarray = GgmlBlocks(kind.name, shape, rows).dense(torch.float32, 0, len(rows)).numpy().reshape(shape)
    return out


def merges_of(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return the same merges as transformers' `generate_merges`, but in one pass.

    A merge joins two tokens into a third. The merges are sorted by highest score, then longest left part,
    then longest right part."""
    merges: list[tuple[str, str]] = []
    ordered = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    for _, pairs in itertools.groupby(ordered, key=lambda item: item[1]):
        cuts = [
            (token[:i], token[i:])
            for token, _ in pairs
            for i in range(len(token) - 1, 0, -1)
            if token[:i] in vocab and token[i:] in vocab
        ]
        merges += sorted(cuts, key=lambda cut: (len(cut[0]), len(cut[1])), reverse=True)
    return merges


def _mapped(path: str) -> np.ndarray:
    return np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)


@contextmanager
def fast_headers(*, vocabulary: bool = False) -> Iterator[None]:
    """Replace transformers' GGUF header functions with faster ones in the with-block.

    Only this thread uses the faster functions. Other threads call the original functions, but wait if they
    load a model (`loading`). `vocabulary`: also replace the functions that read a tokenizer."""
    with loading(), ExitStack() as undo:
        ours: dict[str, Callable[..., Any]] = {
            "gguf.GGUFReader": partial(GgufReader, long_arrays=False),
            "gguf.get_tensor_name_map": lru_cache(2)(gguf.get_tensor_name_map),  # called for each module
            **(_TOKENIZER_FUNCTIONS if vocabulary else dict[str, Callable[..., Any]]()),
        }
        for name, function in ours.items():
            module, _, last = name.rpartition(".")
            holder = importlib.import_module(module)
            theirs = getattr(holder, last)
            undo.callback(setattr, holder, last, theirs)
            setattr(holder, last, _for_this_thread(function, theirs))
        yield


def _for_this_thread(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `ours` in this thread and `theirs` in others."""
    me = threading.get_ident()
    return lambda *args, **named: (ours if threading.get_ident() == me else theirs)(*args, **named)


_TOKENIZER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "transformers.integrations.gguf.gguf_tokenizer_mapping.generate_merges": merges_of,
    "transformers.integrations.gguf.reader._mapped": _mapped,  # Slices of a memmap are slow.
}


_SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Names of byte-level tokenizers that first split numbers into digits.

These are the names in GGUF headers. GPT-2's tokenizer does not split numbers."""


def read_gguf_tokenizer(file: Path) -> Any:
    """Read the tokenizer of a GGUF file, without special tokens of other models.

    This function corrects two faults in transformers. First, transformers' tokenizer classes add special
    tokens of other models if the file lacks them. For DeepSeek-R1-Distill-Qwen-7B, they add three, so the
    tokenizer has more tokens than the model has rows. Second, transformers treats unknown byte-level
    tokenizers like GPT-2's. Raises transformers' errors."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with fast_headers(vocabulary=True):
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    fields = read_gguf_file(file).fields
    tokens = len(fields["tokenizer.ggml.tokens"])
    backend = tokenizer.backend_tokenizer
    if fields.get("tokenizer.ggml.model") == "gpt2" and fields.get("tokenizer.ggml.pre") in _SPLITS_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if len(tokenizer) <= tokens:
        return tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < tokens]
    state["model"]["vocab"] = {t: i for t, i in state["model"]["vocab"].items() if i < tokens}
    smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    for kind, key in _SPECIAL.items():
        at = fields.get(f"tokenizer.ggml.{key}")
        if at is not None and at < tokens:
            setattr(smaller, kind, smaller.convert_ids_to_tokens(int(at)))
    smaller.chat_template = tokenizer.chat_template
    return smaller


_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
