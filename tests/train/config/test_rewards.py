"""The list of rewards in a configuration is parsed strictly and saved as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.train.config.load import config_from
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.config.rewards import resolve_reward_paths
from veneer.train.config.text import TrainConfig


def read(*entries: Any) -> ReinforcementSection:
    values = {"base": "b", "data": {"train": "t"}, "output": "o"}
    config, _ = config_from(values | {"reinforcement": {"loss": "grpo", "rewards": [*entries]}})
    assert isinstance(config, TrainConfig)
    return config.reinforcement


def test_rewards_round_trip_through_json() -> None:
    given: list[dict[str, Any]] = [
        {"kind": "exact_match", "column": "total", "weight": -1},
        {"kind": "json_schema", "json_schema": {"type": "object"}},
        {"kind": "judge", "prompt": "How good is {{ sample.output_text }}?", "range": [1, 5], "name": "taste"},
    ]
    section = read(*given)
    assert [r.called for r in section.rewards] == ["exact_match", "json_schema", "taste"]
    assert [r.weight for r in section.rewards] == [-1, 1, 1]
    assert section.model_dump(mode="json", exclude_unset=True)["rewards"] == given
    assert ReinforcementSection.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "exactmatch"}, "does not match any of the expected tags: 'exact_match', 'json_schema'"),
        ({"weight": 1}, "entry 1: Unable to extract tag using discriminator 'kind'"),
        ("exact_match", "entry 1: Input should be an object"),
        ({"kind": "exact_match", "colum": "a"}, "unknown key `colum`; did you mean `column`"),
        ({"kind": "regex"}, "`pattern` is required"),
        ({"kind": "regex", "pattern": "(a"}, "not a regular expression: missing )"),
        ({"kind": "regex", "pattern": "a", "column": "answer"}, "in parentheses"),
        ({"kind": "length"}, "give `least`, `most` or both"),
        ({"kind": "length", "least": 9, "most": 3}, "`most` is below `least`"),
        ({"kind": "length", "most": "3"}, "`most` should be a valid integer"),
        ({"kind": "json_schema"}, "one of `json_schema` and `column`"),
        ({"kind": "judge", "prompt": "x", "key": "KEY"}, "`key` belongs to a server: give its `url`"),
        ({"kind": "judge", "prompt": "x", "timeout": 5, "at_once": 2}, "`timeout`, `at_once` belong to a server"),
        ({"kind": "judge", "prompt": "x", "range": [1, 1]}, "must begin with the lower number"),
        ({"kind": "exact_match", "weight": 1e999}, "finite number"),
        ({"kind": "exact_match", "name": "two words"}, "pattern"),
    ],
)
def test_invalid_rewards_are_refused_with_a_correction(entry: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(entry)
    assert said in str(caught.value)


def test_two_rewards_of_one_kind_need_names() -> None:
    with pytest.raises(ConfigError, match="2 rewards are called 'exact_match'"):
        read({"kind": "exact_match"}, {"kind": "exact_match", "column": "other"})
    assert len(read({"kind": "exact_match"}, {"kind": "exact_match", "name": "other"}).rewards) == 2


def test_paths_are_relative_to_the_files_folder(tmp_path: Path) -> None:
    entries = [
        {"kind": "python", "file": "score.py"},
        {"kind": "python", "file": "/a/b.py"},
        {"kind": "exact_match"},
        3,
    ]
    own = {"kind": "python", "file": str(tmp_path / "score.py")}
    assert resolve_reward_paths(entries, tmp_path) == [own, *entries[1:]]
