"""A teacher on a server: veneer's own beside the same teacher in this process, and one that fails in every way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.whole import Whole, make_shop, prompt, served
from tests.train.rewards.test_judge import serving
from tests.train.text.drawn_runs import config_of, measured, run_drawn, with_prompts
from tests.train.text.tiny_runs import TENSORS
from veneer.core.attach import attach
from veneer.errors import ConfigError, MismatchError, TrainingError, UnavailableError
from veneer.formats import peft
from veneer.models.text.base import TextBase, load_text
from veneer.serve.engine.live import live_sampler
from veneer.train.config.text import TrainConfig
from veneer.train.loop import Micro, Step
from veneer.train.report.log import read_log
from veneer.train.text.distill import Distillation
from veneer.train.text.prompts import PromptItem
from veneer.train.text.rollouts import SamplerSettings
from veneer.train.text.rows import read_rows
from veneer.train.text.save import RunResult
from veneer.train.text.served_teacher import served_teacher

Body = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_prompts(tmp_path_factory.mktemp("served"), lambda i: {"completion": " it"})


@pytest.fixture(scope="module")
def base(folder: Path) -> TextBase:
    return load_text(str(folder / "tiny-base"))


TAUGHT = {
    "batching": {"rows": 4, "micro_rows": 3},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"steps": 2, "name": "constant"},
    "evaluation": {"keep": "last", "every": 9},
}


def config(folder: Path, output: Path, base: str = "", **own: Any) -> TrainConfig:
    settings = TAUGHT | ({"base": base} if base else {})
    made: TrainConfig = config_of(settings, folder, output, **own)
    return made


def taught(url: str, **own: Any) -> Any:
    return {"teacher": "wise", "url": url, "max_tokens": 6, **own}


def train(folder: Path, output: Path, base: TextBase, resume: bool = False, **own: Any) -> RunResult:
    return run_drawn(config(folder, output, str(base.directory), **own), base, resume=resume)


# -- veneer's own server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with served(make_shop(tmp_path_factory.mktemp("shop"), ["plain"])) as whole:
        yield whole


@pytest.fixture(scope="module")
def in_process(whole: Whole) -> Callable[[list[int]], torch.Tensor]:
    """log q of all tokens at each place of a prompt, by the server's adapter on the same base."""
    base = load_text(str(whole.shop.base_dir))

    @torch.no_grad()
    def logps(ids: list[int]) -> torch.Tensor:
        with attach(base.model) as attachment:
            attachment.add("t", peft.load_folder(whole.shop.adapters / "plain", base.model).adapter)
            attachment.use("t")
            return base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return logps


def test_served_logprobs_equal_local_logprobs(whole: Whole, in_process: Any, folder: Path, tmp_path: Path) -> None:
    own = taught(f"{whole.url}/v1", teacher="plain")
    section = config(folder, tmp_path, str(whole.shop.base_dir), distillation=own).distillation
    prompts = [(prompt(n, n), n // 2) for n in (9, 30)]
    with served_teacher(section, whole.shop.base) as teacher:
        actual = teacher.read(prompts)
    for (ids, count), logps in zip(prompts, actual, strict=True):
        expected = in_process(ids)[-count - 1 : -1].gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logps, dtype=torch.float64), expected, atol=1e-5)


def test_the_gradient_by_hand(whole: Whole, in_process: Any, folder: Path, tmp_path: Path) -> None:
    """Of one drawn step, beside the estimate written out in float64 over the student's own logits."""
    shop, seen = whole.shop, list[torch.Tensor]()
    own = taught(f"{whole.url}/v1", teacher="plain")
    read = config(folder, tmp_path, str(shop.base_dir), distillation=own)
    with attach(shop.base.model) as attachment, served_teacher(read.distillation, shop.base) as teacher:
        student = peft.load_folder(shop.adapters / "plain", shop.base.model).adapter
        attachment.add("s", student.mapped(lambda t: t * 0.5 if t.is_floating_point() else t), trainable=True)
        attachment.use("s")
        parameters = list(attachment.parameters("s").values())
        with live_sampler(shop.base, attachment, SamplerSettings(exact=False)) as sampler:
            drawing = Distillation(read, shop.base, "s", sampler, teacher)
            rows, _ = read_rows(read.data.files("train"))
            items = tuple(PromptItem(tuple(prompt(8 + i, i)), i, 6) for i in range(3))
            step = drawing.sample_step(Step((Micro(1, 1, (), lambda: None, items=items),)), 1, rows, lambda: False)
        batches = [micro.make() for micro in step.micros]
        for batch in batches:
            drawing.loss(batch).backward()
        actual = [p.grad.clone() for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        total = sum(sum(b.answers) for b in batches)
        for batch in batches:
            for ids, learned in zip(
                batch.input_ids.split(batch.lengths), batch.trained.split(batch.lengths), strict=True
            ):
                at = learned.nonzero()[:, 0]
                ours = shop.base.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)[at - 1]
                theirs = in_process(ids.tolist())[at - 1]
                message = ids[at][:, None]
                p, q = ours.gather(1, message), theirs.gather(1, message)
                losses = (p.detach() - q) * p
                seen.append(losses.sum() * len(items) / total)
        torch.stack(seen).sum().backward()
        by_hand = [p.grad for p in parameters if p.grad is not None]
    assert len(actual) == len(by_hand) > 0
    largest = max(float(g.abs().max()) for g in by_hand)
    assert largest > 0
    for a, b in zip(actual, by_hand, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * largest)


# -- a server that is none of ours -------------------------------------------------------------------------------------


def logp_of(id: int) -> float:
    return -1 - (id % 7) / 10


def place(base: TextBase, id: int, **own: Any) -> Any:
    return {str(id): {"logprob": logp_of(id), "rank": 1, "decoded_token": base.tokenizer.decode([id]), **own}}


def teaches(base: TextBase, spoil: Callable[[Body, int], tuple[int, Any] | None] = lambda body, n: None) -> Any:
    """What a server in vLLM's form says, unless it is spoilt."""

    def says(body: Body, n: int) -> tuple[int, Any]:
        note = [None, *(place(base, id) for id in body["prompt"][1:])]
        return spoil(body, n) or (200, {"choices": [{"prompt_logprobs": note, "text": "x"}]})

    return says


_OTHER = {"decoded_token": "something else"}


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        (lambda base: lambda body, n: (401, {"error": "who?"}), ConfigError, "refuses requests: HTTP 401"),
        (lambda base: lambda body, n: (404, {"error": "no such model"}), ConfigError, "HTTP 404"),
        (lambda base: lambda body, n: (400, {"error": "token 380 is beyond"}), ConfigError, "token 380 is beyond"),
        (lambda base: lambda body, n: (200, {"choices": [{"text": "hello"}]}), ConfigError, "gives no log-prob"),
        (lambda base: lambda body, n: (200, "what?"), ConfigError, "gives no log-prob"),
        (
            lambda base: lambda body, n: (200, {"choices": [{"prompt_logprobs": [
                None, *(place(base, id, **_OTHER if id % 9 == 0 else {}) for id in body["prompt"][1:])
            ]}]}),
            MismatchError, r"another tokenizer: \d+ of \d+ tokens",
        ),
        (
            lambda base: lambda body, n: (200, {"choices": [{"prompt_logprobs": [
                None, *(place(base, id, decoded_token=None) for id in body["prompt"][1:])
            ]}]}),
            ConfigError, "returns no texts of tokens",
        ),
        (
            lambda base: lambda body, n: (200, {"choices": [{"prompt_logprobs": [
                None, *(place(base, id + 1) for id in body["prompt"][1:])
            ]}]}),
            ConfigError, r"gives the token \d+ no log-prob",
        ),
        (lambda base: lambda body, n: (503, {}), UnavailableError, "has been away for 0 s: HTTP 503"),
    ],
    ids=["key", "model", "ids", "no logprobs", "no completion", "tokenizer", "texts", "other tokens", "away"],
)  # fmt: skip
def test_unusable_teachers_are_refused_before_sampling(
    folder: Path, base: TextBase, tmp_path: Path, says: Any, error: type[Exception], message: str
) -> None:
    with serving(says(base)) as server:
        with pytest.raises(error, match=message) as refused:
            train(folder, tmp_path, base, distillation=taught(server.url, patience=0))
        assert server.url in str(refused.value)
    assert "wise" in str(refused.value) or error is not MismatchError
    assert base.name in str(refused.value) or error is not MismatchError
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ((400, {"error": "too long"}), "refused the question, HTTP 400"),
        ({"logprob": float("nan")}, "nan, not a log-probability"),
        ({"logprob": -9999.0}, "no probability at all"),
        ({"logprob": 0.5}, "0.5, not a log-probability"),
        (None, "timeout"),
    ],
)
def test_unscored_completions_are_left_out(folder: Path, base: TextBase, tmp_path: Path, spoilt: Any, why: str) -> None:
    """One of each step's four; a second one is too many, and both rows are named."""
    most, over = 1, threading.Event()

    def spoil(body: Body, n: int) -> tuple[int, Any] | None:
        text = base.tokenizer.decode(body["prompt"])
        if n == 1 or not any(f"number {i} " in text for i in range(most)):
            return None
        if spoilt is None:
            over.wait(3)
            return 200, {}
        if isinstance(spoilt, tuple):
            return spoilt
        last = place(base, body["prompt"][-1], **spoilt)
        return 200, {"choices": [{"prompt_logprobs": [None, *(place(base, id) for id in body["prompt"][1:-1]), last]}]}

    whole = {"data": {"split": 0}, "batching": {"rows": 12}, "schedule": {"steps": 1}}
    with serving(teaches(base, spoil)) as server:
        own = taught(server.url, timeout=0.3 if spoilt is None else 60.0)
        train(folder, tmp_path / "one", base, distillation=own, **whole)
        (metrics,) = measured(tmp_path / "one")
        assert metrics["teacher_failed"] == 1
        notes = [r["text"] for r in read_log(tmp_path / "one" / "log.jsonl") if "left out" in r.get("text", "")]
        assert ["prompts.jsonl:1: the teacher" in note for note in notes] == [True]
        most = 3
        with pytest.raises(TrainingError, match="could not read 3 of 12 answers") as refused:
            train(folder, tmp_path / "three", base, distillation=own, **whole)
        over.set()
    assert f"prompts.jsonl:1: the teacher {'gave no answer in time' if spoilt is None else ''}" in str(refused.value)
    assert spoilt is None or why in str(refused.value)
    assert "distillation.most_failed" in str(refused.value)


def test_outage_stops_the_run_and_it_resumes_exactly(folder: Path, base: TextBase, tmp_path: Path) -> None:
    with serving(teaches(base)) as server:
        train(folder, tmp_path / "whole", base, distillation=taught(server.url))
        first = len(server.asked)

    def away(body: Body, n: int) -> tuple[int, Any] | None:
        # once in a while it is busy, which is waited for; in the second step it is gone
        return (429, {}) if n == 3 else (503, {}) if first // 2 + 2 < n < first + 20 else None

    own = taught("", patience=2)
    with serving(teaches(base, away)) as server:
        own["url"] = server.url
        with pytest.raises(UnavailableError, match="the teacher has been away for 2 s: HTTP 503"):
            train(folder, tmp_path / "parts", base, distillation=own)
        saved = [r for r in read_log(tmp_path / "parts" / "log.jsonl") if r["event"] == "saved"]
        assert [r["step"] for r in saved] == [1]
    with serving(teaches(base)) as server:  # it has moved, and more patience is no other run
        again = taught(server.url, patience=60, at_once=2, most_failed=0.5)
        train(folder, tmp_path / "parts", base, resume=True, distillation=again)
    assert (tmp_path / "parts" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()


def test_contradictory_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    for own, message in (
        ({"teacher": "wise", "key": "K"}, "needs `distillation.url`"),
        ({"teacher": "base", "url": url, "base": "other"}, "the teacher is on a server"),
        (taught(url, temperature=0.5), "leave it at 1"),
        (taught(url, divergence="forward"), "a server takes `reverse`"),
        (taught("localhost:80"), "pattern"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(folder, tmp_path, distillation=own)
