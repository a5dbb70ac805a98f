"""OpenAI's prompt templates."""

from __future__ import annotations

import time

import pytest

from veneer.train.rewards.reward import Answer
from veneer.train.rewards.template import MAX_FILLED, NoValue, TextTooLong, filled, template_problem, template_sample

SAMPLE = template_sample(Answer([{"role": "user", "content": "how many?"}], '{"total": 3, "rows": [{"a": "x"}]}'))
ITEM = {"city": "Bern", "tags": ["a", "b"], "n": 2.5, "dash-ed": True, "trap": "{{ sample.output_text }}"}


TEMPLATES = [
    ("{{ item.city }} {{item.n}}", "Bern 2.5"), ("{{ sample.output_json.total }}", "3"),
    ("{{ sample.output_json.rows[0].a }}{{ item.tags.1 }}", "xb"), ("{{ item.tags }}", '["a", "b"]'),
    ("{{ item.dash-ed }}", "true"), ("{{ item.trap }}", "{{ sample.output_text }}"),
    ("{ } no {place}", "{ } no {place}"),
    ("{{ sample.input_text }}", "how many?"), ("{{ sample.choices[0].message.role }}", "assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "text"), TEMPLATES)
def test_paths_are_replaced(template: str, text: str) -> None:
    assert template_problem(template) == ""
    assert filled(template, SAMPLE, ITEM) == text


@pytest.mark.parametrize(
    ("template", "of_sample"),
    [("{{ item.town }}", False), ("{{ item.tags[2] }}", False), ("{{ sample.output_json.missing }}", True)],
)
def test_missing_path_names_sample_or_item(template: str, of_sample: bool) -> None:
    with pytest.raises(NoValue) as caught:
        filled(template, SAMPLE, ITEM)
    assert caught.value.of_sample is of_sample


def test_non_json_answer_has_no_output_json() -> None:
    with pytest.raises(NoValue, match="output_json"):
        filled("{{ sample.output_json }}", template_sample(Answer([], "well")), {})


INVALID_TEMPLATES = [
    ("{{ items.x }}", "not a path"), ("{{ sample.output_txt }}", "sample has no 'output_txt'; it has output_text"),
    ("{{ item }}", "not a path"), ("{{ item.x | upper }}", "not a path"), ("{{ 1 + 1 }}", "not a path"),
    ("{{ item.x ", "no matching }}"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "message"), INVALID_TEMPLATES)
def test_invalid_templates_are_described(template: str, message: str) -> None:
    assert message in template_problem(template)


def test_braces_without_an_end_take_linear_time() -> None:
    """With a hundred thousand braces, an algorithm of quadratic time would take minutes."""
    began = time.process_time()
    assert "no matching }}" in template_problem("{{" * 50_000)
    assert time.process_time() - began < 1


def test_a_filled_template_has_a_length_limit() -> None:
    item = {"a": "x" * 1000, "b": [1]}
    assert len(filled("{{ item.a }}" * 3, {}, item, 3000)) == 3000
    with pytest.raises(TextTooLong, match="more than 2,999 characters"):
        filled("{{ item.a }}" * 3, {}, item, 2999)
    with pytest.raises(TextTooLong):
        filled("{{ item.a }}" * (MAX_FILLED // 1000 + 1), {}, item)
    with pytest.raises(NoValue):
        filled(f"{{{{ item.b[{'9' * 5000}] }}}}", {}, item)
