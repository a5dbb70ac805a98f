"""Sample completions on cards: answers of the base and of the saved adapter to a held-out prompt."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import tiny_base_dir
from veneer.adapters.use import load_adapter
from veneer.core.attach import attach
from veneer.formats.card import read_card
from veneer.library.describe_files import card_prompt, card_sample
from veneer.models.text.base import TextBase, load_text
from veneer.models.text.generate import complete
from veneer.train.config.load import config_from
from veneer.train.config.text import EvaluationSection
from veneer.train.text.task import run_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TextBase:
    return load_text(str(tiny_base_dir(tmp_path_factory.mktemp("base"))), dtype="float32")


def trained(base: TextBase, folder: Path, **evaluation: Any) -> Path:
    texts = [("Be brief.", f"What is {n}?", f"It is {n}.") for n in range(12)]
    turns = [zip(("system", "user", "assistant"), each, strict=True) for each in texts]
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(folder / "rows.jsonl"), "split": 4}
    values = {"base": {"name": str(base.name)}, "data": data, "output": str(folder / "out"), "schedule": {"steps": 2}}
    values |= {"optimizer": {"learning_rate": 1e-2}, "evaluation": {"keep": "last", **evaluation}}
    config, _ = config_from(values)
    run_text(config, base=base, on_event=lambda event: None)
    return folder / "out"


def test_card_has_both_answers_to_a_held_out_prompt(base: TextBase, tmp_path: Path) -> None:
    folder = trained(base, tmp_path, sample=5)
    sample = card_sample(read_card(folder).card.to_dict())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": sample["prompt"]}]
    assert complete(base, [messages], max_new_tokens=5)[0].text == sample["base"]
    with attach(base.model) as attachment:
        attachment.add("it", load_adapter(base, str(folder)))
        attachment.use("it")
        assert complete(base, [messages], max_new_tokens=5)[0].text == sample["adapter"]


def test_the_card_keeps_the_prompt_with_its_system_message(base: TextBase, tmp_path: Path) -> None:
    folder = trained(base, tmp_path)
    system, question = card_prompt(read_card(folder).card.to_dict())
    assert system == {"role": "system", "content": "Be brief."}
    assert question["role"] == "user"
    assert question["content"] in [f"What is {n}?" for n in range(12)]
    for file in ("README.md", "report.html"):
        text = html.unescape((folder / file).read_text())
        assert f"veneer generate '{question['content']}'" in text
        assert "--system 'Be brief.'" in text


def test_run_without_samples_saves_no_prompt(base: TextBase, tmp_path: Path) -> None:
    assert card_prompt(read_card(trained(base, tmp_path, sample=0)).card.to_dict()) == []


def test_short_runs_save_no_sample_by_default(base: TextBase, tmp_path: Path) -> None:
    assert card_sample(read_card(trained(base, tmp_path)).card.to_dict()) is None
    assert [EvaluationSection().sample_tokens(steps) > 0 for steps in (99, 100)] == [False, True]
    assert EvaluationSection(sample=0).sample_tokens(1000) == 0
