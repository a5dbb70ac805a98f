"""Streamed text: joined pieces equal the decoded completion, cut at the first complete stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.models.text.incremental_decoding import Pieces
from veneer.serve.engine.detokenize import AnswerText
from veneer.serve.request import Sampling

TOKENIZER = tiny_tokenizer()


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's.

    "▁" marks spaces, decoding drops the first space, and unknown characters become bytes.
    """
    words = ["▁the", "▁cat", "▁", "a", "b", "é", "s", "."]
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    vocab |= {w: 258 + i for i, w in enumerate(words)}
    raw = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


SENTENCEPIECE = sentencepiece()
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80)
letters = st.text(alphabet="ab\n€😀 ", min_size=1, max_size=5)


def told(answer: AnswerText, ids: list[int]) -> tuple[str, object]:
    text, stop = "", None
    for token in ids:
        piece = answer.add(token)
        text += piece.text
        if piece.reason:
            stop = piece.stop if piece.reason == "stop" else "length"
            break
    return text + answer.flush(), stop


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Cut a text at the first complete stop text, as streaming must do.

    If several stop texts are complete at the same position, cut the longest.
    """
    for end in range(1, len(text) + 1):
        if over := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, over))]
    return text


@given(tokens)
@settings(max_examples=200, deadline=None)
def test_joined_pieces_equal_the_text_of_any_tokens(ids: list[int]) -> None:
    pieces = Pieces(TOKENIZER)
    assert "".join([*map(pieces.add, ids), pieces.rest()]) == decoded(ids)


@given(st.text(alphabet="ab the cat.é€😀\n", max_size=60))
@settings(max_examples=100, deadline=None)
def test_joined_pieces_equal_the_text_with_byte_fallback(text: str) -> None:
    ids = SENTENCEPIECE(text)["input_ids"]
    pieces = Pieces(SENTENCEPIECE)
    assert "".join([*map(pieces.add, ids), pieces.rest()]) == decoded(ids, SENTENCEPIECE)


def bytewise(data: bytes) -> list[int]:
    """Return one token per byte."""
    table = {}
    n = 0
    for b in range(256):
        printable = 33 <= b <= 126 or 161 <= b <= 172 or b >= 174
        table[b] = chr(b) if printable else chr(256 + n)
        n += not printable
    return [TOKENIZER.convert_tokens_to_ids(table[b]) for b in data]


def test_an_incomplete_utf8_character_is_not_streamed() -> None:
    pieces = Pieces(TOKENIZER)
    assert [pieces.add(t) for t in bytewise("a😀é".encode())] == ["a", "", "", "", "😀", "", "é"]


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_pieces_of_arbitrary_bytes_join_to_their_text(data: bytes) -> None:
    pieces = Pieces(TOKENIZER)
    out = [pieces.add(t) for t in bytewise(data)]
    assert "".join([*out, pieces.rest()]) == data.decode(errors="replace")


def test_the_window_stays_small() -> None:
    """The cost per token does not grow with the completion's length, even if every byte is invalid UTF-8."""
    for ids in (bytewise(b"\xff" * 3000), bytewise("😀".encode() * 750), [2] * 3000, bytewise(b"ab" * 1500)):
        pieces, widest = Pieces(TOKENIZER), 0
        out = ""
        for token in ids:
            out += pieces.add(token)
            widest = max(widest, len(pieces.window))
        assert out + pieces.rest() == decoded(ids)
        assert widest <= 64


@given(tokens, st.lists(letters, max_size=3))
@settings(max_examples=300, deadline=None)
def test_an_answer_ends_before_the_first_stop(ids: list[int], stops: list[str]) -> None:
    ids = [i for i in ids if i != 2]
    answer = AnswerText(TOKENIZER, Sampling(max_tokens=1000, stop=tuple(stops)), ends=(2,))
    text, stop = told(answer, ids)
    assert text == cut(decoded(ids), tuple(stops))
    assert (stop is not None) == (text != decoded(ids))
    assert answer.flush() == ""


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_stops_that_overlap(text: str, stops: list[str]) -> None:
    """The result does not depend on how tokens divide the text."""
    whole = told(AnswerText(TOKENIZER, Sampling(max_tokens=1000, stop=tuple(stops))), TOKENIZER(text)["input_ids"])
    single = told(AnswerText(TOKENIZER, Sampling(max_tokens=1000, stop=tuple(stops))), bytewise(text.encode()))
    assert whole == single
    assert whole[0] == cut(text, tuple(stops))


def test_text_is_held_until_no_stop_follows() -> None:
    answer = AnswerText(TOKENIZER, Sampling(stop=("<end>",)))
    out = [answer.add(t).text for t in bytewise(b"a<en<end>")]
    assert out == ["a", "", "", "", "<en", "", "", "", ""]
    assert answer.flush() == ""

    answer = AnswerText(TOKENIZER, Sampling(stop=("<end>",)), ends=(2,))
    assert [answer.add(t).text for t in bytewise(b"a<e")] == ["a", "", ""]
    end = answer.add(2)
    assert (end.text, end.reason, end.stop) == ("", "stop", 2)
    assert answer.flush() == "<e"
    assert answer.flush() == ""


def test_a_stop_at_the_last_token_is_reported_as_stop() -> None:
    answer = AnswerText(TOKENIZER, Sampling(max_tokens=3, stop=("zz",)))
    pieces = [answer.add(t) for t in bytewise(b"abz")]
    assert [p.reason for p in pieces] == [None, None, "length"]
    assert "".join(p.text for p in pieces) + answer.flush() == "abz"
    answer = AnswerText(TOKENIZER, Sampling(max_tokens=2, stop=("b",)))
    assert [answer.add(t).reason for t in bytewise(b"ab")] == [None, "stop"]
    answer = AnswerText(TOKENIZER, Sampling(max_tokens=1), ends=(2,))
    assert answer.add(2).reason == "stop"


def test_only_the_models_end_tokens_can_be_ignored() -> None:
    answer = AnswerText(TOKENIZER, Sampling(ignore_eos=True, stop_ids=(9,)), ends=(2,))
    assert [answer.add(t).reason for t in (2, 5, 9)] == [None, None, "stop"]
    answer = AnswerText(TOKENIZER, Sampling(ignore_eos=True, grammar=("regex", "a")), ends=(2,))
    assert answer.add(2).reason == "stop", "nothing follows a grammar's end"


def test_stops_count_only_after_min_tokens() -> None:
    answer = AnswerText(TOKENIZER, Sampling(min_tokens=3, stop=("a",)))
    pieces = [answer.add(t) for t in bytewise(b"aaaba")]
    assert [p.reason for p in pieces] == [None, None, None, None, "stop"]
    assert "".join(p.text for p in pieces) == "aaab"


@pytest.mark.parametrize("ids", [[], [2, 1, 0]])
def test_special_tokens_have_no_text(ids: list[int]) -> None:
    assert told(AnswerText(TOKENIZER, Sampling(stop=("<",))), ids) == ("", None)
