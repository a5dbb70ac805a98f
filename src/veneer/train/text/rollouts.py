"""Completions sampled during training: requests, results and the sampler protocol.

    with make(base, attachment, settings) as sampler:        the caller provides `make`; see veneer.serve
        rollouts = sampler.sample([CompletionRequest(prompt, seed, how, "run"), …])
        replay = sampler.replay(ids, lengths, trained, "run")
        logps = replayed_logps(base.model, ids, lengths, trained, replay)

`SamplerMismatch` measures the mismatch of sampler and trainer. The sampler reads the current adapter weights
from the attachment: nothing is saved, merged or synchronized, and the base is not copied unless the settings
ask for packed weights. `veneer.serve.engine.live` is the only implementation. `train.text.sampler_servers` samples
on servers instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from veneer.errors import TrainingError
from veneer.models.text.logprob_replay import Replay
from veneer.ops.attention import SharedRows
from veneer.ops.device_transfer import in_float64
from veneer.train.loop import MetricMeans
from veneer.train.text.policy_losses import kl_estimates

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase
    from veneer.train.config.distillation import DistillationSection
    from veneer.train.config.reinforcement import ReinforcementSection

_GAP_THRESHOLD = 0.01
"""Relative difference of probabilities above which `gap_share` counts a token."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a completion.

    temperature: 0 always selects the most likely token. grammar: (kind, text) that the completion must match;
    the kind is `json_schema`, `json_object` or `regex`. Ranges are as in `veneer.serve.request.Sampling`."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    grammar: tuple[str, str] | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """A request for a completion.

    The completion is a function of the seed, the prompt, `how` and the adapter's values, and does not depend
    on other requests.

    prompt: token ids. adapter: name on the attachment; "" is the base without adapter."""

    prompt: tuple[int, ...]
    seed: int
    how: SamplingParams
    adapter: str = ""


@dataclass(frozen=True)
class Rollout:
    """A sampled completion.

    tokens: token ids, including the stop token
    logps: log p of each token in nats, in the model's own distribution (temperature 1, no filters)
    sampling_logps: log p of each token in the distribution that the token was sampled from
    text: the text without the stop token
    cut: whether the completion ended at `max_tokens`
    cached: number of prompt tokens found in the KV cache"""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    sampling_logps: tuple[float, ...]
    text: str
    cut: bool
    cached: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; floats are exact."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rollout:
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        arguments.pop("others", None)  # a field of earlier versions
        return cls(**arguments)


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler.

    rows: completions sampled at once. context: maximum tokens of a prompt and its completion; 0 is the limit
    of the base. pack_bytes: budget for prepacked copies of the base's projections, which are faster for few
    rows; 0 for none. exact: a completion is bit for bit the same whatever else is sampled at the same time,
    and `replay` reproduces its log-probabilities."""

    rows: int = 32
    context: int = 0
    pack_bytes: int = 0
    exact: bool = True


class Sampler(Protocol):
    """A sampler that uses the current state of the adapters on an attachment."""

    settings: SamplerSettings

    @abstractmethod
    def problems(self, adapter: str) -> list[str]:
        """Return the reasons why the sampler does not support an adapter on the attachment."""

    @abstractmethod
    def sample(
        self, requests: Sequence[CompletionRequest], interrupted: Callable[[], bool] = lambda: False
    ) -> list[Rollout] | None:
        """Return the completions in the order of the requests; None once `interrupted()` is true.

        Adapters must not change during the call. Raises VeneerError for requests that cannot be sampled: a
        prompt longer than the context, an unusable adapter, an invalid grammar."""

    @abstractmethod
    def replay(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        trained: Tensor,
        adapter: str = "",
        shared: SharedRows | None = None,
    ) -> Replay:
        """Return the sampler's forward pass over the given rows; arguments as in `token_logps`.

        If `exact`, the values equal the values at sampling bit for bit."""


MakeSampler = Callable[["TextBase", "Attachment", SamplerSettings], AbstractContextManager[Sampler]]


def sampling_metrics(rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
    """Return the metrics of a sampling, for the log.

    They are the mean and total number of sampled tokens, the seconds, the number and share of truncated
    completions, and the share of prompt tokens found in the KV cache."""
    tokens, cut, count = sum(len(r.logps) for r in rollouts), sum(r.cut for r in rollouts), max(1, len(rollouts))
    return {
        "answer_tokens": tokens / count,
        "drawn_tokens": float(tokens),
        "drawn_seconds": seconds,
        "cut_answers": float(cut),
        "cut_share": cut / count,
        "prompt_cached": sum(r.cached for r in rollouts) / max(1, sum(len(r.prompt) for r in rollouts)),
    }


@dataclass
class SamplerMismatch:
    """The sampler-trainer mismatch of one step: differences of log-probabilities per token.

        gap_mean, gap_max     nats, over the tokens sampled for a step
        gap_share             share of tokens with a probability that differs by more than 1%
        gap_kl                estimate of KL(sampler ‖ trainer) (`kl_estimates`), nats per token

    If the mean is above the run's bound, the sampled model is not the trained model. The run then stops
    before the optimizer step."""

    metric_means: MetricMeans = field(default_factory=MetricMeans)
    worst: float = 0.0

    def add(self, trainer: Tensor, sampler: Tensor) -> None:
        """Add the trainer's and the sampler's log-probabilities of the same tokens.

        The tensors can be on different devices. sampler: float64."""
        trainer_logps = in_float64(trainer.detach())
        sampler = sampler.to(trainer_logps.device)
        difference, kl = (trainer_logps - sampler).abs(), kl_estimates(sampler, trainer_logps)
        self.worst = max(self.worst, float(difference.max()))
        self.metric_means.add(gap_mean=difference, gap_share=difference.expm1() > _GAP_THRESHOLD, gap_kl=kl)

    def checked(self, section: ReinforcementSection | DistillationSection, fix: str) -> MetricMeans:
        """Return the metrics, if any. Raise TrainingError if the mean difference is above the bound."""
        if "gap_mean" not in self.metric_means.counts:
            return self.metric_means
        mean = self.metric_means.sums["gap_mean"] / self.metric_means.counts["gap_mean"]
        if not mean <= section.gap:
            raise TrainingError(
                f"sampler and trainer disagree: log-probabilities of the sampled tokens differ by {mean:.3g} nats on "
                f"average, {self.worst:.3g} at most",
                where=f"{section.named}.gap is {section.gap:g}",
                fix=f"{fix}; base.dtype=float32 reduces rounding; a higher {section.named}.gap permits "
                "off-policy training up to that gap",
            )
        return MetricMeans.total([self.metric_means, MetricMeans({"gap_max": self.worst}, {"gap_max": 1})])
