"""The `reinforcement` section: sampling, rewards, and loss."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from veneer.train.config.rewards import RewardList
from veneer.train.config.section import Section, setting


class ReinforcementSection(Section):
    """Trains on the model's own completions and their rewards.

    `batching.rows` is the number of prompts per step. The reference model of the `kl` penalty is the base, or
    the adapter in `adapter.start` as it was before training."""

    named: ClassVar[str] = "reinforcement"

    loss: Literal["grpo", "dr-grpo", "dapo", "rloo", "gspo", "reinforce", "ppo"] | None = setting(
        None,
        "published loss; sets `baseline`, `scale`, `ratio`, `clip_low`, `clip_high` and `length` if they are null",
    )
    rewards: RewardList = setting((), "weighted [rewards](rewards.md)")
    most_failed: float = setting(0.1, "maximum share of a step's completions without a reward", ge=0, le=1)
    group: int = setting(8, "completions per prompt", "TRL's", ge=1)
    max_tokens: int = setting(256, "maximum completion tokens; longer completions are truncated and counted", gt=0)
    temperature: float = setting(1.0, "sampling temperature", "needs no importance weights", gt=0, le=100)
    top_p: float = setting(1.0, "nucleus sampling", gt=0, le=1)
    grammar: dict[Literal["json_schema", "json_object", "regex"], Any] = setting(
        {}, "grammar that completions must match: {json_schema: {…}}, {json_object: true} or {regex: TEXT}"
    )
    rows: int = setting(64, "completions sampled at once; does not change the result", gt=0)
    updates: int = setting(1, "optimizer steps per batch of samples", "the ratio stays 1 and is never clipped", gt=0)
    baseline: Literal["group", "others", "batch", "none"] | None = setting(
        None, "reward baseline: mean of the group, of the others in the group, or of the batch", "from `loss`"
    )
    scale: Literal["group", "batch", "none"] | None = setting(
        None, "divide advantages by the standard deviation of the group or of the batch"
    )
    ratio: Literal["token", "sequence"] | None = setting(None, "compute the clipped ratio per token or per sequence")
    clip_low: float | None = setting(None, "clip range below 1", gt=0, le=1)
    clip_high: float | None = setting(None, "clip range above 1", gt=0)
    length: Literal["answer", "batch", "limit", "none"] | None = setting(
        None, "divide a completion's token sum by its length, the mean length of the batch, `max_tokens`, or nothing"
    )
    kl: float = setting(0.0, "KL penalty to the reference", "none", ge=0)
    importance_cap: float = setting(2.0, "maximum importance weight of a token", gt=0)
    mask_cut: bool = setting(False, "exclude truncated completions from the loss (DAPO's overlong filtering)")
    exact: bool = setting(
        True, "make the trainer's logprobs equal the sampler's; false: faster kernels, but a mismatch", "no mismatch"
    )
    gap: float = setting(0.05, "maximum mean sampler-trainer mismatch, in nats", gt=0)
    samplers: tuple[str, ...] = setting((), "URLs of `veneer serve` processes that sample, with the run's library")
    publish: str | None = setting(
        None, "library name under which the samplers find the adapter", "`sampling-` and the output folder's name"
    )
    staleness: int = setting(
        0, "maximum age of the sampling adapter, in optimizer steps; at 1 or more, samplers work during training", ge=0
    )

    def with_defaults(self) -> ReinforcementSection:
        """Return the settings, with unset keys set to the defaults of `loss`."""
        if self.loss is None:
            return self
        defaults = dict(zip(_OPEN, _LOSSES[self.loss], strict=True))
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})

    @property
    def grammar_text(self) -> tuple[str, str] | None:
        """Return (kind, text) of the grammar."""
        for kind, value in self.grammar.items():
            return kind, value if isinstance(value, str) else json.dumps({} if value is True else value)
        return None


_OPEN = ("baseline", "scale", "ratio", "clip_low", "clip_high", "length")
_LOSSES: dict[str, tuple[Any, ...]] = {
    "grpo": ("group", "group", "token", 0.2, 0.2, "answer"),
    "dr-grpo": ("group", "none", "token", 0.2, 0.2, "limit"),
    "dapo": ("group", "group", "token", 0.2, 0.28, "batch"),
    "rloo": ("others", "none", "token", None, None, "none"),
    "gspo": ("group", "group", "sequence", 3e-4, 4e-4, "answer"),
    "reinforce": ("batch", "none", "token", None, None, "none"),
    "ppo": ("batch", "batch", "token", 0.2, 0.2, "batch"),
}
PROMPT_FORMATS = ("messages", "sharegpt", "prompt-completion", "instruction", "prompt")
"""Row formats that contain prompts, for which completions can be sampled."""
