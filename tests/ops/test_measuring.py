"""What was measured is kept, agreed on by all processes, and worth nothing where it is damaged or another machine's."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.measuring import CLEARLY, Kept, Measured, fastest, seconds_of, this_machine

FOUND = Measured("tiles", {"tiles": 1.5, "torch": 4.0})


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=5), st.sampled_from([CLEARLY, 1.3]))
def test_the_first_is_left_only_for_what_is_clearly_faster(seconds: list[float], clearly: float) -> None:
    table = {f"{i}": s for i, s in enumerate(seconds)}
    name = fastest(table, clearly)
    if name != "0":
        assert table[name] == min(seconds)
        assert table[name] * clearly < seconds[0]
    else:
        assert min(seconds) * clearly >= seconds[0]


def test_what_fails_is_left_out_and_the_others_are_measured() -> None:
    def fails() -> None:
        raise RuntimeError("no such product here")

    calls: list[int] = []
    found = seconds_of({"bad": fails, "good": lambda: calls.append(1)})
    assert set(found) == {"good"}
    assert found["good"] >= 0
    assert len(calls) >= 3


def test_measuring_meets_no_mode_of_the_caller() -> None:
    """Gradients are made inside of no_grad and of inference_mode, and torch's generator does not move."""
    state = torch.get_rng_state()

    def work() -> None:
        x = torch.ones(2, requires_grad=True)
        assert x.square().sum().requires_grad

    with torch.inference_mode():
        assert set(seconds_of({"one": work})) == {"one"}
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_for_the_next_process_and_the_first_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    one, two = Kept(file, "here"), Kept(file, "here")
    assert one.put("a", FOUND) == FOUND
    assert two.put("a", Measured("torch", {"torch": 1.0, "tiles": 9.0})) == FOUND  # another process was first
    two.put("b", Measured("torch", {"torch": 1.0}))
    assert {k: Kept(file, "here").get(k) is not None for k in "abc"} == {"a": True, "b": True, "c": False}
    assert file.stat().st_mode & 0o777 == 0o600
    assert FOUND.line() == "tiles 1.5 ms (torch 4)"
    assert Measured("blocks", FOUND.ms).line() == "blocks (tiles 1.5, torch 4)"
    assert Measured("torch", {}).line() == "torch"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "[" * 200_000,
        '{"machine": "here"}',
        '{"machine": "here", "measured": {"a": 3}}',
        '{"machine": "here", "measured": {"a": {"runs": "x", "ms": {"x": "fast"}}}}',
        '{"machine": "here", "measured": {"a": {"runs": "x", "ms": {}}}}',
        json.dumps({"machine": "elsewhere", "measured": {"a": {"runs": "x", "ms": {"x": 1.0}}}}),
    ],
)
def test_a_damaged_file_or_another_machines_is_none_and_is_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(content)
    kept = Kept(file, "here")
    assert kept.get("a") is None
    kept.put("a", FOUND)
    assert Kept(file, "here").get("a") == FOUND


def test_a_record_of_what_is_no_longer_there_gives_way(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "measured.json", "here")
    kept.put("a", Measured("gone", {"gone": 0.1, "torch": 1.0}))
    assert kept.put("a", FOUND) == FOUND
    assert Kept(kept.file, "here").get("a") == FOUND


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "measured.json")
    assert Kept(tmp_path / "measured.json", "here").get("a") is None


def test_one_process_at_a_time_and_the_next_knows_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    one, two = Kept(file, "here"), Kept(file, "here")
    seen: list[Measured | None] = []
    began = threading.Event()

    def second() -> None:
        began.set()
        with two.alone():
            seen.append(two.get("a"))

    thread = threading.Thread(target=second)
    with one.alone():
        thread.start()
        began.wait()
        assert not seen
        one.put("a", FOUND)
    thread.join()
    assert seen == [FOUND]


def test_where_no_lock_can_be_made_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    for kept in (Kept(None, "here"), Kept(tmp_path / "a file" / "measured.json", "here")):
        with kept.alone():
            kept.put("a", FOUND)
        assert kept.get("a") == FOUND


def test_without_a_place_it_is_kept_in_memory(tmp_path: Path) -> None:
    nowhere = Kept(None, "here")
    nowhere.put("a", FOUND)
    assert nowhere.get("a") == FOUND
    lost = Kept(tmp_path / "there is none" / "measured.json", "here")
    assert lost.put("a", FOUND) == FOUND


def test_this_machine_has_a_name() -> None:
    assert "processors" in this_machine()
