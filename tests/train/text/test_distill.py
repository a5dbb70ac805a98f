"""Distillation on a tiny base: losses equal float64 calculations by hand, students learn, and runs resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.run import run
from tests.train.text.drawn_runs import config_of, measured, run_drawn, with_prompts
from veneer.errors import ConfigError, DataError, MismatchError
from veneer.models.text.base import TextBase
from veneer.models.text.loss import compared_logits, head_logits, hidden_at
from veneer.serve.engine.live import live_sampler
from veneer.serve.forward.runner import block_bytes
from veneer.train.config.load import config_from
from veneer.train.report.log import read_log
from veneer.train.text.policy_losses import divergences
from veneer.train.text.save import RunResult
from veneer.train.text.task import run_text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_prompts(tmp_path_factory.mktemp("distill"), lambda i: {"completion": " it"})


@pytest.fixture(scope="module")
def teacher(shared: Path, base: TextBase) -> str:
    """Train a rank-8 adapter and return its folder."""
    data = {"train": str(shared / "prompts.jsonl"), "split": 0}
    values = {
        "base": str(shared / "tiny-base"),
        "data": data,
        "output": str(shared / "teacher"),
        "adapter": {"rank": 8},
    }
    values |= {"optimizer": {"learning_rate": 2e-2}, "schedule": {"steps": 8}, "batching": {"rows": 4}}
    return run_text(config_from(values)[0], base=base, on_event=lambda event: None).adapter


TAUGHT: dict[str, Any] = {
    "batching": {"rows": 4, "micro_rows": 3}, "optimizer": {"learning_rate": 1e-2},
    "schedule": {"steps": 3, "name": "constant"}, "evaluation": {"keep": "last", "every": 3},
    "checkpoint": {"every": 1}, "distillation": {"max_tokens": 6},
}  # fmt: skip


def config(shared: Path, output: Path, **sections: Any) -> Any:
    return config_of(TAUGHT, shared, output, **sections)


def train(
    shared: Path, output: Path, base: TextBase, on_event: Any = None, resume: bool = False, **own: Any
) -> RunResult:
    return run_drawn(config(shared, output, **own), base, on_event, resume)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_divergences_and_gradients_equal_float64_by_hand(base: TextBase, direction: Any) -> None:
    model = base.model
    ids = torch.arange(5, 19)
    lengths, places = [6, 8], torch.tensor([2, 3, 8, 9, 12])
    hidden = hidden_at(model, ids, lengths, places).detach()
    theirs = torch.randn(len(places), 384 + 16, generator=torch.Generator().manual_seed(1))  # padded vocabulary
    x = hidden.clone().requires_grad_()
    actual = compared_logits(model, x, lambda part: theirs[part], lambda a, b, _: divergences(a, b, direction))
    (actual.sum()).backward()

    # by hand in float64: each row by itself, one position at a time
    rows = [model(input_ids=row[None]).logits[0] for row in ids.split(lengths)]
    own = torch.cat(rows)[places].double()
    assert torch.allclose(head_logits(model, hidden).double(), own, atol=1e-5)
    y = hidden.double().requires_grad_()
    by_hand = []
    for folder, other in zip(y @ model.get_output_embeddings().weight.double().T, theirs.double(), strict=True):
        p, q = folder.exp() / folder.exp().sum(), other[:384].exp() / other[:384].exp().sum()
        a, b = (p, q) if direction == "reverse" else (q, p)
        by_hand.append(sum(a[v] * (a[v].log() - b[v].log()) for v in range(384)))
    torch.stack(by_hand).sum().backward()
    assert torch.allclose(actual.double(), torch.stack(by_hand), rtol=1e-4, atol=1e-6)
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_student_learns_its_teacher(shared: Path, base: TextBase, teacher: str, tmp_path: Path, direction: str) -> None:
    own = {"teacher": teacher, "divergence": direction}
    result = train(shared, tmp_path, base, distillation=own, schedule={"steps": 10}, adapter={"rank": 4})
    metrics = measured(tmp_path)
    assert metrics[-1]["teacher_kl"] < 0.5 * metrics[0]["teacher_kl"]
    assert max(x["gap_max"] for x in metrics) < 1e-4
    assert result.validation < result.validation_before
    page = Path(result.report).read_text()
    assert "Divergence from the teacher" in page
    assert "Tokens per answer" in page


def test_equal_teacher_has_zero_divergence(shared: Path, base: TextBase, teacher: str, tmp_path: Path) -> None:
    own = {"teacher": teacher}
    train(shared, tmp_path, base, distillation=own, schedule={"steps": 1}, adapter={"start": teacher})
    (metrics,) = measured(tmp_path)
    assert metrics["teacher_kl"] == pytest.approx(0.0, abs=1e-6)


def test_student_learns_the_system_message(shared: Path, base: TextBase, tmp_path: Path) -> None:
    system = "Answer in one word: billing, it or hr. " * 3
    own = {"teacher": "base", "system": system}
    train(shared, tmp_path, base, distillation=own, schedule={"steps": 8})
    metrics = measured(tmp_path)
    assert metrics[0]["teacher_kl"] > 0
    assert metrics[-1]["teacher_kl"] < metrics[0]["teacher_kl"]
    (note,) = [r["text"] for r in read_log(tmp_path / "log.jsonl") if "are saved" in r.get("text", "")]
    ask = {"role": "user", "content": "The printer number 3 does not answer."}
    student, teacher = (
        base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in ([ask], [{"role": "system", "content": system}, ask])
    )
    assert note.startswith(f"{len(teacher) - len(student)} tokens per request")


def test_cache_fits_the_completions_sampled_at_once(shared: Path, base: TextBase, tmp_path: Path) -> None:
    """The cache is no larger than needed: for four prompts per step or two held-out prompts, with two completions
    each, even if the configured maximum is higher."""
    taken: list[int] = []

    @contextmanager
    def drawing(*grader: Any) -> Iterator[Any]:
        with live_sampler(*grader) as sampler:
            (pages,) = sampler.runner.pages
            taken.append(pages.K.nbytes + pages.V.nbytes)
            yield sampler

    for group, rows in ((2, 64), (2, 3)):
        own = {"teacher": "base", "system": "Answer in one word.", "group": group, "rows": rows}
        output = tmp_path / str(rows)
        run_drawn(config(shared, output, distillation=own, schedule={"steps": 1}), base, sampler=drawing)
        (actual,) = [r["data"]["numbers"] for r in read_log(output / "log.jsonl") if r["event"] == "checked"]
        planned, least = actual["predicted_parts"]["cache"], min(rows, 4 * group)
        each = block_bytes(base)
        assert planned <= taken[-1] <= planned + (least + 2) * each  # whole blocks
    assert taken[0] > 2 * taken[1]


def test_prompts_over_the_context_are_refused_or_dropped(shared: Path, base: TextBase, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared / "prompts.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "word " * 30  # exceeds the context together with the teacher's system message
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "split": 0}
    own = {"teacher": "base", "system": "a" * (base.context - 100)}
    with pytest.raises(DataError, match=r"1 of 12 rows leave no space for a completion(.|\n)*rows.jsonl:1"):
        train(shared, tmp_path / "refused", base, distillation=own, data=data)
    dropping = data | {"long_rows": "drop"}
    batching = {"rows": 12, "micro_rows": 12}
    train(shared, tmp_path / "one", base, distillation=own, data=dropping, batching=batching, schedule={"steps": 1})
    log = read_log(tmp_path / "one" / "log.jsonl")
    (finding,) = [f for r in log if r["event"] == "checked" for f in r["data"]["findings"] if f["check"] == "long rows"]
    assert "1 of 12 (8%) prompts leave no space for a completion" in finding["text"]


def test_another_base_with_the_same_tokenizer_can_teach(shared: Path, base: TextBase, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shared / "tiny-base", other)
    train(shared, tmp_path / "out", base, distillation={"teacher": "base", "base": str(other)}, schedule={"steps": 1})
    assert measured(tmp_path / "out")[0]["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = tokenizer["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="another tokenizer: 2 tokens differ, for example 'a'"):
        train(shared, tmp_path / "no", base, distillation={"teacher": "base", "base": str(other)})


def test_teacher_completions_are_saved_as_rows(
    shared: Path, base: TextBase, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = {"train": str(shared / "prompts.jsonl")}, str(tmp_path / "out")
    distillation = {"teacher": teacher, "max_tokens": 60, "group": 2, "system": "Be brief."}
    values = {"base": str(shared / "tiny-base"), "data": data, "output": output, "distillation": distillation}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    ran = run(capsys, "data", "draw", str(tmp_path / "c.yaml"), str(tmp_path / "rows.jsonl"), "--json")
    message = json.loads(ran.out)
    made = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(made) == message["written"] == 24 - len(message["left"])
    assert made
    for row in made:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]


def test_contradictory_settings_are_refused(shared: Path, tmp_path: Path) -> None:
    for own, message in (
        ({}, "needs `distillation.teacher`"),
        ({"teacher": "base"}, "predicts the same as a new adapter"),
        ({"teacher": "critic", "base": "other"}, "a teacher without adapters"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(shared, tmp_path, distillation=own)
    with pytest.raises(ConfigError, match="keep one"):
        config(shared, tmp_path, distillation={"teacher": "critic"}, preference={"loss": "dpo"})
