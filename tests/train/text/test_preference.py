"""Preference runs on a tiny base: the loss equals its formula, and runs resume and save like supervised
runs."""

from __future__ import annotations

import copy
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny_base import tiny_base_dir
from tests.train.stopping import interrupt_at
from tests.train.text import tiny_runs
from tests.train.text.tiny_runs import TENSORS
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import ConfigError, DataError, Interrupted, PreflightError
from veneer.formats import peft
from veneer.formats.card import read_card
from veneer.models.text.base import TextBase, load_text
from veneer.models.text.fast import fast
from veneer.train.config.load import config_from
from veneer.train.events import Checked, Evaluated, Event, Note, Resolved, Stepped
from veneer.train.report.log import read_log
from veneer.train.text.data import encode_split, planned_steps
from veneer.train.text.preference import Preference, mismatched_examples
from veneer.train.text.rows import read_rows
from veneer.train.text.save import RunResult

ROOT = Path(__file__).resolve().parents[3]
LOSSES = ["dpo", "ipo", "orpo", "kto", "simpo"]
EACH = pytest.mark.parametrize("loss", LOSSES)


def pair(i: int) -> dict[str, str]:
    return {
        "prompt": f"The printer number {i} does not answer.",
        "chosen": f"Sorry about printer {i}, thank you.",
        "rejected": f"The printer number {i} on the third floor. Reset it {'again ' * (i % 4)}and pay the invoice.",
    }


Whole = dict[str, tuple[Path, RunResult, list[Event]]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    tiny_base_dir(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(24)))
    return folder


def train(shared: Path, output: Path, loss: str | None = "dpo", base: TextBase | None = None, **more: Any) -> RunResult:
    own: dict[str, Any] = {
        "data": {"train": str(shared / "pairs.jsonl"), "split": 4},
        "batching": {"rows": 5},
        "schedule": {"steps": 8},
        "adapter": {"dropout": 0.0},
        "preference": {"loss": loss},
    }
    return tiny_runs.train(shared, output, base, **tiny_runs.merged(own, more))


@pytest.fixture(scope="module")
def whole(shared: Path, base: TextBase) -> Whole:
    """Return one uninterrupted run for each loss."""
    out = {}
    for loss in LOSSES:
        events: list[Event] = []
        # KTO runs use dropout, to show that measuring z₀ uses neither dropout nor random numbers
        dropout = {"dropout": 0.2} if loss == "kto" else {}
        result = train(shared, shared / loss, loss, base, on_event=events.append, adapter=dropout)
        out[loss] = shared / loss, result, events
    return out


@EACH
def test_every_loss_learns_the_preference(loss: str, whole: Whole) -> None:
    folder, result, events = whole[loss]
    assert result.validation < result.validation_before
    assert result.measured["reward_margin"] > result.measured_before["reward_margin"]
    expected = {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected"}
    expected |= {"tokens_chosen", "tokens_rejected"} | ({"kl"} if loss == "kto" else set())
    for event in events:
        if isinstance(event, Stepped | Evaluated):
            assert expected == event.extra.keys()
    logged = [r for r in read_log(folder / "log.jsonl") if r["event"] == "stepped"]
    assert [r["step"] for r in logged] == list(range(1, 9))
    assert logged[-1]["extra"].keys() == expected
    json.dumps(result.to_dict(), allow_nan=False)
    assert read_card(folder).card.metrics["measured"] == result.measured
    page = (folder / "report.html").read_text()
    for piece in ("Share of pairs ranked correctly", "Reward margin of chosen over rejected", f"Loss, {loss}"):
        assert piece in page
    actual = next(e.text for e in events if isinstance(e, Checked))
    if loss == "kto":
        assert "40 answers, 20 desirable and 20 not" in actual
    else:
        assert "20 pairs" in actual


def likelihoods(base: TextBase, model: Any, rows: list[dict[str, str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (log p of chosen answers, of rejected answers, lengths of chosen answers, of rejected answers).

    Computed row by row, in the model's precision."""
    out: list[list[Tensor]] = [[], []]
    lengths: list[list[int]] = [[], []]
    for row in rows:
        ask = [{"role": "user", "content": row["prompt"]}]
        start = len(base.tokenizer.apply_chat_template(ask, add_generation_prompt=True)["input_ids"])
        for k, name in enumerate(("chosen", "rejected")):
            message = [*ask, {"role": "assistant", "content": row[name]}]
            ids = base.tokenizer.apply_chat_template(message)["input_ids"]
            ids = torch.tensor([ids[:-1]])  # without the line break after the end of the turn
            logp = F.log_softmax(model(input_ids=ids).logits[0], dim=-1)
            out[k].append(sum(logp[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))  # type: ignore[arg-type]
            lengths[k].append(ids.shape[1] - start)
    counts = [torch.tensor(n, dtype=out[0][0].dtype) for n in lengths]
    return torch.stack(out[0]), torch.stack(out[1]), counts[0], counts[1]


def formula(loss: str, w: Tensor, l: Tensor, n_w: Tensor, n_l: Tensor, rw: Tensor, rl: Tensor, z: Tensor) -> Tensor:
    """Return the loss by its paper's formula, with the defaults of the reference page.

    For kto, return the sum of both answers' losses."""
    beta = 2.0 if loss == "simpo" else 0.1
    m_w, m_l = w / n_w, l / n_l
    if loss == "dpo":
        return -torch.log(torch.sigmoid(beta * ((w - rw) - (l - rl))))
    if loss == "ipo":
        return ((w - rw) / n_w - (l - rl) / n_l - 1 / (2 * beta)) ** 2
    if loss == "orpo":
        odds = [torch.exp(m) / (1 - torch.exp(m)) for m in (m_w, m_l)]
        return -m_w - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    if loss == "simpo":
        return -torch.log(torch.sigmoid(beta * (m_w - m_l) - 1.0))
    return (1 - torch.sigmoid(beta * (w - rw - z))) + (1 - torch.sigmoid(beta * (z - l + rl)))


@EACH
def test_loss_and_gradient_equal_the_formula_in_float64(loss: str, shared: Path) -> None:
    """The reference is a float64 model with s·B·A added to its weights. Covers everything from the data file to
    the gradients of A and B."""
    base = load_text(str(shared / "tiny-base"))
    data = {"train": str(shared / "pairs.jsonl"), "limit": 6}
    values = {"base": "x", "data": data, "output": "x", "preference": {"loss": loss}, "adapter": {"rank": 4}}
    values |= {"schedule": {"steps": 1}, "batching": {"rows": 12, "micro_rows": 2}}
    config, _ = config_from(values)
    rows, _ = read_rows(config.data.files("train"), limit=6)
    part = encode_split(rows, config, base)
    adapter = create(base.model, config.adapter.spec(), seed=0)
    gen = torch.Generator().manual_seed(1)
    for p in adapter.pairs.values():
        p.B = torch.randn(p.B.shape, generator=gen) * 0.2
    plain = {k: v.clone() for k, v in base.model.state_dict().items()}
    with attach(base.model) as attachment, ExitStack() as stack:
        attachment.add("run", adapter, trainable=True)
        attachment.use("run")
        stack.enter_context(fast(base.model))
        preference = Preference(config, base, attachment)
        preference.load_reference(part.items)
        (step,) = planned_steps(part.items, config, part.rows)
        assert len(step.micros) > 1
        preference.begin(step)
        total = sum(float(preference.loss(m.make()).detach()) for m in step.micros) / step.divisor
        for m in step.micros:
            (preference.loss(m.make()) / step.divisor).backward()
        got = {n: p.grad.double() for n, p in attachment.parameters("run").items() if p.grad is not None}
        items = [item for m in step.micros for item in m.make().items]

    wide = copy.deepcopy(base.model).double()
    data = [pair(i) for i in range(6)]
    with torch.no_grad():
        rw, rl, *_ = likelihoods(base, wide, data)
    leaves = {}
    weights = dict(wide.named_parameters())
    for name, p in adapter.pairs.items():
        A, B = (t.double().requires_grad_() for t in (p.A, p.B))
        leaves |= {f"{name}.A": A, f"{name}.B": B}
        weights[f"{name}.weight"] = plain[f"{name}.weight"].double() + p.scale * B @ A

    def called(**inputs: Any) -> Any:
        return torch.func.functional_call(wide, weights, (), inputs, tie_weights=False)

    w, l, n_w, n_l = likelihoods(base, called, data)
    z = torch.tensor(0.0, dtype=torch.float64)
    if loss == "kto":
        ratios = []
        for e in mismatched_examples(sorted(items, key=lambda i: (i.row, not i.desirable)), 2048):
            ids, at = torch.tensor([e.input_ids]), [i for i, t in enumerate(e.trained) if t]
            both = [F.log_softmax(model(input_ids=ids).logits[0], -1) for model in (called, wide)]
            ratios.append(sum((a - b).detach()[i - 1, e.input_ids[i]] for i in at for a, b in [both]))
        z = torch.stack(ratios).mean().clamp(min=0)  # type: ignore[arg-type]
        assert preference.point == pytest.approx(float(z), rel=1e-3, abs=1e-4)
    losses = formula(loss, w, l, n_w, n_l, rw, rl, z)
    expected = losses.sum() / (12 if loss == "kto" else 6)
    assert total == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for name, leaf in leaves.items():
        assert (got[name] - leaf.grad).norm() <= 2e-3 * leaf.grad.norm() + 1e-9, name


def test_policy_equals_its_reference_at_step_zero(whole: Whole) -> None:
    first = next(e for e in whole["dpo"][2] if isinstance(e, Evaluated))
    assert first.loss == pytest.approx(math.log(2), rel=1e-5)
    assert first.extra["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert first.perplexity is None


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_interrupted_runs_resume_exactly(loss: str, whole: Whole, shared: Path, base: TextBase, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    dropout = {"dropout": 0.2} if loss == "kto" else {}
    with pytest.raises(Interrupted):
        train(shared, output, loss, base, on_event=interrupt_at(5), adapter=dropout)
    result = train(shared, output, loss, base, resume=True, adapter=dropout)
    assert (output / TENSORS).read_bytes() == (whole[loss][0] / TENSORS).read_bytes()
    assert (result.digest, result.loss, result.measured) == tuple(
        getattr(whole[loss][1], k) for k in ("digest", "loss", "measured")
    )


def test_a_dry_run_computes_no_reference_and_writes_nothing(shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    result = train(shared, tmp_path / "dry", "kto", base, dry_run=True, on_event=events.append)
    assert result.dry_run
    assert not (tmp_path / "dry").exists()
    assert not any(isinstance(e, Note) and e.text.startswith("reference") for e in events)


# --- starting from an adapter -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(shared: Path, base: TextBase) -> Path:
    """Return the folder of a supervised run on the chosen answers."""
    rows = [{"prompt": pair(i)["prompt"], "completion": pair(i)["chosen"]} for i in range(24)]
    (shared / "chosen.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train(shared, shared / "tuned", None, base, data={"train": str(shared / "chosen.jsonl")})
    return shared / "tuned"


def test_a_starting_adapter_is_the_reference(tuned: Path, shared: Path, base: TextBase, tmp_path: Path) -> None:
    events: list[Event] = []
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    result = train(
        shared, tmp_path / "out", "dpo", base, adapter={"start": str(tuned), "rank": 16}, on_event=events.append
    )
    first = next(e for e in events if isinstance(e, Evaluated))
    assert first.loss == pytest.approx(math.log(2), rel=1e-5)
    assert result.validation < first.loss
    assert f"starts from {tuned}" in next(e.text for e in events if isinstance(e, Checked))
    card = read_card(tmp_path / "out").card
    start = peft.read_folder(tuned, base.model)
    assert card.parents == [start.digest()]
    assert peft.read_folder(tmp_path / "out", base.model).pairs.keys() == start.pairs.keys()
    assert peft.read_folder(tuned, base.model).digest() == start.digest()
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items())
    # the run starts with the tuned adapter's likelihood of the chosen answers, not with the base's
    bare: list[Event] = []
    train(shared, tmp_path / "bare", "dpo", base, on_event=bare.append, schedule={"steps": 1})
    of_base = next(e for e in bare if isinstance(e, Evaluated)).extra["logp_chosen"]
    assert first.extra["logp_chosen"] > of_base + 1


def test_supervised_run_continues_from_an_adapter(tuned: Path, shared: Path, base: TextBase, tmp_path: Path) -> None:
    again = {"data": {"train": str(shared / "chosen.jsonl")}, "adapter": {"start": str(tuned), "rank": 16}}
    events: list[Event] = []
    train(shared, tmp_path / "whole", None, base, on_event=events.append, **again)
    ended = [e for e in read_log(tuned / "log.jsonl") if e["event"] == "evaluated"][-1]["loss"]
    assert next(e for e in events if isinstance(e, Evaluated)).loss == pytest.approx(ended, rel=1e-4)


# --- invalid input ----------------------------------------------------------------------------------------------------


def test_pairs_without_a_loss_are_refused(shared: Path, base: TextBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the chosen answers only"):
        train(shared, tmp_path / "out", None, base)


def test_a_loss_without_pairs_is_refused(shared: Path, base: TextBase, tmp_path: Path) -> None:
    (tmp_path / "judged.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    with pytest.raises(DataError, match="prompt, chosen and rejected"):
        train(shared, tmp_path / "out", "dpo", base, data={"train": str(tmp_path / "judged.jsonl"), "split": 0})


def test_kto_reads_labels_and_needs_both(shared: Path, base: TextBase, tmp_path: Path) -> None:
    for name, good in (("both", lambda i: i % 4 == 0), ("one", lambda i: True)):
        rows = [{"prompt": f"The {i}", "completion": f"Thank you {i}", "label": good(i)} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    events: list[Event] = []
    data = {"train": str(tmp_path / "both.jsonl"), "split": 0}
    result = train(shared, tmp_path / "out", "kto", base, data=data, schedule={"steps": 2}, on_event=events.append)
    assert result.steps == 2
    text = next(e.text for e in events if isinstance(e, Checked))
    assert "20 answers, 5 desirable and 15 not" in text
    with pytest.raises(PreflightError, match="nothing to compare"):
        train(shared, tmp_path / "no", "kto", base, data=data | {"train": str(tmp_path / "one.jsonl")})


def test_pairs_without_a_partner_are_reported(shared: Path, base: TextBase, tmp_path: Path) -> None:
    rows = [pair(i) for i in range(20)]
    rows[3]["rejected"] = ""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    events: list[Event] = []
    data = {"train": str(tmp_path / "rows.jsonl"), "split": 0}
    train(shared, tmp_path / "out", "dpo", base, data=data, dry_run=True, on_event=events.append)
    text = next(e.text for e in events if isinstance(e, Checked))
    assert "19 pairs" in text
    assert "1 of 40 (2%) answers are dropped because the other answer of the pair is dropped" in text
    assert "rows.jsonl:4" in text


CONTRADICTORY_SETTINGS = [
    ({"preference": {"loss": None, "beta": 0.2}}, "`preference.beta` needs `preference.loss`"),
    ({"preference": {"loss": "dpo", "gamma": 1.0}}, "`preference.gamma` is not used by dpo"),
    ({"preference": {"loss": "kto", "nll": 1.0}}, "`preference.nll` is not used by kto"),
    ({"preference": {"loss": "orpo", "label_smoothing": 0.1}}, "not used by orpo"),
    ({"data": {"train_on": "all"}}, "would compare the prompts"),
    ({"data": {"format": "text"}}, "no answers that dpo can compare"),
    ({"data": {"format": "unpaired-preference"}}, "no answers that dpo can compare"),
    ({"preference": {"loss": "kto"}, "batching": {"rows": 1}}, "from other prompts of the batch"),
    ({"adapter": {"start": "x"}}, "`adapter.rank` cannot be combined with `adapter.start`"),
]


@pytest.mark.parametrize(("sections", "message"), CONTRADICTORY_SETTINGS, ids=str)
def test_contradictory_settings_are_refused(
    sections: dict[str, Any], message: str, shared: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(shared, tmp_path / "out", **sections)


def test_unset_preference_settings_get_reported_defaults(shared: Path, base: TextBase, tmp_path: Path) -> None:
    for loss, beta, gamma, normalized, nll in (
        ("dpo", 0.1, None, False, 0.0),
        ("ipo", 0.1, None, True, 0.0),
        ("orpo", 0.1, None, None, 1.0),
        ("simpo", 2.0, 1.0, None, 0.0),
        ("kto", 0.1, None, None, None),
    ):
        events: list[Event] = []
        train(shared, tmp_path / loss, loss, base, dry_run=True, on_event=events.append)
        settings = next(e for e in events if isinstance(e, Resolved))
        got = [settings.settings[f"preference.{k}"] for k in ("beta", "gamma", "length_normalized", "nll")]
        assert got == [beta, gamma, normalized, nll]
        assert loss in settings.sources["preference.beta"]


def test_preference_runs_default_to_a_lower_learning_rate(shared: Path) -> None:
    values = {"base": "x", "data": {"train": "x"}, "output": "x", "preference": {"loss": "dpo"}}
    config, sources = config_from(values)
    assert config.optimizer.learning_rate == 2e-5
    assert "preference run" in str(sources["optimizer.learning_rate"])
    assert config_from(values, ["optimizer.learning_rate=1e-4"])[0].optimizer.learning_rate == 1e-4
    assert config_from(values | {"preference": {}})[0].optimizer.learning_rate == 2e-4
