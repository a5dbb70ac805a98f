"""Policy losses, compared with TRL's GRPOTrainer: value and gradient for the same numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.text.policy_losses import advantages, clipped, kl_estimates, length_factors, per_token, policy_ratios

pytestmark = pytest.mark.peers

LENGTHS = [5, 2, 7, 3, 4, 6]
LIMIT = 9
CASES: dict[str, tuple[str, str]] = {  # veneer's loss -> TRL's (loss_type, importance_sampling_level)
    "grpo": ("grpo", "token"), "dr-grpo": ("dr_grpo", "token"), "dapo": ("dapo", "token"), "gspo": ("grpo", "sequence"),
}  # fmt: skip


def theirs(
    kind: str,
    level: str,
    settings: ReinforcementSection,
    now: Tensor,
    old: Tensor,
    reference: Tensor,
    worth: Tensor,
    beta: float,
) -> Tensor:
    """Return TRL's loss for these log-probabilities, which replace those of a model."""
    from trl import GRPOTrainer

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(values.split(LENGTHS)), batch_first=True)

    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.float64))
    trainer: Any = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = padded(now), torch.zeros_like(mask), None
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold, trainer.use_vllm = 1.0, None, False
    trainer.importance_sampling_level, trainer.loss_type, trainer.beta = level, kind, beta
    trainer.epsilon_low, trainer.epsilon_high = settings.clip_low, settings.clip_high
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = trainer.model.training = False
    trainer.max_completion_length, trainer.accelerator.num_processes = LIMIT, 1
    trainer.accelerator.gather.side_effect = lambda x: x
    trainer.accelerator.reduce.side_effect = lambda x, reduction: x
    trainer._metrics = {"eval": defaultdict(list)}
    ids = torch.zeros(mask.shape, dtype=torch.long)
    given = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": worth,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, given)
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", list(CASES))
def test_value_and_gradient_are_trls(name: str, beta: float) -> None:
    g = torch.Generator().manual_seed(4)
    old, reference = (-torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64) * 3 for _ in range(2))
    now = old + 0.4 * torch.randn(len(old), generator=g, dtype=torch.float64)
    settings = ReinforcementSection(loss=name).with_defaults()  # type: ignore[arg-type]
    rewards = torch.randn(6, generator=g, dtype=torch.float64)
    worth = advantages(rewards, [0, 0, 0, 1, 1, 1], baseline=settings.baseline, scale=settings.scale)  # type: ignore[arg-type]
    groups = rewards.view(2, 3)
    spread = groups.std(1, keepdim=True) + 1e-4 if settings.scale == "group" else 1.0
    torch.testing.assert_close(worth, ((groups - groups.mean(1, keepdim=True)) / spread).flatten())

    found = []
    for side in ("ours", "theirs"):
        logps = now.clone().requires_grad_()
        if side == "ours":
            ratios = policy_ratios(logps, old, LENGTHS, level=settings.ratio)  # type: ignore[arg-type]
            losses = clipped(ratios, per_token(worth, LENGTHS), settings.clip_low, settings.clip_high)
            losses = losses + beta * kl_estimates(logps, reference)
            factors = length_factors(LENGTHS, settings.length, LIMIT)  # type: ignore[arg-type]
            loss = (per_token(factors, LENGTHS) * losses).sum() / len(LENGTHS)
        else:
            loss = theirs(*CASES[name], settings, logps, old, reference, worth, beta)
        found.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    for ours, trls in zip(*found, strict=True):
        torch.testing.assert_close(ours, trls)
