"""`base.compute: int8`: training by int8 products, compared with 16 bits in the preflight."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.stopping import interrupt_at
from tests.train.text.tiny_runs import TENSORS, train, values_of
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import ConfigError, Interrupted, PreflightError
from veneer.models.patching import recording_int8
from veneer.models.text.base import TextBase, load_text
from veneer.models.text.fast import fast
from veneer.models.text.loss import text_loss
from veneer.train.config.load import config_from
from veneer.train.events import Event, Note
from veneer.train.preflight import Report
from veneer.train.text.batches import collate
from veneer.train.text.encode import Example
from veneer.train.text.int8 import use_int8
from veneer.train.text.save import RunResult

INT8 = {"compute": "int8"}


@pytest.fixture(scope="module")
def base(shared: Path) -> TextBase:
    return load_text(str(shared / "tiny-base"), dtype="bfloat16")


def trained(shared: Path, loaded: TextBase, output: Path, **more: Any) -> tuple[RunResult, list[Event]]:
    events: list[Event] = []
    return train(shared, output, loaded, on_event=events.append, **more), events


def test_a_run_reports_its_distance_from_16_bits(shared: Path, base: TextBase, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    result, events = trained(shared, base, tmp_path / "int8", base=INT8)
    (line,) = [e.text for e in events if isinstance(e, Note) and e.text.startswith("int8 products")]
    said = re.match(r"int8 products: the first step's loss is ([\d.]+) \(([\d.]+) in 16 bits\).* ([\d.]+)° from", line)
    assert said is not None
    loss, exact, angle = map(float, said.groups())
    assert 0 < abs(loss - exact) < 0.05
    assert 0 < angle < 15
    assert line in [finding["text"] for finding in result.preflight["findings"]]
    assert line in html.unescape(Path(result.report).read_text())
    plain, quiet = trained(shared, base, tmp_path / "plain")
    assert not [e for e in quiet if isinstance(e, Note) and "int8" in e.text]
    # Step 0's validation is the same number, because both runs evaluate on the 16-bit base.
    assert result.validation_before == plain.validation_before
    assert result.validation == pytest.approx(plain.validation, abs=0.05)
    assert result.digest != plain.digest
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


def test_interrupted_runs_resume_exactly(shared: Path, base: TextBase, tmp_path: Path) -> None:
    trained(shared, base, tmp_path / "whole", base=INT8)
    with pytest.raises(Interrupted):
        train(shared, tmp_path / "cut", base, on_event=interrupt_at(5), base=INT8)
    train(shared, tmp_path / "cut", base, resume=True, base=INT8)
    assert (tmp_path / "cut" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()
    with pytest.raises(PreflightError, match=r"base\.compute"):
        train(shared, tmp_path / "cut", base, resume=True)


def test_micro_batches_equal_one_batch(base: TextBase) -> None:
    ids, lengths = torch.arange(90) % 60, [40, 30, 20]
    spec = config_from(values_of(Path(), Path()))[0].adapter.spec()
    with attach(base.model) as attachment:
        attachment.add("a", create(base.model, spec, seed=0), trainable=True)
        attachment.use("a")
        parameters = list(attachment.parameters("a").values())
        with fast(base.model) as report:

            def gradients(parts: list[tuple[int, int]]) -> list[torch.Tensor]:
                for first, last in parts:
                    at = slice(sum(lengths[:first]), sum(lengths[:last]))
                    own = ids[at]
                    trained = torch.ones(len(own), dtype=torch.bool)
                    starts = torch.tensor([0, *lengths[first : last - 1]]).cumsum(0)
                    trained[starts] = False
                    text_loss(base.model, own, lengths[first:last], trained).backward()
                out = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
                for p in parameters:
                    p.grad = None
                return out

            with recording_int8(report):
                exact = gradients([(0, 3)])
            whole, parts = gradients([(0, 3)]), gradients([(0, 1), (1, 2), (2, 3)])
    size = max(float(g.abs().max()) for g in whole)
    assert any(not torch.equal(a, b) for a, b in zip(exact, whole, strict=True))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * size)


def test_a_gradient_that_is_not_a_number_is_a_warning(base: TextBase) -> None:
    checks, parameter = Report(), torch.zeros(4, requires_grad=True)
    batch = collate([Example([1, 2], [False, True], 0)])
    factors = iter([1.0, float("nan")])  # in 16 bits, then in 8 bits
    with fast(base.model):
        line = use_int8(base, lambda *_: (parameter * next(factors)).sum(), [parameter], [batch], checks)
    assert line.startswith("warning: ")
    assert [finding.level for finding in checks.findings] == ["warn"]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"base": {"compute": "int4"}}, "base.compute"),
        ({"base": {**INT8, "quantize": "nf4"}}, "base.quantize"),
        ({"base": INT8, "memory": {"shard": True}}, "memory.shard"),
        ({"base": INT8, "preference": {"loss": "dpo"}}, "likelihood"),
    ],
)
def test_unknown_values_and_combinations_are_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        config_from(values_of(Path("folder"), Path("out"), **sections))


def test_a_recipe_of_auto_is_the_recipe_of_earlier_versions() -> None:
    recipes = [config_from(values_of(Path(), Path(), base=section))[0].recipe()["base"] for section in ({}, INT8)]
    assert "compute" not in recipes[0]
    assert recipes[1]["compute"] == "int8"
