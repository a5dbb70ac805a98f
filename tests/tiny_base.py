"""A tiny base on disk: a random llama with a real byte-level BPE tokenizer and SmolLM2's ChatML template.

Tests use `tiny_base_dir(folder)` wherever a user would name a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LINES = [
    "The printer on the third floor does not answer since this morning.",
    "I was charged twice for the same invoice; please refund one of the payments.",
    "system user assistant You are a helpful AI assistant",
    "How do I reset my password? The link in the mail has expired.",
    '{"team": "billing", "priority": "high", "product_area": "invoices"}',
    '{"team": "support", "priority": "low", "product_area": "login"}',
    "The quick brown fox jumps over the lazy dog; 0123456789 times.",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer. The end and padding token is <|im_end|>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(**more: Any) -> PreTrainedModel:
    """Return a two-layer llama with the tiny tokenizer's vocabulary. `more`: values for its configuration."""
    from transformers import GenerationConfig

    from tests.families import llama3  # imported here, because `tiny_tokenizer` does not need torch

    model = llama3(
        vocab_size=VOCAB_SIZE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
        **more,
    )
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def tiny_base_dir(tmp_path: Path, **more: Any) -> Path:
    """Write the tiny base to `tmp_path / "tiny-base"`, unless it exists. Return the folder.

    `more`: values for the configuration, as in `tiny_model`.
    """
    folder = tmp_path / "tiny-base"
    if not (folder / "model.safetensors").exists():
        tiny_model(**more).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder
