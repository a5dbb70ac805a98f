"""Reinforcement on a tiny base: rewards rise, sampler and trainer agree, and runs resume and save like
supervised runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.text.drawn_runs import REWARDED, config_of, measured, run_drawn, stopped_and_resumed, with_prompts
from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.models.text.base import TextBase
from veneer.serve.engine.live import live_sampler
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.events import Checked, Event, Note
from veneer.train.report.log import read_log
from veneer.train.text.reinforce import sampling_warnings
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text
from veneer.train.text.together import run_texts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_prompts(tmp_path_factory.mktemp("reinforce"), lambda i: {"team": "it" if i % 2 else "hr"})


def config(shared: Path, output: Path, **sections: Any) -> Any:
    return config_of(REWARDED, shared, output, **sections)


def train(
    shared: Path, output: Path, base: TextBase, on_event: Any = None, resume: bool = False, **own: Any
) -> RunResult:
    return run_drawn(config(shared, output, **own), base, on_event, resume)


def test_rewards_rise_and_sampler_matches_trainer(shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(shared, tmp_path, base, events.append, schedule={"steps": 20}, evaluation={"keep": "last"})
    metrics = measured(tmp_path)
    assert [x["gap_max"] for x in metrics] == [0.0] * 20
    assert sum(x["reward"] for x in metrics[-6:]) > sum(x["reward"] for x in metrics[:6])
    for x in metrics:
        assert x["reward"] == pytest.approx(x["reward_regex"] + 0.5 * x["reward_team"])
        assert 0 <= x["constant_groups"] <= x["groups"] == 2
        assert x["cut_answers"] <= 12
    assert {"reward", "reward_team", "cut_share"} <= result.measured.keys() & result.measured_before.keys()
    page = Path(result.report).read_text()
    titles = [
        "Reward: team",
        "Sampler-trainer mismatch",
        "Tokens per answer",
        "cut at the token limit",
        "equal rewards",
    ]
    for title in titles:
        assert title in page
    (checked,) = [e for e in events if isinstance(e, Checked)]
    assert "10 prompts; a step samples 2 of them, 6 completions for each, at most 8 tokens each" in checked.text


def test_too_few_prompts_for_a_step_give_a_warning(shared: Path, base: TextBase, tmp_path: Path) -> None:
    def checked(prompts: int, rows: int) -> str:
        own = config(shared, tmp_path, data={"limit": prompts + 2}, batching={"rows": rows})
        events: list[Event] = []
        run_text(own, base=base, dry_run=True, on_event=events.append, sampler=live_sampler)
        return next(event.text for event in events if isinstance(event, Checked))

    assert "only 1 prompt to train on" in checked(1, 8)
    assert "only 9 prompts to train on" in checked(9, 10)
    assert "only 2 prompts to train on" in checked(2, 1)
    assert "to train on" not in checked(9, 8)


LOSSES = [
    {"loss": "dr-grpo"}, {"loss": "gspo", "updates": 2}, {"loss": "rloo", "kl": 0.1},
    {"loss": "dapo", "kl": 0.1, "mask_cut": False, "temperature": 0.8}, {"loss": "reinforce", "exact": False},
]  # fmt: skip


@pytest.mark.parametrize("own", LOSSES, ids=lambda own: own["loss"])
def test_every_loss_runs_and_reports(shared: Path, base: TextBase, tmp_path: Path, own: dict[str, Any]) -> None:
    train(shared, tmp_path, base, reinforcement=own, schedule={"steps": 2}, evaluation={"keep": "last"})
    first, second = measured(tmp_path)
    assert first["gap_max"] < (1e-4 if own.get("exact") is False else 1e-12)
    assert ("gap_max" in second) == (own.get("updates", 1) == 1)
    if own.get("kl"):
        assert first["kl"] == 0.0  # a new adapter equals the base bit for bit, because both use the same kernels
        assert second["kl"] > 0.0
    assert ("weight" in first) == ("temperature" in own)


@pytest.mark.parametrize("own", [{"updates": 1}, {"updates": 2}], ids=str)
def test_a_stopped_run_resumes_exactly(shared: Path, base: TextBase, tmp_path: Path, own: dict[str, Any]) -> None:
    def run(output: Path, on_event: Any, resume: bool) -> None:
        train(shared, output, base, on_event, resume, reinforcement=own, evaluation={"keep": "last"})

    stopped_and_resumed(run, tmp_path, at=3)


def test_run_without_a_training_signal_warns(shared: Path, base: TextBase, tmp_path: Path) -> None:
    same = {"rewards": [{"kind": "regex", "pattern": "never said$", "weight": 0.1}], "updates": 2}
    events: list[Event] = []
    train(shared, tmp_path, base, events.append, reinforcement=same, schedule={"steps": 6})
    assert [x["idle"] for x in measured(tmp_path)] == [1.0] * 6
    assert [x["drawn_tokens"] > 0 for x in measured(tmp_path)] == [True, False] * 3  # every second step reuses samples
    warnings = [e.text for e in events if isinstance(e, Note) and "adapter.start" in e.text]
    (warning,) = warnings
    assert "rewards of step 1: " in warning


def test_stale_samplers_stop(shared: Path, base: TextBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "digest", lambda self, values=None: "sha256:one and the same")
    with pytest.raises(TrainingError, match="sampler and trainer disagree") as caught:
        train(shared, tmp_path, base, reinforcement={"gap": 1e-4})
    assert "reinforcement.gap" in str(caught.value.where)
    assert len(measured(tmp_path)) == 1


def test_contradictory_settings_are_refused(shared: Path, base: TextBase, tmp_path: Path) -> None:
    for own, message in (
        ({"reinforcement": {"rewards": []}}, "is empty"),
        ({"reinforcement": {"group": 1}}, "no other completion to compare"),
        ({"reinforcement": {"loss": None}}, "needs `reinforcement.loss`"),
        ({"adapter": {"rank": 4, "dropout": 0.1}}, "dropout"),
        ({"preference": {"loss": "dpo"}}, "keep one"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(shared, tmp_path, **own)
    with pytest.raises(ConfigError, match="needs a sampler"):
        run_text(config(shared, tmp_path), base=base, on_event=lambda event: None)
    with pytest.raises(ConfigError, match="cannot be trained in one pass"):
        run_texts([config(shared, tmp_path / "a"), config(shared, tmp_path / "b")], base=base)
    with pytest.raises(DataError, match="leave no space for a completion"):
        train(shared, tmp_path, base, reinforcement={"max_tokens": 400}, data={"max_length": 420})


GRADERS = """
import time

def raises(sample, item):
    return 1.0 / (item["where"].split(":")[-1] not in BAD)

def late(sample, item):
    time.sleep(9 if item["where"].split(":")[-1] in BAD else 0)
    return 1.0

def none(sample, item):
    return float("nan") if item["where"].split(":")[-1] in BAD else 1.0
"""


@pytest.mark.parametrize(
    ("function", "why"), [("raises", "ZeroDivisionError"), ("late", "longer than 0.3 s"), ("none", "nan")]
)
def test_failing_graders_are_counted(shared: Path, base: TextBase, tmp_path: Path, function: str, why: str) -> None:
    """The run has twelve prompts with two completions each. If the grader fails for one prompt, its completions
    are skipped and reported; if it fails for two prompts, the run stops."""
    graders = tmp_path / "graders.py"
    reward = {"kind": "python", "file": str(graders), "function": function, "timeout": 0.3}
    own = {"reinforcement": {"group": 2, "rewards": [reward]}, "batching": {"rows": 12}, "schedule": {"steps": 1}}
    own |= {"data": {"split": 0}, "evaluation": {"keep": "last"}}
    graders.write_text(f"BAD = ('3',)\n{GRADERS}")
    train(shared, tmp_path / "one", base, **own)
    (metrics,) = measured(tmp_path / "one")
    assert metrics["reward_failed"] == 2
    (note,) = [r["text"] for r in read_log(tmp_path / "one" / "log.jsonl") if "step 1, left out" in r.get("text", "")]
    assert "prompts.jsonl:3): python: " in note
    assert why in note
    graders.write_text(f"BAD = ('3', '5')\n{GRADERS}")
    with pytest.raises(TrainingError, match="4 of 24 answers could not be judged") as caught:
        train(shared, tmp_path / "two", base, **own)
    assert "prompts.jsonl:3" in str(caught.value)
    assert "prompts.jsonl:5" in str(caught.value)
    assert why in str(caught.value)
    assert "reinforcement.most_failed" in str(caught.value)


def test_prompts_over_the_context_are_refused_or_left_out(shared: Path, base: TextBase, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (shared / "prompts.jsonl").read_text().splitlines()
    rows.write_text("\n".join([lines[0], json.dumps({"prompt": "word " * base.context, "team": "it"}), *lines[1:]]))
    own = {"data": {"train": str(rows), "split": 0, "max_length": 1 << 16}, "schedule": {"steps": 1}}
    with pytest.raises(DataError, match=rf"1 of 13 rows .* in {base.context} tokens(.|\n)*rows.jsonl:2"):
        train(shared, tmp_path / "no", base, **own)
    events: list[Event] = []
    own["data"]["long_rows"] = "drop"
    train(shared, tmp_path / "yes", base, events.append, **own)
    (checked,) = [event for event in events if isinstance(event, Checked)]
    (finding,) = [f for f in checked.data["findings"] if f["check"] == "long rows"]
    assert "rows.jsonl:2" in finding["text"]
    assert f"in {base.context} tokens" in finding["text"]
    assert "max_length" not in finding["fix"]


def test_unjudged_held_out_completions_stop_the_run(shared: Path, base: TextBase, tmp_path: Path) -> None:
    """If the only held-out completion always fails, there is no score by which to select an adapter."""
    (tmp_path / "broken.py").write_text("def score(sample, item):\n    return 1 / 0\n")
    reward = {"kind": "python", "file": str(tmp_path / "broken.py")}
    with pytest.raises(
        TrainingError, match=r"none of the 1 answer of held-out prompts(.|\n)*ZeroDivisionError"
    ) as error:
        train(shared, tmp_path / "out", base, reinforcement={"rewards": [reward]}, data={"split": 1})
    assert "prompts.jsonl:" in str(error.value)


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_idle_and_truncated_steps_give_warnings() -> None:
    section = ReinforcementSection(loss="grpo").with_defaults()
    assert sampling_warnings(section, 1, {"idle": 0.0, "cut_share": 0.25}) == {}
    assert sampling_warnings(section, 1, {"idle": 1.0, "cut_share": 0.75}).keys() == {"idle", "cut"}
