"""A user's function in its own process: results, limits, and isolation from other functions."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from veneer.errors import ConfigError, TrainingError
from veneer.train.config.rewards import PythonReward
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.limited import LimitedFunction
from veneer.train.rewards.reward import Answer

SOURCE = """
import os, random, sys, time

print("loaded")
seen = []

def score(sample, item):
    print("noise")
    sys.stderr.write("noise")
    os.write(1, b"noise")
    said = sample["output_text"]
    if said == "raise":
        raise ValueError("no such thing")
    if said == "sleep":
        time.sleep(60)
    if said == "loop":
        while True:
            pass
    if said == "end":
        os._exit(3)
    if said == "memory":
        return len(bytearray(10**9))
    if said == "draw":
        return random.random()
    if said == "nan":
        return float("nan")
    if said == "mapping":
        return {"score": 1}
    if said == "fork":
        os.fork()
        return 7
    if said == "huge":
        return 10**400
    if said == "nothing":
        return None
    if said == "text":
        return "1"
    if said == "who":
        return os.getpid()
    return len(said) + item.get("more", 0)
"""


def asked(*texts: str) -> list[tuple[dict[str, str], dict[str, int]]]:
    return [({"output_text": text}, {}) for text in texts]


@pytest.fixture(scope="module")
def function() -> object:
    with LimitedFunction("score", source=SOURCE, timeout=1, memory=5e8) as made:
        yield made


def test_scores_are_the_functions_numbers(function: LimitedFunction) -> None:
    scores = function.score([*asked("four"), ({"output_text": ""}, {"more": 2})])
    assert [s.value for s in scores] == [4, 2]


FAILURES = [
    ("raise", "line 13 of source: ValueError: no such thing"),
    ("nothing", "returned None, not a number"), ("text", "returned '1', not a number"),
    ("mapping", "{'score': 1}, not a number"),
    ("end", "ended, with code 3"), ("memory", "MemoryError"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error"), FAILURES)
def test_failure_has_a_reason_and_the_next_call_works(function: LimitedFunction, text: str, error: str) -> None:
    broken, fine = function.score(asked(text, "ok"))
    assert broken.value is None
    assert error in broken.error
    assert fine.value == 2


def test_timeout_kills_the_process(function: LimitedFunction) -> None:
    (before,) = function.score(asked("who"))
    began = time.monotonic()
    loop, after = function.score(asked("loop", "who"))
    assert "took longer than 1 s" in loop.error
    assert time.monotonic() - began < 10
    assert before.value != after.value
    with pytest.raises(ProcessLookupError):
        os.kill(int(before.value or 0), 0)


def test_forked_processes_cannot_return_a_result(function: LimitedFunction) -> None:
    """If a fork could answer, every later answer would be matched to the wrong question."""
    assert [s.value for s in function.score(asked("fork", "a", "fork", "abcd"))] == [7, 1, 7, 4]


def test_huge_integers_are_infinite(function: LimitedFunction) -> None:
    assert [s.value for s in function.score(asked("huge", "a"))] == [math.inf, 1]


def test_equal_inputs_get_equal_random_numbers(function: LimitedFunction) -> None:
    a, b = function.score(asked("draw", "draw"))
    (c,) = function.score([({"output_text": "draw"}, {"row": 2})])
    assert a == b
    assert a.value != c.value


def test_repeated_failures_skip_the_rest(function: LimitedFunction) -> None:
    scores = function.score(asked(*["raise"] * 50))
    assert sum("skipped" in s.error for s in scores) == 45
    assert function.score(asked("ok"))[0].value == 2


def test_several_answers_are_scored_in_order() -> None:
    with LimitedFunction("score", source=SOURCE, at_once=2) as made:
        assert [s.value for s in made.score(asked("a", "bb", "ccc", "dddd"))] == [1, 2, 3, 4]


UNLOADABLE_SOURCES = [
    ("def score(:", "SyntaxError"), ("x = 1", "no function 'score'"), ("import no_such_package", "no_such_package"),
    ("raise SystemExit(1)", "SystemExit"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "error"), UNLOADABLE_SOURCES)
def test_unloadable_source_is_a_config_error(source: str, error: str) -> None:
    with LimitedFunction("score", source=source) as made, pytest.raises(ConfigError, match=error):
        made.score(asked("x"))


def test_a_grader_file_can_be_a_reward(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n", encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom beside import FACTOR\n\n@dataclass\nclass Found:\n    n: int\n\n"
        "def grade(sample, item):\n    found = Found(len(sample['messages']))\n"
        "    return FACTOR * found.n + (sample['output_json']['x'] if item['wanted'] else 0)\n",
        encoding="utf-8",
    )
    section = PythonReward(kind="python", file=str(file), function="grade")
    answers = [Answer([{"role": "user", "content": "?"}], '{"x": 5}', {"wanted": w}) for w in (True, False)]
    with build_rewards([section]) as rewards:
        assert rewards.judge(answers).values == [7, 2]
        with pytest.raises(TrainingError, match=r"line 10 of mine\.py: KeyError: 'output_json'"):
            rewards.judge([Answer([], "no json", {"wanted": True})] * 3)
    with (
        pytest.raises(ConfigError, match="the file of the function score does not exist"),
        build_rewards([PythonReward(kind="python", file=str(tmp_path / "none.py"))]),
    ):
        pass
