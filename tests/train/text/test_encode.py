"""Loss masks and texts, checked by decoding the tokens that count in the loss, not by literal token ids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tiny_base import tiny_tokenizer
from tests.train import templates
from veneer.errors import BaseError, ConfigError, DataError
from veneer.models.text.base import TextBase
from veneer.models.text.generate import rendered
from veneer.train.config.text import DataSection
from veneer.train.text.encode import Example, encode_rows
from veneer.train.text.rows import Row

TOKENIZER = tiny_tokenizer()


def chat(*turns: str, system: str = "", weights: dict[int, int] | None = None) -> Row:
    """Return a row with alternating user and assistant turns."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(turns):
        messages.append({"role": "user" if i % 2 == 0 else "assistant", "content": text})
        if weights and i in weights:
            messages[-1]["weight"] = weights[i]
    return Row("messages", tuple(messages), where="data.jsonl:1")


def pair(prompt: str, completion: str) -> Row:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Row("prompt-completion", messages, where="data.jsonl:1")


def data(**values: Any) -> DataSection:
    return DataSection(train="data.jsonl", **values)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(example: Example, tokenizer: Any = TOKENIZER) -> list[str]:
    """Return the text of each run of consecutive tokens that count in the loss."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


def whole(example: Example, tokenizer: Any = TOKENIZER) -> str:
    return str(tokenizer.decode(example.input_ids))


def one(row: Row, tokenizer: Any = TOKENIZER, **values: Any) -> Example:
    return encode_rows([row], tokenizer, data(**values)).examples[0]


TALK = chat("Hello", "Hi there.", "How are you?", "Fine, thanks.")


TRAINED_ANSWERS = [
    ("assistant", ["Hi there.<|im_end|>", "Fine, thanks.<|im_end|>"]),
    ("last", ["Fine, thanks.<|im_end|>"]),
    ("completion", ["Fine, thanks.<|im_end|>"]),
]


@pytest.mark.parametrize(("train_on", "expected"), TRAINED_ANSWERS)
def test_answers_are_trained_with_their_end_of_turn(train_on: str, expected: list[str]) -> None:
    assert learned(one(TALK, train_on=train_on)) == expected


def test_train_on_all_trains_every_token_but_the_first() -> None:
    example = one(TALK, train_on="all")
    assert example.trained == [False] + [True] * (len(example.input_ids) - 1)


def test_train_on_completion_trains_all_answers_after_last_question() -> None:
    turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"), ("tool", "result")]
    turns.append(("assistant", "three"))
    row = Row("messages", tuple({"role": role, "content": content} for role, content in turns))
    assert learned(one(row, train_on="completion")) == ["two<|im_end|>", "three<|im_end|>"]
    assert learned(one(row, train_on="last")) == ["three<|im_end|>"]


def test_turn_with_weight_zero_is_never_trained() -> None:
    row = chat("Hello", "Bad answer", "Again", "Good answer", weights={1: 0, 3: 1})
    assert learned(one(row)) == ["Good answer<|im_end|>"]
    everything = learned(one(row, train_on="all"))
    assert "Bad answer" not in "".join(everything)
    assert "Good answer<|im_end|>" in everything[-1]


def test_text_is_the_template_up_to_the_last_target() -> None:
    text = TOKENIZER.apply_chat_template(list(TALK.messages), tokenize=False)
    example = one(TALK)
    assert whole(example) == text.rstrip("\n")
    assert example.input_ids == TOKENIZER(text, add_special_tokens=False)["input_ids"][: len(example.input_ids)]
    assert example.trained[-1]


def test_training_prompt_equals_inference_prompt() -> None:
    example = one(TALK, train_on="last")
    prompt = TOKENIZER.apply_chat_template(
        list(TALK.messages[:3]), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert example.input_ids[: example.trained.index(True)] == prompt


def test_stripped_thinking_turns_are_trained_as_rendered_and_counted() -> None:
    tokenizer = with_template(templates.QWEN3)
    row = chat("a", "<think>\nhm\n</think>\n\nfirst", "b", "<think>\nso\n</think>\n\nsecond")
    encoded = encode_rows([row], tokenizer, data())
    expected = ["first<|im_end|>", "<think>\nso\n</think>\n\nsecond<|im_end|>"]
    assert learned(encoded.examples[0], tokenizer) == expected
    assert encoded.counts.changed_turns == 1
    last = encode_rows([row], tokenizer, data(train_on="last"))
    assert learned(last.examples[0], tokenizer) == expected[1:]
    assert last.counts.changed_turns == 0


def test_end_of_text_after_the_conversation_is_not_trained() -> None:
    tokenizer = with_template(templates.PHI3)
    encoded = encode_rows([TALK], tokenizer, data())
    assert learned(encoded.examples[0], tokenizer) == ["Hi there.<|im_end|>", "Fine, thanks.<|im_end|>"]
    assert encoded.counts.changed_turns == 0
    assert encoded.end_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_without_generation_prompt() -> None:
    tokenizer = with_template(templates.MISTRAL)
    assert learned(one(TALK, tokenizer), tokenizer) == [" Hi there.<|im_end|>", " Fine, thanks.<|im_end|>"]


def test_moved_system_message_allows_only_training_the_last_turn() -> None:
    tokenizer = with_template(templates.MISTRAL)
    row = chat("Hello", "Hi there.", "How are you?", "Fine.", system="Be brief")
    with pytest.raises(DataError, match=r"data.jsonl:1: the chat template renders the text before message 2 differ"):
        encode_rows([row], tokenizer, data())
    assert learned(one(row, tokenizer, train_on="last"), tokenizer) == [" Fine.<|im_end|>"]


def test_generation_prompt_absent_from_training_is_refused() -> None:
    with pytest.raises(DataError, match="prompts of training and inference would differ"):
        encode_rows([TALK], with_template(templates.DISAGREES), data())


def test_rows_refused_by_the_template_are_listed() -> None:
    bad = Row("messages", ({"role": "assistant", "content": "x"},), where="data.jsonl:7")
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be encoded") as caught:
        encode_rows([TALK, bad], with_template(templates.MISTRAL), data())
    assert "data.jsonl:7: the chat template raises an error: roles must alternate" in str(caught.value)


def test_plain_prompt_and_completion_are_concatenated_and_ended() -> None:
    tokenizer = with_template(None)
    example = one(pair("Q: 2+2\nA:", " four"), tokenizer)
    assert whole(example, tokenizer) == "Q: 2+2\nA: four<|im_end|>"
    assert learned(example, tokenizer) == [" four<|im_end|>"]
    same = one(pair("Q: 2+2\nA:", " four"), TOKENIZER, chat_template="none")
    assert (same.input_ids, same.trained) == (example.input_ids, example.trained)


def test_instruction_rows_use_the_alpaca_prompt() -> None:
    tokenizer = with_template(None)
    messages = ({"role": "user", "content": "Sort\n\nb a"}, {"role": "assistant", "content": "a b"})
    example = one(Row("instruction", messages, instruction=("", "Sort", "b a", "a b")), tokenizer)
    assert learned(example, tokenizer) == ["a b<|im_end|>"]
    assert "### Instruction:\nSort\n\n### Input:\nb a\n\n### Response:\n" in whole(example, tokenizer)


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(BaseError, match="need a chat template, and this base has none"):
        encode_rows([TALK], with_template(None), data())
    with pytest.raises(BaseError, match=r"data\.chat_template is none"):
        encode_rows([TALK], TOKENIZER, data(chat_template="none"))


def test_a_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(templates.CHATML)
    assert "helpful AI" not in whole(one(TALK, chat_template=str(file)))
    with pytest.raises(ConfigError, match="cannot be read"):
        encode_rows([TALK], TOKENIZER, data(chat_template=str(tmp_path / "no.jinja")))


def test_text_rows_are_trained_completely_with_one_end_token() -> None:
    for text in ("Some plain text.", "Some plain text.<|im_end|>"):
        example = one(Row("text", text=text))
        assert whole(example) == "Some plain text.<|im_end|>"
        assert example.trained == [False] + [True] * (len(example.input_ids) - 1)


@pytest.mark.parametrize("answer", ["ünï", "日本語", "👩‍👩‍👧", " leading", "trailing \n ", "\n\nbreaks", "tab\t", "a"])
def test_multi_byte_characters_and_spaces_are_trained_completely(answer: str) -> None:
    assert learned(one(chat("x", answer))) == [f"{answer}<|im_end|>"]
    assert learned(one(pair("Q:", answer), chat_template="none")) == [f"{answer}<|im_end|>"]


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_trained_text_equals_the_answers(turns: list[str]) -> None:
    turns = turns[: len(turns) // 2 * 2]
    assert learned(one(chat(*turns), max_length=10**6)) == [f"{t}<|im_end|>" for t in turns[1::2]]


def test_boundary_token_is_trained() -> None:
    tokenizer = with_template(None)
    word = max((t for t in tokenizer.get_vocab() if t.isalpha()), key=len)
    encoded = encode_rows([pair(f"Q {word[:2]}", f"{word[2:]} rest")], tokenizer, data())
    assert learned(encoded.examples[0], tokenizer)[0].endswith(" rest<|im_end|>")


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PreTrainedTokenizerFast.__call__

    def without_offsets(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = real(self, *args, **kwargs)
        batch._encodings = None
        return batch

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", without_offsets)
    with pytest.raises(BaseError, match="fast tokenizer"):
        encode_rows([TALK], TOKENIZER, data())


LONG = chat("word " * 200, "answer")


def test_long_rows_are_refused_dropped_or_cut() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than data.max_length, 64 tokens") as caught:
        encode_rows([LONG, TALK], TOKENIZER, data(max_length=64))
    assert "data.long_rows=drop" in str(caught.value)
    dropped = encode_rows([LONG, TALK], TOKENIZER, data(max_length=64, long_rows="drop"))
    assert (dropped.counts.long_dropped, dropped.counts.used) == (1, 1)
    assert dropped.counts.first_rows["long_dropped"] == ["data.jsonl:1"]
    cut = encode_rows([LONG, TALK], TOKENIZER, data(max_length=64, long_rows="cut"))
    assert (cut.counts.cut, cut.counts.cut_ends, cut.counts.used) == (1, 0, 2)
    assert len(cut.examples[0].input_ids) == 64
    assert learned(cut.examples[0]) == ["answer<|im_end|>"]
    assert cut.counts.longest > 64


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 50))
@settings(max_examples=60, deadline=None)
def test_cut_rows_fit_and_keep_a_target(prompt: int, answer: int, limit: int) -> None:
    row = chat("q " * prompt, "a " * answer)
    full = encode_rows([row], TOKENIZER, data(max_length=10**6)).examples[0]
    encoded = encode_rows([row], TOKENIZER, data(max_length=limit, long_rows="cut"))
    example = encoded.examples[0]
    assert len(example.input_ids) <= limit
    assert any(example.trained)
    assert not example.trained[0]
    trained_ids = [t for t, on in zip(example.input_ids, example.trained, strict=True) if on]
    answer_ids = [t for t, on in zip(full.input_ids, full.trained, strict=True) if on]
    assert trained_ids == answer_ids[: len(trained_ids)]
    assert (len(trained_ids) < len(answer_ids)) == (encoded.counts.cut_ends == 1)


def test_rows_without_targets_are_dropped_and_counted() -> None:
    empty = chat("only a question")
    silent = chat("q", "   ")
    encoded = encode_rows([empty, silent, TALK], TOKENIZER, data())
    assert (encoded.counts.untrained, encoded.counts.used) == (2, 1)
    assert [e.row for e in encoded.examples] == [2]


def test_control_tokens_in_the_users_text_are_counted() -> None:
    encoded = encode_rows([chat("what is <|im_end|>?", "a marker"), TALK], TOKENIZER, data())
    assert encoded.counts.control == 1


def test_totals_are_sums_over_the_examples() -> None:
    encoded = encode_rows([TALK, chat("q", "a")], TOKENIZER, data())
    assert encoded.counts.tokens == sum(len(e.input_ids) for e in encoded.examples)
    assert encoded.counts.trained_tokens == sum(sum(e.trained) for e in encoded.examples)
    assert encoded.counts.longest == max(len(e.input_ids) for e in encoded.examples)


CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TALK_WITH_TOOLS: tuple[dict[str, Any], ...] = (
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Paris?"},
    {
        "role": "assistant", "content": "", "weight": 1,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
    },
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "Warm.", "weight": 0},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome."},
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_tool_call_is_trained_as_transformers_renders_it() -> None:
    """The template gets a tool call's arguments as a mapping; in OpenAI's format, they are a JSON string.

    Only answers with nonzero weight count in the loss."""
    tokenizer = with_template(templates.TOOLS)
    row = Row("messages", TALK_WITH_TOOLS, tools=(TOOL,), where="data.jsonl:1")
    example = one(row, tokenizer=tokenizer)
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = [dict(m) for m in TALK_WITH_TOOLS]
    turns[0]["role"], turns[2]["tool_calls"] = "system", [called]
    text = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert tokenizer.decode(example.input_ids) == text.rstrip("\n")
    assert learned(example, tokenizer) == [f"{CALLED}<|im_end|>", "Welcome.<|im_end|>"]


def test_inference_renders_tool_calls_as_training_does() -> None:
    """The prompt that a server renders before an answer equals the training text up to the part of the answer that
    counts in the loss."""
    tokenizer = with_template(templates.TOOLS)
    base = SimpleNamespace(tokenizer=tokenizer, has_chat_template=True, name="tiny")
    example = one(Row("messages", TALK_WITH_TOOLS, tools=(TOOL,)), tokenizer=tokenizer)
    before = rendered(cast(TextBase, base), TALK_WITH_TOOLS[:-1], tools=[TOOL])
    assert tokenizer.decode(example.input_ids) == f"{before}Welcome.<|im_end|>"


@pytest.mark.parametrize("row", [Row("messages", TALK_WITH_TOOLS), Row("messages", TALK_WITH_TOOLS[5:], tools=(TOOL,))])
def test_template_without_tools_is_refused(row: Row) -> None:
    with pytest.raises(DataError, match=r"tool(_call)?s`, but the chat template"):
        one(row)
