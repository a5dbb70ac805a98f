from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import DataError
from veneer.train.config.text import preference_formats
from veneer.train.text.rows import Row, data_digest, leakage, read_rows, split_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def wrong(source: str | list[str], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, **settings)
    return str(caught.value)


ROW_FORMATS = [
    ({"messages": TURNS}, "messages", TURNS),
    ({"conversations": TURNS}, "sharegpt", TURNS),
    ({"conversations": SHAREGPT}, "sharegpt", TURNS),
    ({"conversations": SHAREGPT, "system": "S"}, "sharegpt", [{"role": "system", "content": "S"}, *TURNS]),
    ({"messages": json.dumps(TURNS)}, "messages", TURNS),
    ({"messages": TURNS, "id": 3, "text": "x"}, "messages", TURNS),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion", TURNS),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt-completion", TURNS),
    ({"prompt": "Hi", "response": "Hello"}, "prompt-completion", TURNS),
    ({"question": "Hi", "answer": "Hello"}, "prompt-completion", TURNS),
    ({"instruction": "Hi", "output": "Hello"}, "instruction", TURNS),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction", TURNS),
    ({"text": "Once upon a time"}, "text", []),
]


@pytest.mark.parametrize(("row", "format", "messages"), ROW_FORMATS)
def test_formats_are_detected_by_columns(tmp_path: Path, row: dict[str, Any], format: str, messages: list[Any]) -> None:
    rows, about = read_rows(jsonl(tmp_path, [row, row]))
    assert about.format == format
    assert list(rows[0].messages) == messages
    assert about.duplicates == 1
    assert rows[1].where.endswith("rows.jsonl:2")


def test_instruction_and_input_are_one_user_turn(tmp_path: Path) -> None:
    rows, _ = read_rows(jsonl(tmp_path, [{"instruction": "Sort", "input": "b a", "output": "a b", "system": "S"}]))
    assert [m["content"] for m in rows[0].messages] == ["S", "Sort\n\nb a", "a b"]
    assert rows[0].instruction == ("S", "Sort", "b a", "a b")


def test_renamed_and_unused_columns_are_reported(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"text": "card lost", "category": "lost_card", "id": 1}])
    rows, about = read_rows(file, columns={"prompt": "text", "completion": "category"})
    assert about.format == "prompt-completion"
    assert "`text` as prompt" in about.why
    assert about.unused == ["id"]
    assert [m["content"] for m in rows[0].messages] == ["card lost", "lost_card"]
    assert read_rows(file)[1].unused == ["category", "id"]


def test_parquet_conversations_and_their_missing_keys(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": [TURNS[0], {**TURNS[1], "weight": 1}]}]), file)
    rows, _ = read_rows(str(file))
    assert list(rows[0].messages) == [TURNS[0], {**TURNS[1], "weight": 1}]


FAULTY_ROWS = [
    ({"messages": "Hi"}, "`messages` should be a list of messages, found text"),
    ({"messages": []}, "`messages` is an empty list"),
    ({"messages": ["Hi"]}, "`messages[0]` should be a mapping with role and content, found text"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "`messages[0].role` is 'usr' (did you mean `user`?)"),
    ({"messages": [{"content": "x"}]}, "`messages[0]` has no role"),
    ({"messages": [{"role": "user", "content": 3}]}, "`messages[0].content` should be text, found a number"),
    ({"messages": [{"role": "user"}]}, "`messages[0].content` should be text, found nothing"),
    ({"messages": [{**TURNS[1], "weight": 0.5}]}, "`messages[0].weight` is 0.5; it can be 0 (not learned) or 1"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "`messages[0].content` has a part that is not text (image_url)",
    ),
    ({"mesages": TURNS}, "no `messages`; did you mean `mesages`?"),
]


@pytest.mark.parametrize(("row", "says"), FAULTY_ROWS)
def test_unusable_rows_say_why(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    text = wrong(jsonl(tmp_path, [{"messages": TURNS}, row]))
    assert text.startswith("1 of 2 rows are not usable as `messages`")
    assert "rows.jsonl:2: " in text
    assert says in text


UNUSABLE_ROWS = [
    ({"conversations": [{"from": "alien", "value": "x"}]}, "`conversations[0].from` is 'alien'; known roles are human"),
    ({"conversations": [{"from": "human", "value": None}]}, "`conversations[0].value` should be text, found nothing"),
    ({"prompt": "a", "completion": ["x"]}, "`completion` should be text, found a list"),
    ({"prompt": "  ", "completion": "x"}, "`prompt` is empty"),
    ({"text": ""}, "`text` is empty"),
    ({"prompt": "a", "completion": math.nan}, "`completion` is nan, which means a missing value in tables"),
]


@pytest.mark.parametrize(("row", "says"), UNUSABLE_ROWS)
def test_unusable_rows_of_other_formats(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    assert says in wrong(jsonl(tmp_path, [row]))


def test_unrecognized_columns_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"frage": "a", "antwort": "b"}])
    assert "the format cannot be recognised: the columns are frage, antwort" in wrong(file)
    assert "did you mean `frage`?" in wrong(file, columns={"prompt": "frag", "completion": "antwort"})
    assert "data.columns names `promt`, which no format has; did you mean `prompt`?" in wrong(
        file, columns={"promt": "frage"}
    )
    text = wrong(file, format="instruction")
    assert "data.format is `instruction`, but there is no column `instruction` or `output`" in text
    assert read_rows(file, columns={"prompt": "frage", "completion": "antwort"})[1].format == "prompt-completion"


def text_rows(n: int) -> list[Row]:
    return [Row("text", text=f"row {i}", where=str(i)) for i in range(n)]


@given(st.integers(2, 60), st.integers(0, 9), st.randoms(use_true_random=False), st.data())
@settings(max_examples=60, deadline=None)
def test_a_split_is_exact_and_independent_of_order(n: int, seed: int, rng: random.Random, draw: st.DataObject) -> None:
    rows = text_rows(n)
    count = draw.draw(st.integers(0, n - 1))
    train, validation = split_rows(rows, count, seed=seed)
    assert len(validation) == count
    assert sorted(r.text for r in train + validation) == sorted(r.text for r in rows)
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert {r.text for r in split_rows(shuffled, count, seed=seed)[1]} == {r.text for r in validation}


def test_identical_rows_stay_on_one_side() -> None:
    rows = [Row("text", text=f"row {i % 10}", where=str(i)) for i in range(100)]
    for seed in range(5):
        train, validation = split_rows(rows, 0.3, seed=seed)
        assert not leakage(train, validation)[0]
        assert len(validation) == 30


def test_split_can_be_a_share_a_count_or_default() -> None:
    assert len(split_rows(text_rows(100), 0.2, seed=0)[1]) == 20
    assert len(split_rows(text_rows(100), None, seed=0)[1]) == 5
    assert len(split_rows(text_rows(5), None, seed=0)[1]) == 0
    assert split_rows(text_rows(5), 0, seed=0)[1] == []
    assert {r.text for r in split_rows(text_rows(100), 10, seed=0)[1]} != {
        r.text for r in split_rows(text_rows(100), 10, seed=1)[1]
    }
    with pytest.raises(DataError, match="nothing is left to train on"):
        split_rows(text_rows(5), 5, seed=0)


def test_leakage_counts_rows_and_prompts() -> None:
    def row(question: str, answer: str, where: str) -> Row:
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Row("messages", turns, where=where)

    train = [row("a", "1", "t:1"), row("b", "2", "t:2")]
    held_out = [row("a", "1", "v:1"), row("b", "3", "v:2"), row("c", "4", "v:3")]
    assert leakage(train, held_out) == (["v:1 is t:1"], ["v:2 is t:2"])


def test_digest_depends_only_on_content(tmp_path: Path) -> None:
    one, _ = read_rows(jsonl(tmp_path, [{"text": "a"}, {"text": "b"}], "one.jsonl"))
    two, _ = read_rows(jsonl(tmp_path, [{"text": "a", "id": 1}, {"text": "b", "id": 2}], "two.jsonl"))
    other, _ = read_rows(jsonl(tmp_path, [{"text": "b"}, {"text": "a"}], "three.jsonl"))
    assert data_digest(one) == data_digest(two) != data_digest(other)


# --- preferences ------------------------------------------------------------------------------------------------------

PREFERENCES = preference_formats("kto")
BYE = {"role": "assistant", "content": "Bye"}


PAIRS = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [BYE]},
    {"prompt": TURNS[:1], "chosen": "Hello", "rejected": "Bye"},
    {"prompt": "Hi", "chosen": TURNS[1:], "rejected": [BYE]},
    {"chosen": TURNS, "rejected": [TURNS[0], BYE]},
    {"prompt": "Hi", "chosen": TURNS, "rejected": [TURNS[0], BYE]},
    {"prompt": json.dumps(TURNS[:1]), "chosen": json.dumps(TURNS[1:]), "rejected": json.dumps([BYE])},
]


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_pairs_are_read_in_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    for formats in (None, PREFERENCES):
        (rows,), about = read_rows(jsonl(tmp_path, [row]), formats=formats)
        assert about.format == "preference"
        assert about.unused == []
        assert list(rows.messages) == TURNS
        assert list(rows.rejected) == [TURNS[0], BYE]
        assert rows.shared() == 1
        assert rows.format == (
            "prompt-completion" if isinstance(row.get("chosen"), str) and row["prompt"] == "Hi" else "messages"
        )


def test_pairs_are_read_from_renamed_columns(tmp_path: Path) -> None:
    source = jsonl(tmp_path, [{"q": "Hi", "good": "Hello", "bad": "Bye", "messages": TURNS, "score": 3}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (row,), about = read_rows(source, columns=columns, formats=PREFERENCES)
    assert row.rejected[-1] == BYE
    assert about.unused == ["messages", "score"]


INVALID_PAIRS = [
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "are the same"),
    ({"chosen": "Hello", "rejected": "Bye"}, "`prompt` is required if `chosen` is text"),
    ({"chosen": [BYE], "rejected": TURNS}, "do not begin with the same prompt"),
    ({"chosen": TURNS, "rejected": [*TURNS, *TURNS]}, "is the beginning of the other"),
    ({"prompt": "", "chosen": "Hello", "rejected": "Bye"}, "`prompt` is empty"),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": {"a": 1}}, "`rejected` should be text"),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": None}, "no `rejected`"),
]


@pytest.mark.parametrize(("row", "message"), INVALID_PAIRS, ids=lambda value: value if isinstance(value, str) else None)
def test_invalid_pairs_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}
    text = wrong(jsonl(tmp_path, [good, row]), formats=PREFERENCES)
    assert message in text
    assert "rows.jsonl:2" in text


def test_judged_answers_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": [*TURNS, TURNS[0]], "completion": [BYE], "label": False},
    ]
    parsed, about = read_rows(jsonl(tmp_path, rows), formats=PREFERENCES)
    assert about.format == "unpaired-preference"
    assert [r.label for r in parsed] == [True, False]
    # assistant turns in the prompt do not count in the loss
    assert [m.get("weight") for m in parsed[1].messages] == [None, 0, None, None]
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nHi,Hello,TRUE\nHi,Bye,false\n")
    parsed, _ = read_rows(str(tmp_path / "rows.csv"), formats=PREFERENCES)
    assert [r.label for r in parsed] == [True, False]
    assert "`label` should be true" in wrong(jsonl(tmp_path, [rows[0] | {"label": 3}]), formats=PREFERENCES)
    # a supervised run trains on these rows and reports that the label is unused
    _, about = read_rows(jsonl(tmp_path, rows[:1]))
    assert (about.format, about.unused) == ("prompt-completion", ["label"])


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_openai_rows_with_tools(tmp_path: Path) -> None:
    """The row is the example of OpenAI's guide to function calling, with a second answer."""
    result = {"role": "tool", "tool_call_id": "c1", "content": "21"}
    row = {"messages": [TURNS[0], CALLS, result, TURNS[1]], "parallel_tool_calls": False, "tools": [TOOL]}
    (rows,), about = read_rows(jsonl(tmp_path, [row]))
    assert (about.format, about.unused) == ("messages", [])
    assert list(rows.messages) == [TURNS[0], {**CALLS, "content": ""}, result, TURNS[1]]
    assert rows.tools == (TOOL,)


def test_openai_pairs(tmp_path: Path) -> None:
    """The row is the example of OpenAI's guide to preference training. Assistant turns in the prompt do not count
    in the loss."""
    earlier = [TURNS[0], BYE, {"role": "user", "content": "Really?"}]
    row = {
        "input": {"messages": earlier, "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [TURNS[1]],
        "non_preferred_output": [CALLS],
    }
    for options in ({"formats": PREFERENCES}, {"format": "openai-preference"}, {}):
        (rows,), about = read_rows(jsonl(tmp_path, [row]), **options)  # type: ignore[arg-type]
        assert about.format == "openai-preference"
        prompt = [earlier[0], {**BYE, "weight": 0}, earlier[2]]
        assert list(rows.messages) == [*prompt, TURNS[1]]
        assert list(rows.rejected) == [*prompt, {**CALLS, "content": ""}]
        assert (rows.shared(), rows.tools) == (3, (TOOL,))


INVALID_TOOL_CALLS = [
    ({"messages": [{**TURNS[0], "tool_calls": [CALL]}]}, "is only allowed for the assistant"),
    ({"messages": [{**CALLS, "tool_calls": []}]}, "should be a list of calls, found an empty list"),
    ({"messages": [{**CALLS, "tool_calls": [{"function": {}}]}]}, "`messages[0].tool_calls[0]` has no function"),
    (
        {"messages": [{**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "{city"}}]}]},
        "`messages[0].tool_calls[0].function.arguments` is not a JSON object: '{city'",
    ),
    ({"messages": [{**TURNS[1], "function_call": {"name": "f"}}]}, "the old form of tool_calls"),
    ({"messages": TURNS, "tools": "weather"}, "`tools` is not a list"),
]


@pytest.mark.parametrize(("row", "says"), INVALID_TOOL_CALLS)
def test_invalid_tool_calls_are_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    text = wrong(jsonl(tmp_path, [{"messages": TURNS}, row]))
    assert "rows.jsonl:2: " in text
    assert says in text


INVALID_OPENAI_PAIRS = [
    ({"input": TURNS}, "`input` should be a mapping"),
    ({"input": {}}, "`input.messages` should be a list"),
    ({"preferred_output": [BYE]}, "are the same"),
    ({"non_preferred_output": "Bye"}, "`non_preferred_output` should be a list"),
]


@pytest.mark.parametrize(("change", "says"), INVALID_OPENAI_PAIRS)
def test_invalid_openai_pairs_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    good = {"input": {"messages": TURNS[:1]}, "preferred_output": [TURNS[1]], "non_preferred_output": [BYE]}
    text = wrong(jsonl(tmp_path, [good, good | change]), formats=PREFERENCES)
    assert "rows.jsonl:2: " in text
    assert says in text
