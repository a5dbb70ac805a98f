"""The loss of a text base over rows laid end to end: Σ −log p over the trained tokens, in float32.

    text_loss(model, input_ids (N,), lengths, trained (N,)) -> scalar

Token i with trained[i] is predicted from the tokens before it in its own row. This is the slow reference: it pads the
rows and scores them with the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["text_loss"]


def text_loss(model: Any, input_ids: Tensor, lengths: list[int], trained: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in nats. input_ids: (N,) int64, trained: (N,) bool, Σ lengths = N."""
    rows = input_ids.split(lengths)
    width = max(lengths)
    ids = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([F.pad(t, (0, width - len(t))) for t in trained.split(lengths)])
    attend = torch.arange(width, device=ids.device)[None] < torch.tensor(lengths, device=ids.device)[:, None]
    logits = model(input_ids=ids, attention_mask=attend.long(), use_cache=False).logits
    wanted = mask[:, 1:]
    return F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum")
