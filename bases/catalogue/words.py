"""The tokenizers of the catalogue bases, trained on their captions: CLIP's byte-pair encoding and T5's pieces."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

LENGTH = 32
"""Tokens a prompt may have, start and end included, in both encoders."""
GUIDANCE = {"flux": 2.0, "sdxl": 3.0}
"""What each base draws best at (docs/catalogue-bases.md); diffusers' own are 3.5 and 5."""

_PIECES = 2000
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizers(captions: list[str], work: Path) -> None:
    """Both, into WORK/tokenizers, if they are not there.

    Training breaks ties between equally frequent pieces by chance, so a second training numbers them otherwise: what
    was trained with one pair of tokenizers must be used with that pair.
    """
    folder = work / "tokenizers"
    if not (folder / "t5").is_dir():
        clip_tokenizer(captions).save_pretrained(folder / "clip")
        t5_tokenizer(captions).save_pretrained(folder / "t5")


def load_tokenizers(work: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    folder = work / "tokenizers"
    return CLIPTokenizer.from_pretrained(folder / "clip"), T5TokenizerFast.from_pretrained(folder / "t5")


def clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES + len(alphabet) * 2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        special_tokens=[], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.model.save(folder)
        vocab = json.loads(Path(folder, "vocab.json").read_text())
        # A single byte at the end of a word must have a piece too, whatever the captions hold.
        for byte in alphabet:
            vocab.setdefault(byte + "</w>", len(vocab))
        for special in ("<|startoftext|>", "<|endoftext|>"):
            vocab.setdefault(special, len(vocab))
        merges = [tuple(line.split()) for line in Path(folder, "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """Whole words by how often they come, and single characters for what is in no caption.

    A trainer of unigram pieces finds far too few in some hundred words: it cut captions into twice as many pieces."""
    counts = Counter(piece for text in captions for piece in re.findall(r"[\w-]+|[^\w\s]", text.lower()))
    words = [(f"▁{word}" if word[0].isalnum() else word, n) for word, n in counts.most_common(_PIECES)]
    total = sum(n for _, n in words)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, math.log(n / total)) for word, n in words]
    known = {word for word, _ in pieces}
    pieces += [(chr(c), -20.0) for c in range(33, 127) if chr(c) not in known] + [("▁", -20.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH, do_lower_case=True)
