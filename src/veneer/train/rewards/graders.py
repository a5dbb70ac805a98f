"""Use OpenAI's graders as rewards.

    string_check      1 if the texts pass eq, ne, like (input contains reference) or ilike, else 0
    text_similarity   fuzzy_match, bleu, gleu or rouge_1 … rouge_l of input and reference, from 0 to 1
    score_model       the number that a model gives, within `range`
    python            the result of the source's `grade(sample, item)`, in a process (`limited`) or a sandbox
    multi             a formula of other graders' values: + - * / ^, min max abs floor ceil exp sqrt log

    reward = grader_reward(parse_grader({"type": "string_check", …}), opened)

If a template reads `sample.output_json`, but the answer is not JSON with the value that the template reads,
the grader's value is 0. If a row does not have a column that a template reads, the run stops. After any other
error, the answer gets the reason for the error instead of a value.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from veneer.errors import ConfigError, DataError, quoted
from veneer.train.config.section import Section
from veneer.train.rewards.judge import AskModel, Question, asked_reward, score_form
from veneer.train.rewards.limited import LimitedFunction
from veneer.train.rewards.reward import Answer, Reward, RewardScore, each_answer
from veneer.train.rewards.sandbox import Sandbox
from veneer.train.rewards.template import MAX_FILLED, NoValue, TextTooLong, filled, template_problem, template_sample
from veneer.train.rewards.text_scores import bleu, fuzzy, gleu, rouge

_SOURCE = 64 << 10
"""Maximum total number of characters in the python sources of a grader.

Parsing a source of this size takes at most 50 ms, during which the GIL is held."""
_COMPARED = 64 << 10
"""Maximum number of characters in each text that a metric compares."""
_MEMORY = 2e9
"""Bytes of memory that all python graders within one grader share equally."""
_TIMEOUT = 120.0
"""Maximum seconds that a python grader can take for one answer."""
_Text = Annotated[str, Field(max_length=100_000)]
_Name = Annotated[str, Field(min_length=1, max_length=100)]


# -- the types of graders ----------------------------------------------------------------------------------------------


class _Grader(Section):
    name: _Name

    def templates(self) -> list[str]:
        return []

    @pydantic.model_validator(mode="after")
    def _check_templates(self) -> _Grader:
        for template in self.templates():
            if problem := template_problem(template):
                raise ValueError(problem)
        return self


class _TextsGrader(_Grader):
    input: _Text
    reference: _Text

    def templates(self) -> list[str]:
        return [self.input, self.reference]


class StringCheckGrader(_TextsGrader):
    type: Literal["string_check"]
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarityGrader(_TextsGrader):
    type: Literal["text_similarity"]
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ]  # no cosine, because it needs an embedding model, and OpenAI supports it only for evals


class _ContentPart(Section):
    type: Literal["input_text", "output_text"]
    text: _Text


class _GraderMessage(Section):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Text | _ContentPart | Annotated[tuple[_Text | _ContentPart, ...], Field(max_length=64)]
    type: Literal["message"] | None = None

    @property
    def text(self) -> str:
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        return "".join(part if isinstance(part, str) else part.text for part in parts)


class _SamplingParams(Section):
    seed: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_completions_tokens: int | None = Field(default=None, ge=1)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ScoreModelGrader(_Grader):
    type: Literal["score_model"]
    model: _Name
    input: Annotated[tuple[_GraderMessage, ...], Field(min_length=1, max_length=64)]
    range: tuple[float, float] | None = None
    sampling_params: _SamplingParams | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        return self.range or (0.0, 1.0)

    def templates(self) -> list[str]:
        if self.bounds[0] >= self.bounds[1]:
            raise ValueError("`range` must begin with the lower number")
        return [message.text for message in self.input]


class PythonGrader(_Grader):
    type: Literal["python"]
    source: Annotated[str, Field(min_length=1, max_length=_SOURCE)]
    image_tag: str | None = None

    @pydantic.field_validator("source")
    @classmethod
    def _has_grade(cls, source: str) -> str:
        """Check, without running the source, that it is valid Python and defines `grade`."""
        try:
            names = {getattr(statement, "name", "") for statement in ast.parse(source).body}
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            raise ValueError(f"the source is not valid Python: {at}{getattr(error, 'msg', error)}") from None
        if "grade" not in names:
            raise ValueError("the source does not define a function grade(sample, item)")
        return source


_Single = Annotated[
    StringCheckGrader | TextSimilarityGrader | ScoreModelGrader | PythonGrader, Field(discriminator="type")
]


class MultiGrader(_Grader):
    type: Literal["multi"]
    graders: Annotated[dict[_Name, _Single], Field(min_length=1, max_length=32)]
    calculate_output: Annotated[str, Field(min_length=1, max_length=1000)]

    @pydantic.field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Return graders by name. As in OpenAI's API, a single grader can be given directly.

        The total size of the sources is checked before any source is parsed."""
        if isinstance(value, Mapping) and isinstance(value.get("type"), str) and isinstance(value.get("name"), str):
            value = {value["name"]: dict(value)}
        singles = value.values() if isinstance(value, Mapping) else ()
        sources = [each.get("source") for each in singles if isinstance(each, Mapping)]
        if sum(len(source) for source in sources if isinstance(source, str)) > _SOURCE:
            raise ValueError(f"the sources of its python graders have more than {_SOURCE:,} characters in total")
        return value

    @pydantic.model_validator(mode="after")
    def _formula(self) -> MultiGrader:
        _parse_formula(self.calculate_output, self.graders)
        return self


_TYPES = ("string_check", "text_similarity", "score_model", "python", "multi")
_ADAPTER: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(
    Annotated[_Single | MultiGrader, Field(discriminator="type")]
)


def parse_grader(value: Any, where: str = "grader") -> Any:
    """Validate a JSON grader. Raise ConfigError that names the invalid key."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in _TYPES:
        problem = f"{quoted(str(kind))} is not a type of grader" if kind else "a grader needs a type"
        raise ConfigError(problem, where=where, fix=f"use one of {', '.join(_TYPES)}")
    try:
        return _ADAPTER.validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"] if part not in _TYPES]
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(message, where=".".join([where, *path])) from None


def has_python(value: Any) -> bool:
    """Return whether a JSON grader is or contains a python grader, without validating it."""
    inner = value.get("graders") if isinstance(value, Mapping) else None
    graders = [value, inner, *(inner.values() if isinstance(inner, Mapping) else ())]
    return any(isinstance(each, Mapping) and each.get("type") == "python" for each in graders)


def grader_models(grader: Any) -> set[str]:
    """Return the names of the models that a grader or its sub-graders use."""
    graders = grader.graders.values() if isinstance(grader, MultiGrader) else [grader]
    return {each.model for each in graders if isinstance(each, ScoreModelGrader)}


# -- formulas ----------------------------------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_NUMBERS: tuple[Callable[..., float], ...] = (min, max, abs, math.floor, math.ceil, math.exp, math.sqrt, math.log)
_FUNCTIONS = {function.__name__: function for function in _NUMBERS}


def _parse_formula(text: str, names: Mapping[str, Any]) -> Callable[[Mapping[str, float]], float]:
    """Compile a formula of numbers, `names` and the functions in `_FUNCTIONS`.

    Returns a function that computes the formula from the values of the names. A name that is not an
    identifier cannot be used in a formula. Raises ValueError for an invalid formula. The returned function
    raises ArithmeticError or ValueError if the formula has no value, as in 1/0."""
    try:
        body = ast.parse(text.replace("^", "**").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"calculate_output is not a formula: {quoted(text)}") from None

    def compiled(node: ast.AST) -> Callable[[Mapping[str, float]], float]:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = float(node.value)  # type: ignore[arg-type]
            return lambda values: value
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise ValueError(f"calculate_output names {quoted(node.id)}, but no grader has this name")
            name = node.id
            return lambda values: values[name]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            do, a, b = _OPERATORS[type(node.op)], compiled(node.left), compiled(node.right)
            return lambda values: do(a(values), b(values))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            do, a = _OPERATORS[type(node.op)], compiled(node.operand)
            return lambda values: do(a(values))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
            function, arguments = _FUNCTIONS.get(node.func.id), [compiled(each) for each in node.args]
            if function is not None and (len(arguments) > 1) == (node.func.id in ("min", "max")):
                return lambda values: float(function(*(each(values) for each in arguments)))
        raise ValueError(f"calculate_output allows only numbers, graders, + - * / ^ and {', '.join(_FUNCTIONS)}")

    try:
        return compiled(body)
    except (RecursionError, OverflowError):
        raise ValueError("calculate_output is nested too deeply, or has a number that is too large") from None


# -- graders as rewards ------------------------------------------------------------------------------------------------


def grader_reward(
    grader: Any, opened: ExitStack, *, ask: AskModel | None = None, sandbox: Sandbox | None = None
) -> Reward:
    """Return a reward that uses a grader. `opened` closes the reward's processes.

    `ask`: sends questions to the model of score_model. `sandbox`: where python graders run; if None, they run
    with this process's permissions. The reward raises ConfigError if the source of a python grader cannot be
    loaded, and MissingExtraError if a metric's package is missing."""
    graders = grader.graders if isinstance(grader, MultiGrader) else {"": grader}
    memory = _MEMORY / max(1, sum(isinstance(each, PythonGrader) for each in graders.values()))

    def single(each: Any) -> Reward:
        if isinstance(each, PythonGrader):
            function = LimitedFunction("grade", source=each.source, timeout=_TIMEOUT, memory=memory, sandbox=sandbox)
            return functools.partial(_by_function, opened.enter_context(function))
        if isinstance(each, ScoreModelGrader):
            assert ask is not None
            return asked_reward(ask, functools.partial(_question, each), *each.bounds)
        return each_answer(functools.partial(_compare, each))

    rewards = {name: single(each) for name, each in graders.items()}
    if not isinstance(grader, MultiGrader):
        return rewards[""]
    formula = _parse_formula(grader.calculate_output, grader.graders)

    def multi(answers: Sequence[Answer], /) -> list[RewardScore]:
        scores = [reward(answers) for reward in rewards.values()]
        return [_combined(formula, dict(zip(rewards, each, strict=True))) for each in zip(*scores, strict=True)]

    return multi


def _by_function(function: LimitedFunction, answers: Sequence[Answer], /) -> list[RewardScore]:
    return [
        score if score.value is None or math.isfinite(score.value) else RewardScore(None, f"it gave {score.value}")
        for score in function.score([(template_sample(answer), answer.row) for answer in answers])
    ]


def _filled_texts(templates: Sequence[str], answer: Answer) -> list[str] | RewardScore:
    """Return the filled templates, or the answer's score if a template cannot be filled.

    Raises DataError if the row has no value for a template."""
    sample, texts = template_sample(answer), list[str]()
    try:
        for template in templates:
            texts.append(filled(template, sample, answer.row, MAX_FILLED - sum(map(len, texts))))
    except TextTooLong as error:
        return RewardScore(None, str(error))
    except NoValue as error:
        if error.of_sample:
            return RewardScore(0.0)
        where = str(answer.row.get("where") or "") or None
        raise DataError(f"a grader's template reads a column that this row lacks: {error}", where=where) from None
    return texts


def _question(grader: ScoreModelGrader, answer: Answer) -> Question | RewardScore:
    """Return the question for the grader's model: the messages and the form of the reply.

    The grade is the `result` in the model's reply. If a template cannot be filled, returns the answer's
    score."""
    texts = _filled_texts(grader.templates(), answer)
    if isinstance(texts, RewardScore):
        return texts
    messages = [{"role": m.role, "content": text} for m, text in zip(grader.input, texts, strict=True)]
    instruction, form = score_form(*grader.bounds)
    if messages[0]["role"] in ("system", "developer"):
        messages[0]["content"] += f"\n\n{instruction}"
    else:
        messages.insert(0, {"role": "system", "content": instruction})
    sampling = grader.sampling_params or _SamplingParams()
    return Question(
        messages,
        grader.model,
        tokens=sampling.max_completions_tokens or 1024,
        temperature=sampling.temperature or 0.0,
        top_p=sampling.top_p or 1.0,
        seed=sampling.seed or 0,
        form=form,
        extra={} if sampling.reasoning_effort is None else {"reasoning_effort": sampling.reasoning_effort},
    )


def _compare(grader: StringCheckGrader | TextSimilarityGrader, answer: Answer) -> RewardScore:
    texts = _filled_texts([grader.input, grader.reference], answer)
    if isinstance(texts, RewardScore):
        return texts
    if isinstance(grader, StringCheckGrader):
        return RewardScore(float(_CHECKS[grader.operation](*texts)))
    if max(map(len, texts)) > _COMPARED:
        return RewardScore(None, f"text_similarity compares texts of at most {_COMPARED:,} characters")
    return RewardScore(_METRICS[grader.evaluation_metric](*texts))


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "like": operator.contains,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
_METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": functools.partial(rouge, measure=f"rouge{n}") for n in range(1, 6)},
    "rouge_l": rouge,
}


def _combined(formula: Callable[[Mapping[str, float]], float], scores: Mapping[str, RewardScore]) -> RewardScore:
    if errors := [f"{name}: {score.error}" for name, score in scores.items() if score.value is None]:
        return RewardScore(None, "; ".join(errors))
    values = {name: score.value for name, score in scores.items() if score.value is not None}
    try:
        value = float(formula(values))
    except (ArithmeticError, ValueError, RecursionError) as error:
        return RewardScore(None, f"calculate_output: {error}")
    return RewardScore(value) if math.isfinite(value) else RewardScore(None, f"calculate_output gave {value}")
