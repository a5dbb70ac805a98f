"""The rewards page lists every reward, and its examples are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest
import yaml

from veneer.train.config.rewards import REWARD_KINDS, RewardList
from veneer.train.rewards.graders import parse_grader
from veneer.train.rewards.limited import LimitedFunction

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "rewards.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if text.startswith("rewards:")]


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_valid_configuration(text: str) -> None:
    sections = pydantic.TypeAdapter(RewardList).validate_python(yaml.safe_load(text)["rewards"])
    for section in sections:
        if section.kind == "grader":
            parse_grader(section.grader)  # type: ignore[attr-defined]


def test_example_function_runs_unchanged() -> None:
    (score,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with LimitedFunction("score", source=score) as function:
        (actual,) = function.score([({"output_text": "well\n4"}, {"answer": "4"})])
    assert actual.value == 1


@pytest.mark.parametrize("kind", REWARD_KINDS)
def test_every_reward_kind_and_key_is_documented(kind: str) -> None:
    part = re.search(rf"^## {kind}$(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    for key in REWARD_KINDS[kind].model_fields.keys() - {"kind", "name", "weight"}:
        assert re.search(rf"`{key}[`:]", part[1]), f"{kind}.{key}"
