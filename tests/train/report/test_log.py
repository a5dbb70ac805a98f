"""Reports of a run: the log, the terminal output, and the HTML page."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from veneer.train.checkpoint import Progress
from veneer.train.events import Checked, Evaluated, Event, Note, Probed, Resolved, Saved, Stepped, Stopped
from veneer.train.report.log import ConsoleView, JsonLog, duration, read_log, size
from veneer.train.report.page import Page, Series, chart, nice_ticks, render_page, smooth


def step(n: int, loss: float = 1.0) -> Stepped:
    return Stepped(n, 10, n / 10, loss, 1e-4, 0.5, 100, 40, 0.5, 2_000_000_000)


def score(n: int, best: bool = True) -> Evaluated:
    return Evaluated(n, 0.5, math.exp(0.5), 8, 80, 0.1, best)


def test_every_event_is_one_line_of_json(tmp_path: Path) -> None:
    events: list[Event] = [
        Resolved({"a.b": 1}, {"a.b": "default"}),
        Checked("ok", {"ok": True}),
        Note("hi"),
        Probed(9, ("f:1",), 0.1, 5),
        step(1),
        score(1),
        Saved(1, "x"),
        Stopped(1, "finished"),
    ]
    log = JsonLog(tmp_path / "deep" / "log.jsonl")
    for event in events:
        log(event)
    log.close()
    records = [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()]
    names = ["resolved", "checked", "note", "probed", "stepped", "evaluated", "saved", "stopped"]
    assert [r["event"] for r in records] == names
    assert records[4]["tokens_per_second"] == 200.0


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    for event in (step(1), step(2), score(2), step(3), Stopped(2, "interrupted")):
        log(event)
    log.close()
    with path.open("a") as file:
        file.write('{"event": "stepped", "st')
    log = JsonLog(path, Progress(step=2, evaluated=-1))  # the checkpoint was saved before the evaluation at step 2
    log(score(2))
    log(step(3))
    log.close()
    found = [(r["event"], r["step"]) for r in read_log(path)]
    assert found == [("stepped", 1), ("stepped", 2), ("stopped", 2), ("evaluated", 2), ("stepped", 3)]


def _shown(events: list[Event], *, terminal: bool, verbose: bool = False) -> str:
    out = io.StringIO()
    view = ConsoleView(Console(file=out, force_terminal=terminal, width=100, highlight=False), verbose=verbose)
    for event in events:
        view(event)
    view.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_loss_speed_and_memory(terminal: bool) -> None:
    text = _shown([step(n, 3.25) for n in range(1, 6)], terminal=terminal)
    for said in ("3.2500", "200 tokens/s", "2.0 GB", "2 s left"):
        assert said in text


def test_sampling_runs_show_speed_and_constant_groups() -> None:
    def drawn(n: int, tokens: float, constant: float) -> Stepped:
        found = {
            "answer_tokens": 8.0,
            "drawn_tokens": tokens,
            "reward": 0.25,
            "groups": 4.0,
            "constant_groups": constant,
            "cut_share": constant / 8,
            "reward_label": 0.5,
            "reward_length": -0.25,
            "reward_failed": 0.0,
        }
        return Stepped(n, 2, n, -1e-9, 1e-4, 0.5, 10_000, 40, 2.0, 1, found)

    first, second = _shown([drawn(1, 400, 3), drawn(2, 0, 0)], terminal=False).splitlines()  # two updates per rollout
    rewards = "reward 0.250 (label 0.500, length -0.250)"
    assert f"1/2  {rewards}  200 sampled tokens/s" in first
    assert first.endswith("3 of 4 groups constant  38% cut")
    assert f"2/2  {rewards}  100 sampled tokens/s" in second
    # a terminal shows rollouts on a second line, because the progress bar fills the first
    *_, bar, below = _shown([drawn(1, 400, 3)], terminal=True).splitlines()
    assert re.search(r"1/2 reward 0\.250 200 sampled tokens/s 1 B 2 s left", bar)
    assert below.strip() == "label 0.500, length -0.250  3 of 4 groups constant  38% cut"
    held = Evaluated(1, -0.8, None, 8, 80, 0.1, True, extra={"reward": 0.8, "reward_label": 0.8, "reward_failed": 0.0})
    (told,) = _shown([held], terminal=False).splitlines()
    assert told == "step 1: validation reward 0.800 on 8 rows  (best so far)"
    (told,) = _shown([Evaluated(1, -0.0, None, 8, 80, 0.1, True)], terminal=False).splitlines()
    assert "validation loss 0.0000 on" in told


def test_the_terminal_shows_settings_sources_and_checks() -> None:
    settings = Resolved(
        {"adapter.rank": 16, "optimizer.learning_rate": 5e-4},
        {"adapter.rank": "default (enough [for thousands] of rows)", "optimizer.learning_rate": "support.yaml:9"},
    )
    long = "one line " * 30
    checked = Checked("  ok  all ⟦good⟧", {})
    few = _shown([settings, checked, Note(long)], terminal=False)
    assert "adapter.rank" not in few
    assert "1 more with default values" in few
    assert re.search(r"learning_rate +0\.0005 +support\.yaml:9", few)
    text = _shown([settings, checked, Note(long)], terminal=False, verbose=True)
    assert re.search(r"adapter\.rank +16 +default \(enough \[for thousands\] of rows\)", text)
    assert re.search(r"learning_rate +0\.0005 +support\.yaml:9", text)
    assert "ok  all ⟦good⟧" in text
    assert "ok  all ⟦good⟧" in _shown([checked], terminal=True)
    assert long.strip() in text, "long lines reach a pipe whole"


def test_a_worse_evaluation_is_never_called_best() -> None:
    worse = Evaluated(step=4, loss=20.4, perplexity=None, rows=8, learned_tokens=9, seconds=0.1, best=False, worse=True)
    text = _shown([worse], terminal=False)
    assert "worse than before training" in text
    assert "best" not in text


def test_many_steps_print_few_lines_to_a_pipe() -> None:
    events: list[Event] = [Stepped(n, 1000, 1, 1.0, 1e-4, 0.5, 9, 4, 0.1, 1) for n in range(1, 1001)]
    assert 10 <= len(_shown(events, terminal=False).splitlines()) <= 30


def test_sizes_and_durations_are_human_readable() -> None:
    assert [size(n) for n in (12, 2_500, 19_600_000, 3.4e9)] == ["12 B", "2.5 kB", "19.6 MB", "3.4 GB"]
    assert [duration(s) for s in (41.6, 185, 7_800)] == ["42 s", "3 min 05 s", "2 h 10 min"]


# --- the page ---------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Checks that tags are closed; collects everything that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br", "line", "circle", "path"}:
            self.open.append(tag)
        self.outside += [f"{k}={v}" for k, v in attrs if k in {"src", "href", "srcset", "onload", "onclick"}]

    def handle_endtag(self, tag: str) -> None:
        if tag in {"circle", "line", "path"}:
            return
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def _page(**options: Any) -> Page:
    from veneer.train.events import to_record

    records = [to_record(e) for e in [Note("a note"), score(0, False), *(step(n, 3 / n) for n in range(1, 11))]]
    records += [to_record(score(10))]
    return Page(title="support", records=records, **options)


def test_page_is_well_formed_and_loads_nothing_external(tmp_path: Path) -> None:
    page = _page(
        settings={"adapter.rank": 16, "seed": 0},
        sources={"adapter.rank": "override `adapter.rank=16`"},
        checks={
            "findings": [{"level": "warn", "text": "cut rows", "fix": "a longer max_length"}],
            "sample": [{"text": "hi", "learned": True}],
        },
        details=[("base", "tiny")],
        usage=[("CLI", "veneer generate")],
        cards=[("Loss", "0.5", "")],
    )
    text = render_page(page)
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.outside == []
    assert not {"script", "link", "iframe", "img"} & set(reader.tags)
    assert "color-scheme: light dark" in text
    assert "url(" not in text
    for piece in ("override `adapter.rank=16`", "cut rows", "<mark>hi</mark>", "veneer generate", "a note"):
        assert piece in text
    assert text.count("<svg") == 5


def test_data_in_the_report_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = _page(
        checks={"findings": [{"level": "ok", "text": evil, "fix": evil}], "sample": [{"text": evil, "learned": False}]},
        settings={"data.train": evil},
        sources={"data.train": evil},
        details=[(evil, evil)],
        usage=[(evil, evil)],
        cards=[(evil, evil, evil)],
        subtitle=evil,
    )
    page.title = evil
    assert "<script" not in render_page(page)


def test_a_report_without_steps_renders() -> None:
    assert "<svg" not in render_page(Page(title="empty"))


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(0, 1e6), about=st.integers(2, 10))
def test_few_ticks_cover_the_range(low: float, span: float, about: int) -> None:
    ticks = nice_ticks(low, low + span, about)
    slack = 1e-6 * (abs(low) + span) + 1e-9  # tolerate rounding of a tick at the edge
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= about + 3
    assert ticks == sorted(ticks)


def test_a_chart_draws_every_point_inside_its_frame() -> None:
    svg = chart([Series("a", [(0.0, 1.0), (5.0, 9.0), (10.0, -3.0)], "dots")], marked=(10.0, -3.0))
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= 900
        assert 0 <= float(y) <= 300
    assert chart([]) == ""


def test_smoothing_is_token_weighted() -> None:
    points = [(float(i), float(i % 2)) for i in range(100)]
    weights = [3.0 if i % 2 else 1.0 for i in range(100)]
    assert smooth(points, weights)[-1][1] == pytest.approx(0.75)
