"""Reinforcement on a tiny base: rewards rise, sampler and trainer have one number, and such a run keeps every promise
that a supervised one keeps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, DataError, Interrupted, TrainingError
from veneer.models.text.base import TextBase, load_text
from veneer.serve.engine.live import live_sampler
from veneer.train.config.load import config_from
from veneer.train.events import Checked, Event, Stepped
from veneer.train.report.log import read_log
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text
from veneer.train.text.together import run_texts

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reinforce")
    tiny_base_dir(folder)
    lines = [{"prompt": f"The printer number {i} does not answer.", "team": "it" if i % 2 else "hr"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def base(shared: Path) -> TextBase:
    return load_text(str(shared / "tiny-base"))


def config(shared: Path, output: Path, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "base": str(shared / "tiny-base"), "data": {"train": str(shared / "prompts.jsonl"), "split": 2},
        "output": str(output), "batching": {"rows": 2, "micro_rows": 6}, "optimizer": {"learning_rate": 1e-2},
        "schedule": {"steps": 6, "name": "constant"}, "adapter": {"rank": 4}, "evaluation": {"every": 3},
        "checkpoint": {"every": 2},
        "reinforcement": {
            "loss": "grpo", "group": 6, "max_tokens": 8,
            "rewards": [
                {"kind": "regex", "pattern": "e"},
                {"kind": "regex", "name": "team", "pattern": "(it|hr)", "column": "team", "weight": 0.5},
            ],
        },
    }  # fmt: skip
    for section, value in sections.items():
        values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return config_from(values)[0]


def train(
    shared: Path, output: Path, base: TextBase, on_event: Any = None, resume: bool = False, **own: Any
) -> RunResult:
    return run_text(
        config(shared, output, **own), base=base, resume=resume, on_event=on_event or (lambda event: None),
        sampler=live_sampler,
    )  # fmt: skip


def steps(folder: Path) -> list[dict[str, Any]]:
    return [r["extra"] for r in read_log(folder / "log.jsonl") if r["event"] == "stepped"]


def test_rewards_rise_without_a_gap_and_the_page_shows_them(shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(shared, tmp_path, base, events.append, schedule={"steps": 20}, evaluation={"keep": "last"})
    found = steps(tmp_path)
    assert [x["gap_max"] for x in found] == [0.0] * 20
    assert sum(x["reward"] for x in found[-6:]) > sum(x["reward"] for x in found[:6])
    for x in found:
        assert x["reward"] == pytest.approx(x["reward_regex"] + 0.5 * x["reward_team"])
        assert 0 <= x["constant_groups"] <= x["groups"] == 2
        assert x["cut_answers"] <= 12
    assert {"reward", "reward_team", "cut_share"} <= result.measured.keys() & result.measured_before.keys()
    page = Path(result.report).read_text()
    for title in (
        "Reward: team",
        "Sampler beside trainer",
        "Tokens of an answer",
        "cut at the limit",
        "worth the same",
    ):
        assert title in page
    (checked,) = [e for e in events if isinstance(e, Checked)]
    assert "10 prompts; a draw is 2 of them with 6 answers each, of 8 tokens at most" in checked.text


@pytest.mark.parametrize(
    "own",
    [
        {"loss": "dr-grpo"}, {"loss": "gspo", "updates": 2}, {"loss": "rloo", "kl": 0.1, "kl_estimator": "k1"},
        {"loss": "dapo", "kl": 0.1, "mask_cut": False, "temperature": 0.8}, {"loss": "reinforce", "exact": False},
    ],
    ids=lambda own: own["loss"],
)  # fmt: skip
def test_every_loss_runs_and_says_what_it_measured(
    shared: Path, base: TextBase, tmp_path: Path, own: dict[str, Any]
) -> None:
    train(shared, tmp_path, base, reinforcement=own, schedule={"steps": 2}, evaluation={"keep": "last"})
    first, second = steps(tmp_path)
    assert first["gap_max"] < (1e-4 if own.get("exact") is False else 1e-12)
    assert ("gap_max" in second) == (own.get("updates", 1) == 1)
    if own.get("kl") and own.get("kl_estimator") != "k1":
        assert first["kl"] == 0.0  # a fresh adapter is the base, by the same kernels
        assert second["kl"] > 0.0
    assert ("weight" in first) == ("temperature" in own)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_stopped_between_and_within_rollouts_ends_as_one_that_was_not(
    shared: Path, base: TextBase, tmp_path: Path, updates: int
) -> None:
    own = {"reinforcement": {"updates": updates}, "evaluation": {"keep": "last"}}
    train(shared, tmp_path / "whole", base, **own)

    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(shared, tmp_path / "parts", base, stop, **own)
    train(shared, tmp_path / "parts", base, resume=True, **own)
    assert (tmp_path / "parts" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()
    timed = {"drawn_seconds", "prompt_cached"}  # a new process's cache is empty
    ours, theirs = (
        [{k: v for k, v in x.items() if k not in timed} for x in steps(tmp_path / name)] for name in ("parts", "whole")
    )
    assert ours == theirs


def test_a_sampler_of_older_values_stops_the_run_before_its_optimizer_moves(
    shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "digest", lambda self, values=None: "sha256:one and the same")
    with pytest.raises(TrainingError, match="drawn from another model") as caught:
        train(shared, tmp_path, base, reinforcement={"gap": 1e-4})
    assert "reinforcement.gap" in str(caught.value.where)
    assert len(steps(tmp_path)) == 1


def test_what_cannot_be_meant_is_said(shared: Path, base: TextBase, tmp_path: Path) -> None:
    for own, said in (
        ({"reinforcement": {"rewards": []}}, "is empty"),
        ({"reinforcement": {"group": 1}}, "nothing to compare"),
        ({"reinforcement": {"loss": None}}, "without `reinforcement.loss`"),
        ({"adapter": {"rank": 4, "dropout": 0.1}}, "dropout"),
        ({"preference": {"loss": "dpo"}}, "keep one"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(shared, tmp_path, **own)
    with pytest.raises(ConfigError, match="nobody here draws"):
        run_text(config(shared, tmp_path), base=base, on_event=lambda event: None)
    with pytest.raises(ConfigError, match="cannot be trained in one pass"):
        run_texts([config(shared, tmp_path / "a"), config(shared, tmp_path / "b")], base=base)
    with pytest.raises(DataError, match="leave an answer no room"):
        train(shared, tmp_path, base, reinforcement={"max_tokens": 400}, data={"max_length": 420})
