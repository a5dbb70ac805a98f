"""Headers of GGUF files, read fast: the gguf package's reader takes 12 seconds for a vocabulary of 262,144.

Reader(path)           gguf's GGUFReader in all it offers; arrays are read in one pass each
Outline(path)          the same without the tokenizer's arrays
with fast_headers():   transformers reads headers and values of blocks by ours, too
read_gguf_tokenizer    the file's own tokenizer, without what transformers' classes add to it
"""

from __future__ import annotations

import importlib
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from veneer.models.compat_transformers import TRANSFORMERS

__all__ = ["Outline", "Reader", "dequantise", "fast_headers", "merges_of", "read_gguf_tokenizer"]


class Reader(gguf.GGUFReader):
    """Raises ValueError where an array is longer than the file."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if int(raw_type) != GGUFValueType.ARRAY:
            return self._one_by_one(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        inner, n, at = GGUFValueType(int(kind[0])), int(count[0]), orig_offs + 12
        if inner == GGUFValueType.ARRAY or self.byte_order == "S":
            return self._one_by_one(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, inner] if n else [GGUFValueType.ARRAY]
        data = self.data.view(np.ndarray)  # slices of a memmap are ten times as slow to make
        left = len(data) - at
        if inner != GGUFValueType.STRING:
            dtype = np.dtype(self.gguf_scalar_to_np[inner])
            if n * dtype.itemsize > left:
                raise ValueError(f"an array of {n:,} numbers and {left:,} bytes left")
            values = data[at : at + n * dtype.itemsize].view(dtype)
            if not self._kept(n):
                return 12 + values.nbytes, [kind, count], [], types
            return 12 + values.nbytes, [kind, count, *values.reshape(-1, 1)], list(range(2, n + 2)), types
        if 8 * n > left:
            raise ValueError(f"an array of {n:,} texts and {left:,} bytes left")
        parts, end, view, kept = [kind, count], len(data), memoryview(data), self._kept(n)
        for _ in range(n):
            length = int.from_bytes(view[at : at + 8], "little")
            if at + 8 + length > end:
                raise ValueError(f"a text of {length:,} bytes at byte {at:,} of {end:,}")
            if kept:
                parts += (data[at : at + 8], data[at + 8 : at + 8 + length])
            at += 8 + length
        if kept:
            return at - orig_offs, parts, list(range(3, 2 * n + 3, 2)), types
        return at - orig_offs, parts, [0] * n, [GGUFValueType.ARRAY, GGUFValueType.BOOL]  # as many as there are

    def _kept(self, n: int) -> bool:
        return True

    def _one_by_one(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
        return size, parts, indices, types


class Outline(Reader):
    """All of a header but what the tokenizer's arrays hold; of texts, how many there are is kept."""

    def _kept(self, n: int) -> bool:
        return n <= 4096  # more entries than any array of a config has


def dequantise(data: np.ndarray, kind: Any) -> np.ndarray:
    """gguf's `dequantize`: (…, bytes of a row) -> (…, values of a row) float32. By compiled kernels where they run."""
    import torch

    from veneer.ops.ggml import Ggml

    if kind.name in ("F64", "F32", "F16", "BF16"):
        return np.asarray(_dequantize(data, kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = torch.from_numpy(np.array(data).reshape(-1, data.shape[-1]))
    shape = (*data.shape[:-1], data.shape[-1] // size * block)
    out: np.ndarray = Ggml(kind.name, shape, rows).dense(torch.float32, 0, len(rows)).numpy().reshape(shape)
    return out


def merges_of(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """transformers' `generate_merges` in one pass: every token cut in two tokens, those of the highest score first, and
    of one score those whose left part is longest, then right."""
    found: list[tuple[str, str]] = []
    ordered = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    for _, same in itertools.groupby(ordered, key=lambda item: item[1]):
        cuts = [
            (token[:i], token[i:])
            for token, _ in same
            for i in range(len(token) - 1, 0, -1)
            if token[:i] in vocab and token[i:] in vocab
        ]
        found += sorted(cuts, key=lambda cut: (len(cut[0]), len(cut[1])), reverse=True)
    return found


def _mapped(path: str) -> np.ndarray:
    return np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)


_lock = threading.RLock()
_dequantize, _reader = gguf.dequantize, gguf.GGUFReader


@contextmanager
def fast_headers(*, vocabulary: bool = False) -> Iterator[None]:
    """transformers takes these from gguf and its own modules whenever it reads a file. Ours give the same, and other
    threads get gguf's own reader meanwhile, since what is left out of ours they may need. `vocabulary`: for reading a
    tokenizer."""
    me, names = threading.get_ident(), lru_cache(2)(gguf.get_tensor_name_map)  # asked for each module of a model
    swaps: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lambda path: (Outline if threading.get_ident() == me else _reader)(path)),
        (gguf, "dequantize", dequantise),
        (gguf, "get_tensor_name_map", names),
    ]
    for name, ours in _OF_A_VOCABULARY.items() if vocabulary else ():
        TRANSFORMERS(name)  # says so where there is none
        module, _, last = name.rpartition(".")
        swaps.append((importlib.import_module(module), last, ours))
    with _lock, ExitStack() as undo:
        for holder, name, ours in swaps:
            undo.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, ours)
        yield


_OF_A_VOCABULARY = {
    "transformers.integrations.gguf.gguf_tokenizer_mapping.generate_merges": merges_of,
    "transformers.integrations.gguf.reader._mapped": _mapped,  # slices of a memmap are slow
}


_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Kinds of byte-level tokenizers that part digits first, by the name in a header; GPT-2's own do not."""


def read_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file: its vocabulary, merges and special tokens, and no others.

    transformers makes its backend; but the classes that it goes through add the special tokens of other models where
    the file has none of that name (three to DeepSeek-R1-Distill-Qwen-7B's: more tokens than the model has rows), and
    it takes every byte-level tokenizer whose kind it does not know for GPT-2's. Raises what transformers raises."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with fast_headers(vocabulary=True):
        made: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    fields = Reader(str(file)).fields

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    tokens = len(fields["tokenizer.ggml.tokens"].data)
    backend = made.backend_tokenizer
    digits = field("tokenizer.ggml.model") == "gpt2" and field("tokenizer.ggml.pre") in _DIGIT_BY_DIGIT
    if digits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if len(made) <= tokens:
        return made
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["id"] < tokens]
    whole["model"]["vocab"] = {t: i for t, i in whole["model"]["vocab"].items() if i < tokens}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))
    for kind, key in _SPECIAL.items():
        at = field(f"tokenizer.ggml.{key}")
        if at is not None and at < tokens:
            setattr(own, kind, own.convert_ids_to_tokens(int(at)))
    own.chat_template = made.chat_template
    return own


_SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
