"""Grammars as token masks: every completion is valid, whatever the model prefers; a bad grammar returns 400."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.serve.engine import grammar as grammars
from veneer.serve.engine.detokenize import AnswerText
from veneer.serve.engine.grammar import GrammarKind, Matcher, compile_grammar
from veneer.serve.engine.sampler import SampledRow, sample
from veneer.serve.request import Refused, Sampling

jsonschema = pytest.importorskip("jsonschema")

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PADDED = VOCAB_SIZE + 64
"""Number of logits. Models often have more logits than their tokenizer has tokens."""


def compiled(kind: GrammarKind, text: str = "") -> Matcher:
    return compile_grammar(kind, text, TOKENIZER, vocabulary=PADDED, ends=(EOS,))


def answer(grammar: Matcher, seed: int = 0, heat: float = 1.0, steps: int = 400) -> tuple[str, bool]:
    """Sample from a random model. Return (text, whether the completion ended).

    Over time, the model becomes more likely to close open brackets.
    """
    generator = torch.Generator().manual_seed(seed)
    matcher = grammar.copy()
    row = SampledRow(Sampling(seed=seed, temperature=heat), vocabulary=PADDED, ends=(EOS,), grammar=matcher)
    told = AnswerText(TOKENIZER, Sampling(max_tokens=steps), ends=(EOS,))
    text = ""
    closing = TOKENIZER.convert_tokens_to_ids(['"', "}", "]"])
    for step in range(steps):
        logits = torch.randn(1, PADDED, generator=generator) * 2
        logits[0, closing] += step / 4
        logits[0, EOS] += 5
        (choice,) = sample(logits, [row])
        assert choice.id < VOCAB_SIZE
        complete = matcher.complete
        piece = told.add(choice.id)
        text += piece.text
        if piece.reason == "stop":
            assert complete
            return text + told.flush(), True
    return text + told.flush(), False


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"team": {"enum": ["billing", "support"]}, "n": {"type": "integer"}},
     "required": ["team", "n"], "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"type": "string", "maxLength": 5},
    {"anyOf": [{"type": "null"}, {"type": "number"}]},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
        {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}}},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"const": {"a": [1, "x"]}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_answers_follow_their_schema(schema: dict[str, Any], heat: float) -> None:
    answers = [answer(compiled("json_schema", json.dumps(schema)), seed, heat) for seed in range(6)]
    ended = [text for text, end in answers if end]
    assert ended
    for text in ended:
        jsonschema.validate(json.loads(text), schema)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    simple: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
            st.integers(-999, 999),
            st.integers(-999, 999),
        ),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
        st.lists(st.sampled_from(["a", 'q"', "é", 1, None, True]), min_size=1, max_size=3, unique_by=repr).map(
            lambda values: {"enum": values}
        ),
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 3))
        fields = st.dictionaries(st.sampled_from(["a", "b", "long name"]), inner, max_size=3)
        objects = fields.map(
            lambda p: {"type": "object", "properties": p, "required": sorted(p), "additionalProperties": False}
        )
        return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=2).map(lambda a: {"anyOf": a}))

    return st.recursive(simple, larger, max_leaves=5)


@given(schema=schemas(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_small_schema(schema: dict[str, Any], seed: int) -> None:
    matcher = compiled("json_schema", json.dumps(schema)).copy()
    for token in matcher.forced():
        assert matcher.mask().nonzero().flatten().tolist() == [token]
        matcher.advance(token)
    text, end = answer(compiled("json_schema", json.dumps(schema)), seed)
    if end:
        jsonschema.validate(json.loads(text), schema)


def test_answers_have_whitespace_only_if_the_schema_allows_it() -> None:
    schema = {"const": {"a": [1, 2], "b": "x y"}}
    assert answer(compiled("json_schema", json.dumps(schema))) == ('{"a":[1,2],"b":"x y"}', True)
    flexible = compiled("json_schema", json.dumps(schema | {"x-guidance": {"whitespace_flexible": True}})).copy()
    for token in TOKENIZER.encode('{ "a" : [1,\n2], "b": "x y"}'):
        flexible.advance(token)
    assert flexible.complete


def test_any_json_object() -> None:
    texts = [text for text, end in (answer(compiled("json_object"), seed) for seed in range(8)) if end]
    assert {type(json.loads(text)) for text in texts} == {dict}


@pytest.mark.parametrize("pattern", [r"(yes|no|maybe)", r"[a-z]{3}-\d{2}", r"a*b", r"€+x", r"(\d{1,3}\.){3}\d{1,3}"])
def test_regular_expressions(pattern: str) -> None:
    for seed in range(5):
        text, end = answer(compiled("regex", pattern), seed)
        assert not end or re.fullmatch(pattern, text), text


def test_the_end_is_allowed_only_after_a_complete_answer() -> None:
    matcher = compiled("regex", "ab?").copy()
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    assert not matcher.mask()[EOS]
    assert not matcher.complete
    matcher.advance(a)
    assert matcher.mask()[EOS]
    assert matcher.mask()[b]
    assert (matcher.complete, matcher.done) == (True, False)
    matcher.advance(b)
    assert matcher.mask().nonzero().flatten().tolist() == [EOS]
    assert (matcher.complete, matcher.done) == (True, True)
    matcher.advance(EOS)
    assert matcher.done
    with pytest.raises(Refused):
        compiled("regex", "a").copy().advance(b)


def test_every_id_that_ends_an_answer_may_end_it() -> None:
    grammar = compile_grammar("regex", "a", TOKENIZER, vocabulary=PADDED, ends=(0, EOS))
    matcher = grammar.copy()
    assert not matcher.mask()[[0, EOS]].any()
    matcher.advance(TOKENIZER.convert_tokens_to_ids("a"))
    assert matcher.mask().nonzero().flatten().tolist() == sorted([0, EOS])
    alone = compile_grammar("regex", "a", TOKENIZER).copy()
    assert alone.mask().shape == (VOCAB_SIZE,)
    alone.advance(TOKENIZER.convert_tokens_to_ids("a"))
    assert alone.mask().nonzero().flatten().tolist() == [EOS]


def test_ids_outside_the_tokenizer_are_never_allowed() -> None:
    mask = compiled("json_object").copy().mask()
    assert mask.shape == (PADDED,)
    assert mask.dtype == torch.bool
    assert not mask[VOCAB_SIZE:].any()
    assert mask.any()


BAD_SCHEMAS = ["{", "[1]", '{"type": "objekt"}', '{"$ref": "#/nowhere"}', '{"$ref": "https://example.com/schema"}']
BAD_SCHEMAS += ['{"type": "string", "minLength": 5, "maxLength": 2}', '{"type": "string", "format": "no-such-format"}']
BAD_PATTERNS = ["(a", "[z-a]", "a" * (grammars.MAX_TEXT + 1)]


@pytest.mark.parametrize("text", BAD_SCHEMAS + BAD_PATTERNS, ids=lambda text: text[:20])
def test_a_schema_that_does_not_compile_is_400(text: str) -> None:
    with pytest.raises(Refused) as caught:
        compiled("regex" if text in BAD_PATTERNS else "json_schema", text)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert len(caught.value.what) > len("the grammar cannot be used: ")


def test_a_grammar_is_compiled_once_and_its_matchers_are_independent() -> None:
    text = '{"type": "object", "title": "once"}'
    assert compiled("json_schema", text) is compiled("json_schema", text)
    assert compiled("json_object", "x") is compiled("json_object", "y")
    grammar = compiled("regex", "ab")
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    one, two = grammar.copy(), grammar.copy()
    one.advance(a)
    assert one.mask()[b]
    assert two.mask()[a]
    assert not two.mask()[b]


def test_without_a_fast_tokenizer() -> None:
    class Slow:
        eos_token_id = 0

        def __len__(self) -> int:
            return 10

    with pytest.raises(Refused, match="fast tokenizer"):
        compile_grammar("regex", "a", Slow())


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4500)}}, "at most 2,000"),
        ({"$ref": "#"}, "llguidance gave no reason"),
        ({"anyOf": []}, "anyOf is empty"),
    ],
)
def test_unsupported_schemas_are_refused_with_a_reason(schema: Any, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(Refused, match=says) as caught:
        compiled("json_schema", json.dumps(schema))
    assert time.monotonic() - began < 2
    assert caught.value.status == 400
    for inside in ("<state>", "<grammar>", "NoExtensionBias", "lexer_cost", "\n"):
        assert inside not in caught.value.what
    assert len(caught.value.what) < 400


@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_a_wrong_regular_expression_is_refused_with_its_reason(kind: GrammarKind) -> None:
    text = "(a" if kind == "regex" else json.dumps({"type": "string", "pattern": "(a"})
    with pytest.raises(Refused) as caught:
        compiled(kind, text)
    assert caught.value.what.endswith("it contains an invalid regular expression: unclosed group")
