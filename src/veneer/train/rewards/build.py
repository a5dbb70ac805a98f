"""The rewards of a configuration, built: every entry of `reinforcement.rewards` becomes a reward of its kind.

with rewards_of(config.reinforcement.rewards) as rewards: …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from veneer.train.config.rewards import RewardSection
from veneer.train.rewards import rules
from veneer.train.rewards.reward import NamedReward, Reward, Rewards

_RULES: dict[str, Callable[[Any], Reward]] = {
    "exact_match": rules.exact_match, "json_schema": rules.json_schema, "json_fields": rules.json_fields,
    "regex": rules.regular_expression, "length": rules.length, "bleu": rules.sentence_bleu, "rouge": rules.rouge_f1,
}  # fmt: skip


def rewards_of(sections: Sequence[RewardSection], *, most_failed: float = 0.1) -> Rewards:
    """Raises ConfigError for a schema that is none, MissingExtraError for a package that a kind needs."""
    made = [NamedReward(section.called, _RULES[section.kind](section), section.weight) for section in sections]
    return Rewards(made, most_failed=most_failed)
