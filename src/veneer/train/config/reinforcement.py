"""What `reinforcement` holds: how answers are drawn, what they are worth, and the loss of it."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from veneer.train.config.rewards import RewardList
from veneer.train.config.section import Section, setting


class ReinforcementSection(Section):
    """Learning from the model's own answers and what they are worth; without a `loss`, nothing is drawn.

    `batching.rows` counts prompts. The reference of `kl` is the base, or `adapter.start` as it was."""

    named: ClassVar[str] = "reinforcement"

    loss: Literal["grpo", "dr-grpo", "dapo", "rloo", "gspo", "reinforce", "ppo"] | None = setting(
        None, "what the keys that are left open are: as its paper has them (veneer.train.text.policy_losses)"
    )
    rewards: RewardList = setting((), "what an answer is worth: a weighted sum of these (reference/rewards.md)")
    most_failed: float = setting(
        0.1, "share of a step's answers that may be left without a reward before the run stops", ge=0, le=1
    )
    group: int = setting(8, "answers drawn to each prompt", "TRL's", ge=1)
    max_tokens: int = setting(256, "most tokens of an answer; one that is longer is cut there, and counted", gt=0)
    temperature: float = setting(
        1.0, "of the draw", "what is drawn from is then what is trained, and no weight corrects for it", gt=0, le=100
    )
    top_p: float = setting(1.0, "tokens are drawn from the most likely ones of this share", gt=0, le=1)
    grammar: dict[Literal["json_schema", "json_object", "regex"], Any] = setting(
        {}, "what answers are made to match: {json_schema: {…}}, {json_object: true} or {regex: TEXT}"
    )
    rows: int = setting(64, "answers drawn at once; changes memory and speed, never the result", gt=0)
    environment: str | None = setting(
        None,
        "Python file whose reply(sample, item) answers the model, as a tool does, and the conversation goes on; "
        "FILE:FUNCTION for another one",
        "one answer ends it",
    )
    turns: int = setting(8, "most turns of the model in a conversation with an environment", gt=1)
    updates: int = setting(
        1, "optimizer steps on the answers of one draw", "the ratio is then 1 and nothing is clipped", gt=0
    )
    one_step_off_policy: bool = setting(
        False,
        "draw the answers of the next draw while this one is trained on: from the adapter as it was one draw ago",
        "what was drawn from is then what is trained",
    )
    baseline: Literal["group", "others", "batch", "none"] | None = setting(
        None,
        "what a reward is compared with: the mean of its group, of the group's others, of the step, or nothing",
        "the loss's",
    )
    scale: Literal["group", "batch", "none"] | None = setting(
        None, "spread that it is divided by", "the loss's; none has no bias towards easy and hard prompts"
    )
    ratio: Literal["token", "sequence"] | None = setting(None, "what is clipped: each token, or answers", "the loss's")
    clip_low: float | None = setting(None, "how far below 1 the ratio counts", "the loss's", gt=0, le=1)
    clip_high: float | None = setting(None, "how far above 1 the ratio counts", "the loss's", gt=0)
    length: Literal["answer", "batch", "limit", "none"] | None = setting(
        None, "what an answer's tokens are divided by: its own, the step's mean, `max_tokens`, or nothing", "the loss's"
    )
    kl: float = setting(0.0, "cost of moving away from the reference", "none, as TRL and most runs since DAPO", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = setting(
        "k3", "how it is measured; k1 lowers the reward of whole answers, the others add to the loss", "GRPO's"
    )
    importance_cap: float = setting(
        2.0, "largest weight of a token that was not drawn from the model's own distribution", gt=0
    )
    mask_cut: bool = setting(False, "leave answers cut at `max_tokens` out of the loss (DAPO's overlong filtering)")
    exact: bool = setting(
        True,
        "the trainer's forward has the sampler's values, to the bit; false: each its own kernels, and a gap",
        "what was drawn from is what is trained",
    )
    gap: float = setting(
        0.05, "largest mean difference of the sampler's and the trainer's log-probabilities, in nats", gt=0
    )

    def settled(self) -> ReinforcementSection:
        """The same settings with what was left open as `loss` has it."""
        if self.loss is None:
            return self
        known = dict(zip(_OPEN, _LOSSES[self.loss], strict=True))
        return self.model_copy(update={key: value for key, value in known.items() if getattr(self, key) is None})

    @property
    def grammar_text(self) -> tuple[str, str] | None:
        """Kind and text of the grammar."""
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
"""The formats of rows that answers are drawn to."""
