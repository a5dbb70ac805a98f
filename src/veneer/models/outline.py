"""What a base is, told without loading its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.models.fingerprint import fingerprint
from veneer.models.loading import loading
from veneer.models.sources import is_image
from veneer.models.text.base import choose_device, choose_dtype, end_of_turn, read_config, read_tokenizer
from veneer.models.weights import stored_dtype, tensor_table

__all__ = ["outline"]


def outline(name: str, path: Path) -> dict[str, Any]:
    """JSON-ready facts of the base at `path`.

    Of an image base those of `image_outline.outline_image`. Of a text base: family, sizes, stored and chosen dtype with
    the reason, fingerprint, the token that ends a turn, and every kind of linear module and expert parameter with its
    shape and count."""
    if is_image(path):
        from veneer.models.image.outline import outline_image

        return outline_image(name, path)
    from transformers import AutoModelForCausalLM

    table, config, tokenizer = tensor_table(path), read_config(path), read_tokenizer(path)
    stored = stored_dtype(table)
    dtype, reason = choose_dtype("auto", choose_device("auto"), stored)
    with loading(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    turn = end_of_turn(tokenizer)
    linear = Counter(
        (n.rpartition(".")[2], m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    )
    experts = Counter((n.rpartition(".")[2], tuple(p.shape)) for n, p in model.named_parameters() if p.dim() == 3)
    return {
        "name": name,
        "path": str(path),
        "family": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context": getattr(text, "max_position_embeddings", None),
        "stored_dtype": stored,
        "stored_bytes": sum(t.size for t in table),
        "runs_in": str(dtype).removeprefix("torch."),
        "because": reason,
        "chat_template": bool(tokenizer.chat_template),
        "end_of_turn": None if turn is None else tokenizer.convert_ids_to_tokens(turn),
        "fingerprint": fingerprint(path, config, table),
        "linear_modules": [{"target": t, "count": n, "in": i, "out": o} for (t, i, o), n in linear.items()],
        "expert_parameters": [{"target": t, "count": n, "shape": list(s)} for (t, s), n in experts.items()],
    }
