"""Which implementation of an op runs is decided in one place, and can be asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops import choice
from veneer.ops.choice import HOMES, OPS, choices, chosen, own_choices
from veneer.ops.cpu import compiled
from veneer.ops.cpu.implementations import IMPLEMENTATIONS
from veneer.ops.measuring import Kept, Measured
from veneer.train.ahead import Ahead


def test_every_implementation_is_of_a_known_op_and_every_op_has_an_answer() -> None:
    assert set(IMPLEMENTATIONS) <= set(OPS)
    for device in (*HOMES, "cuda", "mps"):
        told = choices(device)
        assert set(told) == set(OPS)
        assert all(one.name and one.reason and one.line() for one in told.values())


def test_a_device_without_implementations_runs_the_reference() -> None:
    x = torch.empty(2, 16, dtype=torch.bfloat16, device="meta")
    assert all(chosen(op, x) is None for op in OPS)
    assert {one.line() for one in choices("meta").values()} == {"torch: meta has no implementation of its own"}


def test_what_the_kernels_do_not_take_runs_the_reference() -> None:
    x, w = torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    there = compiled.has("rms_norm")
    assert (chosen("rms_norm", x, w) is not None) == there
    assert chosen("rms_norm", x.float(), w.float()) is None
    assert chosen("rms_norm", x.t(), w) is None
    assert choices("cpu")["rms_norm"].name == ("compiled" if there else "torch")


def test_without_compiled_kernels_it_is_torch_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    told = choices("cpu")
    by_compiled = set(IMPLEMENTATIONS) - {"kept_product", "weight_order"}  # which oneDNN has a part in
    assert all(told[op].line().startswith("torch: no compiled kernels: ") for op in by_compiled)
    others = set(OPS) - set(IMPLEMENTATIONS)
    assert all(told[op].line() == "torch: cpu has no implementation of its own" for op in others)
    assert chosen("rms_norm", torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)) is None


def test_a_device_may_bring_its_own() -> None:
    own = choice.Implementation(lambda x: x, lambda x: x.ndim == 2, "matrices", lambda: "")
    with own_choices(implementations=lambda device: {"gelu_tanh": own} if device == "meta" else {}):
        assert chosen("gelu_tanh", torch.empty(2, 2, device="meta")) is own.run
        assert chosen("gelu_tanh", torch.empty(2, device="meta")) is None
        assert choices("meta")["gelu_tanh"] == ("compiled", "the first that takes what it is given", "matrices")
    assert chosen("gelu_tanh", torch.empty(2, 2, device="meta")) is None


def test_the_first_that_is_here_is_said() -> None:
    """Where the first cannot run at all, as tiles in bfloat16 without AVX512-BF16, another does."""
    second = choice.Implementation(lambda x: x, lambda x: True, "anything", lambda: "", "second")
    first = choice.Implementation(lambda x: x, lambda x: False, "nothing", lambda: "no first here", "first", (second,))
    with own_choices(implementations=lambda device: {"gelu_tanh": first}, pins={}):
        assert choices("cpu")["gelu_tanh"].name == "second"
        with choice.pinned(gelu_tanh="first"):
            assert choices("cpu")["gelu_tanh"][:2] == ("second", "pinned to first by VENEER_OPS, which is not here")
    gone = first._replace(others=(second._replace(missing=lambda: "no second here"),))
    with own_choices(implementations=lambda device: {"gelu_tanh": gone}, pins={}):
        assert choices("cpu")["gelu_tanh"] == ("torch", "no first here", "")


# -- measured ----------------------------------------------------------------------------------------------------------


def _candidate(name: str, *others: choice.Implementation) -> choice.Implementation:
    return choice.Implementation(lambda x: name, lambda x: x.ndim == 2, "matrices", lambda: "", name, others)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "measured.json", "here")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> Iterator[dict[str, float]]:
    """gelu_tanh with two implementations beside its reference, and what each takes, in seconds of a clock of ours."""
    taken = {"first": 1.0, "second": 1.0, "torch": 1.0}
    table = {"gelu_tanh": _candidate("first", _candidate("second"))}

    def seconds_of(works: dict[str, Callable[[], object]]) -> dict[str, float]:
        thread = threading.Thread(target=lambda: [work() for work in works.values()])  # what a trial is about is of one
        thread.start()
        thread.join()
        return {name: taken[name] for name in works}

    def work(dtype: torch.dtype, n: int) -> Callable[[], object]:
        return lambda: ran.append(chosen("gelu_tanh", torch.empty(n, 2, dtype=dtype)))

    ran: list[Any] = []
    trials = {"gelu_tanh": choice.Trial(lambda x: (choice.size_class(len(x)),), work)}
    monkeypatch.setattr(choice, "seconds_of", seconds_of)
    with own_choices(implementations=lambda device: table, trials=trials, kept=lambda: kept, pins={}, listed=False):
        yield taken


def name_of(x: Tensor) -> str:
    run = chosen("gelu_tanh", x)
    return "torch" if run is None else str(run(x))


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [((1.0, 1.0, 1.0), "first"), ((1.0, 0.95, 0.92), "first"), ((1.0, 0.5, 2.0), "second"), ((1.0, 0.9, 0.5), "torch")],
)
def test_the_first_runs_unless_another_is_clearly_faster(
    bench: dict[str, float], seconds: tuple[float, ...], runs: str
) -> None:
    bench.update(zip(bench, seconds, strict=True))
    assert name_of(torch.empty(40, 2)) == runs
    (found,) = choice.settled().values()
    assert found.runs == runs
    assert found.ms == {name: pytest.approx(1e3 * s) for name, s in bench.items()}


def test_what_was_measured_once_stays_and_classes_are_measured_apart(bench: dict[str, float]) -> None:
    assert name_of(torch.empty(40, 2)) == "first"
    bench["torch"] = 0.1
    assert name_of(torch.empty(50, 2)) == "first"  # of the same class
    assert name_of(torch.empty(400, 2)) == "torch"
    assert name_of(torch.empty(40, 2, dtype=torch.bfloat16)) == "torch"
    bench["torch"] = 10.0
    with own_choices():  # as a later process
        assert name_of(torch.empty(400, 2)) == "torch"
        assert name_of(torch.empty(40)) == "torch"  # nothing takes it


def test_a_run_goes_on_with_what_it_recorded(bench: dict[str, float]) -> None:
    assert name_of(torch.empty(40, 2)) == "first"
    record = choice.recorded()
    assert list(record.values()) == ["first"]
    choice.follow(dict.fromkeys(record, "second"))
    assert name_of(torch.empty(40, 2)) == "second"
    assert list(choice.recorded().values()) == ["second"]


def test_what_is_followed_stays_recorded_though_it_does_not_come_again(bench: dict[str, float]) -> None:
    name_of(torch.empty(40, 2))
    name_of(torch.empty(400, 2))
    record = dict.fromkeys(choice.recorded(), "second")
    assert len(record) == 2
    choice.follow(record)
    assert name_of(torch.empty(40, 2)) == "second"
    assert choice.recorded() == record
    assert name_of(torch.empty(4000, 2)) == "first"
    assert choice.recorded().items() > record.items()


def test_once_a_record_is_followed_nothing_more_is_measured(bench: dict[str, float]) -> None:
    """Else a shape that comes late in a run would be decided by whichever process met it first."""
    bench["second"] = 0.1
    name_of(torch.empty(40, 2))
    with own_choices():
        assert list(choice.known().values()) == ["second"]  # measured by another run
        choice.follow(choice.known())
        assert name_of(torch.empty(400, 2)) == "first"
        assert name_of(torch.empty(40, 2)) == "second"
    assert name_of(torch.empty(400, 2)) == "second"


def test_listed_follows_nothing_that_was_measured_before(bench: dict[str, float]) -> None:
    bench["second"] = 0.1
    assert name_of(torch.empty(40, 2)) == "second"
    with own_choices(listed=True), own_choices():  # another process, and a run in it
        choice.follow(choice.known())
        assert name_of(torch.empty(40, 2)) == "first"


def test_what_is_settled_is_what_ran_in_this_run(bench: dict[str, float]) -> None:
    name_of(torch.empty(40, 2))
    name_of(torch.empty(400, 2))
    (key, *_) = before = choice.recorded()
    with own_choices():
        assert not choice.settled()
        choice.follow({key: "second"})
        assert name_of(torch.empty(40, 2)) == "second"
        (found,) = choice.settled().values()
        assert found.runs == "second"
        assert found.ms == {name: pytest.approx(1e3) for name in bench}
    assert {key: found.runs for key, found in choice.settled().items()} == choice.recorded() == before


def test_what_another_process_has_measured_meanwhile_is_taken(bench: dict[str, float], kept: Kept) -> None:
    """Its record is there once the lock is ours: nothing is measured again."""
    name_of(torch.empty(40, 2))
    (key,) = choice.recorded()
    assert kept.file is not None
    kept.file.unlink()
    ours, theirs = Kept(kept.file, "here"), Kept(kept.file, "here")
    theirs.put(key, Measured("second", {"second": 0.5, "first": 1.0}))
    with own_choices(kept=lambda: ours):
        assert ours.get(key) is None
        assert name_of(torch.empty(40, 2)) == "second"


def test_pins_come_before_everything(bench: dict[str, float]) -> None:
    bench["torch"] = 0.1
    with choice.pinned(gelu_tanh="second"):
        assert name_of(torch.empty(40, 2)) == "second"
        assert choices("cpu")["gelu_tanh"] == ("second", "pinned by VENEER_OPS", "matrices")
    assert not choice.recorded()
    assert name_of(torch.empty(40, 2)) == "torch"


@pytest.mark.parametrize("name", ["secnd", ""])
def test_a_name_that_no_implementation_has_is_refused(bench: dict[str, float], name: str) -> None:
    with choice.pinned(gelu_tanh=name):
        for ask in (lambda: name_of(torch.empty(40, 2)), lambda: choices("cpu")["gelu_tanh"]):
            with pytest.raises(ConfigError, match="no implementation of that name") as caught:
                ask()
            assert "second, torch" in str(caught.value)
            assert caught.value.where == "VENEER_OPS"


def test_listed_measures_nothing(bench: dict[str, float]) -> None:
    bench["torch"] = 0.1
    with own_choices(listed=True):
        assert name_of(torch.empty(40, 2)) == "first"
        assert not choice.recorded()
        assert "measured" not in choices("cpu")["gelu_tanh"].reason


def test_what_this_machine_keeps_can_be_asked_for(bench: dict[str, float], kept: Kept) -> None:
    name_of(torch.empty(40, 2))
    (key,) = choice.recorded()
    kept.put("gelu_tanh float32 64, 999 threads", Measured("first", {"first": 1.0}))
    kept.put(key.replace(" 64", " 128"), Measured("nobody's", {"nobody's": 1.0}))
    kept.put(key.replace("gelu_tanh", "no_op"), Measured("first", {"first": 1.0}))
    with own_choices():  # as in a later process
        assert set(choice.measured_here()) == {key}
        assert choices("cpu")["gelu_tanh"].reason.startswith("measured")
        assert choices("cpu")["gelu_tanh"].name == "first, second, torch"


def test_inside_of_listed_no_measurement_is_made_or_followed(bench: dict[str, float]) -> None:
    bench["torch"] = 0.1
    with choice.listed():
        assert chosen("gelu_tanh", torch.empty(40, 2))(None) == "first"
        assert not choice.recorded()
    assert name_of(torch.empty(40, 2)) == "torch"
    choice.follow(choice.recorded())
    with choice.listed(), choice.listed():
        assert chosen("gelu_tanh", torch.empty(40, 2))(None) == "first"


def test_two_runs_in_two_threads_keep_apart(bench: dict[str, float]) -> None:
    """Each follows its own record, in its forward, its gradients and the thread that makes its batches, while the other
    is in the middle of its own; what is outside of both is as it was."""
    name_of(torch.empty(40, 2))
    (key,) = before = choice.recorded()
    together = threading.Barrier(2, timeout=60)
    seen: dict[str, list[str]] = {}

    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, names: list[str]) -> Tensor:
            ctx.names = names
            names.append(name_of(x))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            ctx.names.append(name_of(torch.empty(40, 2)))
            return gradient, None

    def run(name: str) -> None:
        with own_choices(), Ahead(lambda batch: batch) as ahead:
            together.wait()
            choice.follow({key: name})
            together.wait()
            names = seen[name] = [name_of(torch.empty(40, 2))]
            made = Named.apply(torch.empty(40, 2, requires_grad=True), names)
            together.wait()
            made.sum().backward()
            names.append(ahead.take(lambda: name_of(torch.empty(40, 2))))
            together.wait()
            assert choice.recorded() == {key: name}

    with ThreadPoolExecutor(2) as threads:
        for ended in [threads.submit(copy_context().run, run, name) for name in ("second", "torch")]:
            ended.result(timeout=60)
    assert seen == {name: [name] * 4 for name in ("second", "torch")}
    assert choice.recorded() == before == {key: "first"}


def test_every_module_that_brings_trials_is_listed() -> None:
    """What is measured must not depend on what happens to be imported."""
    files = Path(choice.__file__).parent.glob("*.py")
    brings = {file.stem for file in files if "\n@measured(" in file.read_text(encoding="utf-8")}
    assert brings == set(choice.TRIED_IN)


@pytest.mark.parametrize("op", [op for op in OPS if choice.trial_of(op) is not None])
def test_every_trial_calls_its_op_and_runs_by_whatever_is_named(op: str) -> None:
    """At sizes of a few: what it does is the op, with the reference and with each implementation that runs here."""
    took: set[str] = set()

    def told(one: choice.Implementation) -> choice.Implementation:
        def takes(*given: Any) -> bool:
            if able := one.takes(*given):
                took.add(one.name)
            return able

        return one._replace(takes=takes, others=tuple(map(told, one.others)))

    own, trial = IMPLEMENTATIONS[op], choice.trial_of(op)
    assert trial is not None
    here = {one.name for one in (own, *own.others) if not one.missing()}
    table = {**IMPLEMENTATIONS, op: told(own)}
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("torch", *here):
            with own_choices(implementations=lambda device: table if device == "cpu" else {}, pins={op: name}):
                try:
                    trial.work(dtype, *TRIAL_SIZES[op])()
                except RuntimeError:  # by which a trial leaves it out
                    assert op in NO_REFERENCE
                    assert name == "torch" or dtype == torch.float32
    assert here <= took


NO_REFERENCE = ("packed_product",)

TRIAL_SIZES = {
    "packed_product": (4,),
    "weight_order": (16,),
    "frozen_product": (256, 258, 1),
    "kept_product": (256, 258, 1),
    "low_rank": (16, 32, 64, 8, 2),
    "rms_norm": (16,),
    "rms_norm_backward": (16,),
    "rows_attend": (2, 16, 4, 2, 16, 0),
    "silu_gate": (16,),
    "silu_gate_backward": (16,),
    "token_nll": (40,),
}
"""The class of shapes that each trial is tried with."""


def test_words_are_read() -> None:
    assert choice.words_of("listed,rms_norm=torch") == ({"rms_norm": "torch"}, True, "")
    assert choice.words_of("torch") == ({"*": "torch"}, False, "")
    assert choice.words_of(",cuda,") == ({}, False, "cuda")
    assert choice.words_of("") == ({}, False, "")


@pytest.mark.parametrize("words", ["rms_nrm=torch", "rms_norm", "torch=x", "cpu"])
def test_words_that_say_nothing_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=f"VENEER_OPS has {words}, which is neither"):
        choice.words_of(f"listed,{words}")


def test_words_are_those_of_the_environment_when_a_process_begins() -> None:
    code = """
import os, sys, torch
for words in sys.argv[1:]:
    if not os.fork():
        os.environ["VENEER_OPS"] = words
        try:
            from veneer.ops import choice
            own = choice.Implementation(None, None, "", lambda: "")
            with choice.own_choices(implementations=lambda device: {"rms_norm": own}):
                print(choice.PINNED, choice.choices("cpu")["rms_norm"].line(), flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.wait()
    print("---", flush=True)
"""
    expected = (
        ("listed", " compiled: the first that takes what it is given"),
        ("torch", " torch: pinned by VENEER_OPS"),
        ("cuda,rms_norm=compiled", "cuda compiled: pinned by VENEER_OPS"),
        ("rms_nrm=torch", "ConfigError: VENEER_OPS has rms_nrm=torch"),
    )
    command = [sys.executable, "-c", code, *(words for words, _ in expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for (_, said), found in zip(expected, done.stdout.split("---\n"), strict=False):
        assert said in found
