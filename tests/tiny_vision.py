"""Tiny vision-language models on disk: the real classes with random weights.

Tests use `tiny_vision(folder, "llava")` wherever a user would give a model name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.tiny_base import tiny_tokenizer
from veneer.models.loading import errors_only

_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VISION_FAMILIES = ("llava", "blip", "florence2")


def tiny_vision(folder: Path, family: str = "llava") -> Path:
    """Write the model to `folder / family`, unless it exists. Return the folder."""
    target = folder / family
    if not (target / "model.safetensors").exists():
        torch.manual_seed(0)
        with errors_only():
            model, processor = {"llava": _llava, "blip": _blip, "florence2": _florence}[family]()
            model.save_pretrained(target)
            processor.save_pretrained(target)
    return target


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _llava() -> tuple[Any, Any]:
    """Return a language model that reads image patches as tokens and is prompted with a chat."""
    tokenizer = _tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=_CHAT,
        num_additional_image_tokens=1,
    )
    return model, processor


def _blip() -> tuple[Any, Any]:
    """Return a decoder that attends to the image with cross-attention and needs no prompt."""
    tokenizer = _tokenizer()
    text = _TEXT | {"vocab_size": len(tokenizer), "encoder_hidden_size": 16, "projection_dim": 16, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=_VISION)
    images = transformers.BlipImageProcessor(size={"height": 28, "width": 28})
    processor = transformers.BlipProcessor(image_processor=images, tokenizer=tokenizer)
    return transformers.BlipForConditionalGeneration(config), processor


def _florence() -> tuple[Any, Any]:
    """Return an encoder-decoder that is prompted with the name of a task."""
    tokenizer = _tokenizer()
    vision = {
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "window_size": 4,
        "projection_dim": 16,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 8,
    }
    text = {
        "model_type": "bart",
        "d_model": 16,
        "vocab_size": len(tokenizer),
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = transformers.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    images = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    processor = transformers.Florence2Processor(
        image_processor=images, tokenizer=tokenizer, num_additional_image_tokens=0
    )
    return transformers.Florence2ForConditionalGeneration(config), processor
