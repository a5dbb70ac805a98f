"""The sampler-trainer mismatch: differences of log-probabilities per token.

    gap_mean, gap_max     nats, over the tokens sampled for a step
    gap_share             tokens whose probability differs by more than 1 %

Above a run's bound, the sampled model is not the trained model, and the run stops before the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.errors import TrainingError
from veneer.ops.device_transfer import in_float64
from veneer.train.loop import MetricMeans

if TYPE_CHECKING:
    from veneer.train.config.distillation import DistillationSection
    from veneer.train.config.reinforcement import ReinforcementSection

_BEYOND = 0.01
"""Relative difference of probabilities from which `gap_share` counts a token."""


@dataclass
class Gap:
    """The mismatch of one step."""

    seen: MetricMeans = field(default_factory=MetricMeans)
    worst: float = 0.0

    def add(self, trainer: Tensor, sampler: Tensor) -> None:
        """Add log-probabilities of the same tokens from any devices.

        The sampler's are in float64."""
        own = in_float64(trainer.detach())
        gap = (own - sampler.to(own.device)).abs()
        self.worst = max(self.worst, float(gap.max()))
        self.seen.add(gap_mean=gap, gap_share=gap.expm1() > _BEYOND)

    def checked(self, section: ReinforcementSection | DistillationSection, fix: str) -> MetricMeans:
        """What was seen, and nothing where nothing was. Raises TrainingError where the mean is above the bound."""
        if "gap_mean" not in self.seen.counts:
            return self.seen
        mean = self.seen.sums["gap_mean"] / self.seen.counts["gap_mean"]
        if not mean <= section.gap:
            raise TrainingError(
                f"the answers were drawn from another model than the one that is trained: their tokens' "
                f"log-probabilities differ by {mean:.3g} nats on average, {self.worst:.3g} at most",
                where=f"{section.named}.gap is {section.gap:g}",
                fix=f"{fix}; a base in float32 has less rounding (base.dtype=float32); a higher {section.named}.gap "
                "trains all the same, off-policy by that much",
            )
        return MetricMeans.total([self.seen, MetricMeans({"gap_max": self.worst}, {"gap_max": 1})])
