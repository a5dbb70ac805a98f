"""Fault injection: preflight reports each known failure that can be detected before training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.families import FAMILIES, MOE_FAMILIES
from tests.tiny_base import tiny_base_dir, tiny_model, tiny_tokenizer
from tests.train import templates
from veneer.errors import PreflightError
from veneer.models.text.base import text_without_weights
from veneer.plan.memory import packed_weights
from veneer.plan.shape import model_shape
from veneer.train.config.load import config_from
from veneer.train.inspect import inspect_run
from veneer.train.preflight import Report
from veneer.train.text import preflight
from veneer.train.text.data import TextData, encode_split, read_data
from veneer.train.text.preflight import TextSubject, data_findings
from veneer.train.text.rows import Row, RowsSummary


@dataclass
class TinyBase:
    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...] = (2,)
    context: int = 256
    dtype: torch.dtype = torch.float32
    quantized: str = ""
    unread: Any = None


def talk(question: str, answer: str, where: str, **extra: Any) -> Row:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra})
    return Row("messages", turns, where=where)


ROWS = [talk(f"Question {i}?", f"Answer {i}.", f"data.jsonl:{i + 1}") for i in range(40)]
HELD = [talk(f"Other {i}?", f"Reply {i}.", f"held.jsonl:{i + 1}") for i in range(5)]


@pytest.fixture
def base() -> TinyBase:
    return TinyBase(tiny_model(), tiny_tokenizer())


class Run:
    """Preflight of a run with the tiny base, with changed settings or data."""

    def __init__(self, base: TinyBase, folder: Path) -> None:
        self.base, self.folder = base, folder

    def __call__(
        self, *overrides: str, rows: list[Row] | None = None, held: list[Row] | None = None, **more: Any
    ) -> Report:
        values = {"base": "tiny", "data": {"train": "data.jsonl"}, "output": str(self.folder / "out")}
        config, _ = config_from(values, overrides)
        parts = (ROWS if rows is None else rows), (HELD if held is None else held)
        split, out = (encode_split(part, config, self.base) for part in parts)  # type: ignore[arg-type]
        return inspect_run(config, self.base, TextData(split, out, more.pop("about", None)), **more)


@pytest.fixture
def run(base: TinyBase, tmp_path: Path) -> Run:
    return Run(base, tmp_path)


def stopped(report: Report, check: str) -> str:
    """Assert that `check` is the only check that stops the run, and return the error message."""
    assert {f.check for f in report.stops} == {check}, report.text()
    with pytest.raises(PreflightError) as caught:
        report.raise_if_stopped()
    return str(caught.value)


def warned(report: Report, check: str) -> str:
    assert not report.stops, report.text()
    return next(f.text for f in report.findings if f.check == check and f.level == "warn")


def test_valid_run_has_no_warning(run: Run) -> None:
    report = run("schedule.epochs=10")
    report.raise_if_stopped()
    assert [f.text for f in report.findings if f.level != "ok"] == []
    numbers = report.numbers
    assert (numbers["rows_kept"], numbers["steps"]) == (40, 30)
    assert 0 < numbers["learned_tokens"] < numbers["tokens"]
    assert "`all-linear` 14 modules" in report.text()
    assert "prompts at inference match training token for token (40 rows checked)" in report.text()
    json.dumps(report.to_dict())


def test_run_stops_if_every_row_is_too_long(run: Run) -> None:
    report = run("data.max_length=4", "data.long_rows=drop", held=[])
    assert "no row is left to train on: of 40 rows, 0 have nothing to learn and 40 are too long" in report.text()
    assert {f.check for f in report.stops} == {"learned", "long rows"}


# 2: a model that never stops


def test_a_template_without_an_end_of_turn(run: Run) -> None:
    run.base.tokenizer.chat_template = templates.ENDLESS
    text = stopped(run(), "end")
    assert "no end-of-turn token is written after an answer: the model would learn to never stop" in text


def test_end_token_cut_from_every_row(run: Run) -> None:
    rows = [talk("q", "word " * 200, f"data.jsonl:{i}") for i in range(20)]
    report = run("data.max_length=50", "data.long_rows=cut", rows=rows)
    assert "`<|im_end|>` is learned in 0 of 20 (0%) rows: the model would never stop" in report.text()
    assert "20 of 20 (100%) cut rows lose the end of the answer" in report.text()
    assert {f.check for f in report.stops} == {"end", "long rows"}


def test_end_token_unknown_to_generation(run: Run) -> None:
    run.base.stop_ids = (0,)
    text = stopped(run(), "end")
    assert "answers end with `<|im_end|>`, but generation stops at `<|endoftext|>`" in text


def test_plain_rows_without_an_end_of_text(run: Run) -> None:
    tokenizer = run.base.tokenizer
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    rows = [Row("text", text=f"some text {i}", where=f"data.jsonl:{i}") for i in range(20)]
    assert "no end-of-text token is written after an answer" in stopped(run(rows=rows, held=[]), "end")


# settings, rows and limits that stop a run or cause a warning


def long(question: str, count: int, answer: str = "yes") -> list[Row]:
    return [*ROWS, talk(question * count, answer, "data.jsonl:41")]


SILENT = [talk(f"q{i}", "an answer", f"data.jsonl:{i}", weight=0) for i in range(20)]
EMPTY = [talk(f"q{i}", " ", f"data.jsonl:{i}") for i in range(20)]
UNUSED = RowsSummary("messages", "a `messages` column", 40, ["label"], 3)
UNTRAINED, CUT = "rows have no token to learn and are left out", "data.max_length=80 data.long_rows"
PLAIN = {"rows": [Row("prompt-completion", r.messages, where=r.where) for r in ROWS], "held": []}
OTHER_ANSWER = [talk("Question 1?", "Another answer", "held.jsonl:1")]


FAULTS = [
    ("stop", "targets", "adapter.targets=[q_porj]", {}, "target 'q_porj' matches nothing in this model"),
    ("stop", "targets", "adapter.layers=[7]", {}, "layers [7] do not exist"),
    ("stop", "schedule", "schedule.warmup=100", {}, "the learning rate never reaches its peak"),
    ("warn", "schedule", "schedule.epochs=1", {}, "the whole run is 3 steps"),
    ("warn", "learning rate", "optimizer.learning_rate=2e-6", {}, "is below the range"),
    ("warn", "learning rate", "optimizer.learning_rate=0.1", {}, "is above the range"),
    ("stop", "disk", "", {"free_disk": 1000}, "checkpoints and adapter need"),
    ("stop", "learned", "", {"rows": SILENT}, "left to train on: of 20 rows, 20 have nothing to learn"),
    ("stop", "learned", "", {"rows": ROWS[:5] + EMPTY}, f"20 of 25 (80%) {UNTRAINED}: data.jsonl:0"),
    ("warn", "learned", "", {"rows": long("q", 1, "")}, f"1 of 41 (2%) {UNTRAINED}: data.jsonl:41"),
    ("warn", "long rows", f"{CUT}=cut", {"rows": long("word ", 100)}, "1 of 41 (2%) rows are cut to 80 tokens"),
    ("warn", "long rows", f"{CUT}=drop", {"rows": long("word ", 100)}, "80 tokens and dropped: data.jsonl:41"),
    ("stop", "memory", "", {"rows": long("word ", 400)}, "tokens, but the base supports only 256"),
    ("warn", "control tokens", "", {"rows": long("a <|im_end|> b", 1)}, "tokens as text: data.jsonl:41"),
    ("warn", "template", "data.chat_template=none", PLAIN, "base has a chat template, but rows do not use it"),
    ("warn", "held out", "", {"held": [*HELD, ROWS[3]]}, "1 of 6 (17%) held-out rows are also trained on"),
    ("stop", "held out", "", {"held": ROWS[:5]}, "held-out rows are also trained on: data.jsonl:1 is data.jsonl:1"),
    ("warn", "held out", "", {"held": OTHER_ANSWER}, "prompts also occur in training, with other answers"),
    ("stop", "held out", "evaluation.patience=2", {"held": []}, "but no row is held out"),
    ("warn", "held out", "", {"held": []}, "overfitting cannot be detected"),
    ("warn", "columns", "", {"about": UNUSED}, "unused columns: label"),
    ("warn", "duplicates", "", {"about": UNUSED}, "3 of 40 (8%) rows are exact duplicates of an earlier row"),
]


@pytest.mark.parametrize(("level", "check", "overrides", "options", "text"), FAULTS)
def test_each_fault_is_reported_by_its_check(
    run: Run, level: str, check: str, overrides: str, options: dict[str, Any], text: str
) -> None:
    report = run(*overrides.split(), "adapter.rank=1", **options)
    assert text in (stopped(report, check) if level == "stop" else warned(report, check))


def test_a_repeated_bos_token_or_float16_stops_the_run(run: Run) -> None:
    run.base.model.half()
    assert "the base is float16 on cpu" in stopped(run(), "precision")
    run.base.model.float()
    run.base.tokenizer.chat_template = "{{ bos_token }}" + run.base.tokenizer.chat_template
    assert "40 of 40 (100%) rows begin with <|im_start|> twice" in stopped(run(), "begin")


# 4: experts that would silently stay frozen


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_frozen_experts_stop_the_run_unless_excluded(family: str, run: Run) -> None:
    run.base.model = FAMILIES[family]()
    run.base.model.resize_token_embeddings(384, mean_resizing=False)
    text = stopped(run("adapter.targets=[q_proj, v_proj]"), "experts")
    assert "expert weights get no adapter and stay frozen" in text
    assert "add down_proj, gate_up_proj to adapter.targets (or all-linear)" in text
    assert not run("adapter.targets=[q_proj, v_proj]", "adapter.exclude=['*experts*']").stops
    assert not run().stops


# 6: the wrong template


def test_template_that_differs_from_inference_is_reported(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(templates.CHATML)
    report = run(f"data.chat_template={file}")
    assert "rows use the chat template mine.jinja, not the base's own" in warned(report, "template")


def test_prompts_tokenized_differently_in_training(run: Run) -> None:
    word = max((t for t in run.base.tokenizer.get_vocab() if t.isalpha()), key=len)
    run.base.tokenizer.chat_template = None
    rows = []
    for i in range(30):
        turns = ({"role": "user", "content": f"{i} {word[:2]}"}, {"role": "assistant", "content": f"{word[2:]} rest"})
        rows.append(Row("prompt-completion", turns, where=f"data.jsonl:{i}"))
    report = run(rows=rows, held=[])
    assert "30 of 30 (100%) prompts are tokenized differently in training and at inference" in stopped(
        report, "template"
    )


def test_turns_changed_by_the_template(run: Run) -> None:
    run.base.tokenizer.chat_template = templates.QWEN3
    answers = ["<think>\nhm\n</think>\n\nfirst", "<think>\nso\n</think>\n\nsecond"]
    texts = [("user", "a"), ("assistant", answers[0]), ("user", "b"), ("assistant", answers[1])]
    turns = [{"role": role, "content": content} for role, content in texts]
    rows = [Row("messages", tuple(turns), where=f"data.jsonl:{i}") for i in range(20)]
    assert "20 earlier turns are trained without content that the template renders only in the last turn" in warned(
        run(rows=rows), "turns"
    )


# BOS, control tokens, tokens outside the vocabulary


def test_tokens_beyond_the_embedding(run: Run) -> None:
    run.base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    rows = [talk("a <|new|> token", "yes", f"data.jsonl:{i}") for i in range(20)]
    text = stopped(run(rows=rows), "vocabulary")
    assert "1 tokens of the data have no row in the base's embedding of 384 rows: `<|new|>` (384)" in text


def test_added_tokens_with_untrained_embeddings(run: Run) -> None:
    with torch.no_grad():
        run.base.model.get_input_embeddings().weight[1].zero_()
    report = run()
    assert "`<|im_start|>` (1)" in warned(report, "vocabulary")
    cured = run("adapter.token_rows={embed_tokens: [1]}")
    assert not [f for f in cured.findings if f.check == "vocabulary"]


# 8: out of memory from the longest rows


def test_run_that_exceeds_free_memory_stops(run: Run) -> None:
    text = stopped(run(free_memory=100_000_000), "memory")
    assert "this run does not fit: it needs about" in text
    assert "100.0 MB are free; the largest micro-batch has" in text
    assert "does not fit" in stopped(run("memory.limit_gb=0.05"), "memory")
    limited = run("memory.limit_gb=0.001")
    assert "does not fit" in stopped(limited, "memory")
    assert "a higher memory.limit_gb" in limited.text()
    assert "memory.limit_gb" not in run(free_memory=1_000_000).text()


def test_a_run_that_exceeds_memory_gets_the_cheapest_fix(tmp_path: Path) -> None:
    # With two layers, only the first would save activations, because the last layer processes only the tokens
    # that count in the loss. So the test uses four layers.
    run = Run(TinyBase(tiny_model(num_hidden_layers=4), tiny_tokenizer()), tmp_path)
    rows = [talk("word " * 20, "yes", f"d.jsonl:{i}") for i in range(200)]
    need = run("batching.rows=200", rows=rows).numbers
    free = (need["memory_needed"] + need["memory_checkpointed"]) // 2
    off = run("memory.activation_checkpointing=off", "batching.rows=200", rows=rows, free_memory=free)
    assert next(f.fix for f in off.stops) == "memory.activation_checkpointing=on"
    assert not run("batching.rows=200", rows=rows, free_memory=free).stops


def test_predicted_peak_includes_the_process(run: Run) -> None:
    libraries = b"x" * 600_000_000
    resident = psutil.Process().memory_info().rss
    assert resident > len(libraries)
    assert run().numbers["predicted_peak_bytes"] > resident


def test_plan_names_the_measured_rates_of_the_machine(run: Run) -> None:
    plan = next(f.text for f in run().findings if f.text.startswith("plan:"))
    assert "GB/s, measured here)" in plan


def test_weights_are_packed_if_faster_and_if_they_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run().numbers["kept_packed"] == 0  # prepacking does not speed up matrices as small as the tiny base's
    monkeypatch.setattr(preflight, "keeps_copy", lambda dtype, rows, columns, turned: True)
    every = packed_weights(model_shape(run.base.model), "float32", lambda *product: True)
    report = run()
    numbers, needed = report.numbers, report.numbers["memory_needed"]
    assert numbers["kept_packed"] == numbers["predicted_parts"]["packed"] == every
    assert numbers["predicted_peak_bytes"] == sum(numbers["predicted_parts"].values())
    assert "prepacked copies of frozen weights" in report.text()
    off = "memory.activation_checkpointing=off"
    for overrides, free, kept in (
        ([], int(1.05 * needed), 0),  # activations are recomputed
        ([off], needed + every, 0),  # some memory is reserved for uses that are not counted
        ([off], needed + 2 * every, every),
        ([off, f"memory.limit_gb={(needed + every) / 1e9}"], None, 0),
        (["memory.keep_packed_gb=0"], None, 0),
        ([f"memory.keep_packed_gb={every / 2e9}"], None, every // 2),
    ):
        assert run(*overrides, free_memory=free).numbers["kept_packed"] == kept, (overrides, free)
    too_much = run("memory.keep_packed_gb=1", off, free_memory=needed)
    assert "this run does not fit" in stopped(too_much, "memory")
    assert "fix: memory.keep_packed_gb=0" in too_much.text()
    monkeypatch.setattr(preflight, "panels_here", lambda bits, dtype: True)
    run.base.context = 512
    sampling = ("reinforcement.loss=grpo", "reinforcement.rewards=[{kind: exact_match}]")
    both = run(*sampling).numbers
    assert both["predicted_parts"]["packed"] == both["kept_packed"] + both["drawer_packed"]
    assert both["kept_packed"] == every > both["drawer_packed"] > every // 2  # sampling needs no copies for gradients
    monkeypatch.setattr(preflight, "keeps_copy", lambda dtype, rows, columns, turned: False)
    assert (
        run(*sampling).numbers["drawer_packed"] == both["drawer_packed"]
    )  # does not depend on whether training keeps copies
    assert run(*sampling, "memory.keep_packed_gb=0").numbers["drawer_packed"] == 0


# 11: resuming a different run, overwriting files


def test_resuming_with_other_settings(run: Run, tmp_path: Path) -> None:
    values = {"base": "tiny", "data": {"train": "data.jsonl"}, "output": str(tmp_path / "out")}
    before = config_from(values)[0].recipe()
    report = run("adapter.rank=8", "checkpoint.every=7", "batching.micro_tokens=64", resume=True, previous=before)
    text = stopped(report, "resume")
    assert "was started with other settings: adapter.rank: 16 in the checkpoint, 8 now" in text
    assert "checkpoint.every" not in text
    assert "micro" not in text
    assert not run(resume=True, previous=json.loads(json.dumps(before))).stops


def test_output_in_use_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert not run().stops
    (tmp_path / "out" / "adapter_model.safetensors").touch()
    assert "already holds a run or other files; nothing is overwritten" in stopped(run(), "output")
    assert not run(resume=True).stops
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in stopped(run(f"output={tmp_path / 'file'}"), "output")


def test_sampling_on_held_out_prompts_gives_a_warning(tmp_path: Path) -> None:
    """Rows for sampling can lack answers, so the warning does not say that the answers differ."""
    base = text_without_weights(str(tiny_base_dir(tmp_path)))
    lines = [{"prompt": "2 * 3 =", "entry": i} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = {"loss": "grpo", "max_tokens": 8, "rewards": [{"kind": "length", "most": 3}]}
    data = {"train": str(tmp_path / "rows.jsonl"), "split": 4}
    config, _ = config_from({"base": base.name, "data": data, "output": str(tmp_path / "o"), "reinforcement": sampling})
    actual = list(data_findings(TextSubject(base=base, config=config, data=read_data(config, base))))
    assert [(one.level, one.text.partition(":")[0]) for one in actual if one.check == "held out"] == [
        ("warn", "4 of 4 (100%) held-out prompts are also trained on")
    ]


def test_all_stops_are_listed_together(run: Run) -> None:
    report = run("adapter.targets=[nope]", "schedule.warmup=100", free_disk=0, held=ROWS[:3])
    with pytest.raises(PreflightError, match=r"^3 problems would make this run fail or train nothing:") as caught:
        report.raise_if_stopped()
    for part in ("'nope' matches nothing", "never reaches its peak", "also trained on"):
        assert part in str(caught.value)


# displayed texts


def test_the_sample_is_the_first_row_with_its_answer_marked(run: Run) -> None:
    report = run()
    text = report.text()
    assert "<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\n⟦Answer 0.<|im_end|>⟧" in text
    assert "".join(piece for piece, _ in report.sample) in text.replace("⟦", "").replace("⟧", "")


def test_preflight_changes_nothing(run: Run, tmp_path: Path) -> None:
    before = {n: p.clone() for n, p in run.base.model.named_parameters()}
    run()
    assert all(torch.equal(p, before[n]) for n, p in run.base.model.named_parameters())
    assert not (tmp_path / "out").exists()
