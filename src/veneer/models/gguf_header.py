"""Headers of GGUF files, read fast: the gguf package's reader takes 12 seconds for a vocabulary of 262,144.

Reader(path)           gguf's GGUFReader in all it offers; arrays are read in one pass each
with fast_headers():   transformers reads headers by it, too
read_gguf_tokenizer    the file's own tokenizer, without what transformers' classes add to it
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

__all__ = ["Reader", "fast_headers", "read_gguf_tokenizer"]


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
            return 12 + values.nbytes, [kind, count, *values.reshape(-1, 1)], list(range(2, n + 2)), types
        if 8 * n > left:
            raise ValueError(f"an array of {n:,} texts and {left:,} bytes left")
        parts, end, view = [kind, count], len(data), memoryview(data)
        for _ in range(n):
            length = int.from_bytes(view[at : at + 8], "little")
            if at + 8 + length > end:
                raise ValueError(f"a text of {length:,} bytes at byte {at:,} of {end:,}")
            parts += (data[at : at + 8], data[at + 8 : at + 8 + length])
            at += 8 + length
        return at - orig_offs, parts, list(range(3, 2 * n + 3, 2)), types

    def _one_by_one(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
        return size, parts, indices, types


_lock = threading.RLock()


@contextmanager
def fast_headers() -> Iterator[None]:
    """transformers imports its reader from gguf whenever it reads a file. Ours is a subclass: whoever else gets it
    meanwhile reads the same."""
    with _lock:
        before, gguf.GGUFReader = gguf.GGUFReader, Reader  # type: ignore[misc]
        try:
            yield
        finally:
            gguf.GGUFReader = before  # type: ignore[misc]


_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Kinds of byte-level tokenizers that part digits first, by the name in a header; GPT-2's own do not."""


def read_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file: its vocabulary, merges and special tokens, and no others.

    transformers makes its backend; but the classes that it goes through add the special tokens of other models where
    the file has none of that name (three to DeepSeek-R1-Distill-Qwen-7B's: more tokens than the model has rows), and
    it takes every byte-level tokenizer whose kind it does not know for GPT-2's. Raises what transformers raises."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with fast_headers():
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
