"""OpenAI's graders, as rewards and for `/v1/fine_tuning/alpha/graders/run`.

    string_check      1 if eq, ne, like (the reference is in the input) or ilike holds for the texts, else 0
    text_similarity   fuzzy_match, bleu, gleu, meteor or rouge_1 … rouge_l of input and reference, from 0 to 1
    score_model       the number that a model gives, within `range`
    python            `grade(sample, item)` of the source, in a separate process (`limited`) or a sandbox
    multi             a formula of other graders' values: + - * / ^, min max abs floor ceil exp sqrt log

    with GraderRun(parse_grader({"type": "string_check", …})) as run:
        (grade,) = run.grade([(sample, item)])

A fault of the model's answer has the value 0: a template reads `sample.output_json` and the answer is not
such JSON (`sample_parse_error`). Any other fault has no value, and `errors` names it in OpenAI's words.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from veneer.errors import ConfigError, MissingExtraError, nearest, quoted
from veneer.train.config.section import Section
from veneer.train.rewards.compared import bleu, fuzzy, rouge
from veneer.train.rewards.judge import AskModel, Question, Reply, ask_once, reply_score, score_form
from veneer.train.rewards.limited import Asked, LimitedFunction
from veneer.train.rewards.sandbox import Sandbox
from veneer.train.rewards.template import FILLED, NoValue, TextTooLong, filled, template_problem

_SOURCE = 256 << 10
"""Maximum bytes of python sources in a grader, as at OpenAI.

For a multi grader, the maximum is for all its sources together."""
_PARSED_HERE = 8 << 10
"""Maximum characters of a source that this process parses itself.

`ast.parse` holds the GIL, for 0.2 s with the largest source."""
_PARSE_SECONDS = 20.0
_COMPARED = 64 << 10
"""Maximum characters of each text that a metric compares."""
TOO_LARGE = "too_large"
"""The error for a text over a limit.

OpenAI has no such error; neither the model nor the row is at fault."""
_MEMORY = 2e9
"""Bytes of memory that all python graders of one grader share."""
_Text = Annotated[str, Field(max_length=100_000)]
_Name = Annotated[str, Field(min_length=1, max_length=100)]


# -- the types of graders ----------------------------------------------------------------------------------------------


class _Grader(Section):
    name: _Name

    def templates(self) -> list[str]:
        return []

    @pydantic.model_validator(mode="after")
    def _templates_are_some(self) -> _Grader:
        for template in self.templates():
            if problem := template_problem(template):
                raise ValueError(problem)
        return self


class StringCheckGrader(_Grader):
    type: Literal["string_check"]
    input: _Text
    reference: _Text
    operation: Literal["eq", "ne", "like", "ilike"]

    def templates(self) -> list[str]:
        return [self.input, self.reference]


class TextSimilarityGrader(_Grader):
    type: Literal["text_similarity"]
    input: _Text
    reference: _Text
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ]  # cosine needs an embedding model, and OpenAI supports it for evals only

    def templates(self) -> list[str]:
        return [self.input, self.reference]


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

    def templates(self) -> list[str]:
        low, high = self.range or (0.0, 1.0)
        if low >= high:
            raise ValueError("`range` has its lowest number first")
        return [message.text for message in self.input]


class PythonGrader(_Grader):
    type: Literal["python"]
    source: Annotated[str, Field(min_length=1, max_length=_SOURCE)]
    image_tag: str | None = None

    @pydantic.field_validator("source")
    @classmethod
    def _has_grade(cls, source: str) -> str:
        """Check the source by parsing it, without running it."""
        problem = _source_problem(source) if len(source) <= _PARSED_HERE else _problem_by_child(source)
        if problem:
            raise ValueError(problem)
        return source


def _source_problem(source: str) -> str:
    """Return what is wrong with a grader's source; "" if nothing is."""
    try:
        names = {getattr(statement, "name", "") for statement in ast.parse(source).body}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        at = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        return f"the source is not valid Python: {at}{getattr(error, 'msg', error)}"
    return "" if "grade" in names else "the source defines no function grade(sample, item)"


def _problem_by_child(source: str) -> str:
    """Return the result of `_source_problem`, computed in a separate process."""
    code = f"import ast, sys\n{inspect.getsource(_source_problem)}\n"
    code += "sys.stdout.buffer.write(_source_problem(sys.stdin.buffer.read().decode()).encode())"
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], input=source.encode(), capture_output=True, timeout=_PARSE_SECONDS
        )
    except (subprocess.TimeoutExpired, UnicodeEncodeError):
        return "the source cannot be parsed"
    return child.stdout.decode() if child.returncode == 0 else "the source cannot be parsed"


_Single = Annotated[
    StringCheckGrader | TextSimilarityGrader | ScoreModelGrader | PythonGrader, Field(discriminator="type")
]


class MultiGrader(_Grader):
    type: Literal["multi"]
    graders: Annotated[dict[_Name, _Single], Field(min_length=1, max_length=32)]
    calculate_output: Annotated[str, Field(min_length=1, max_length=1000)]

    @pydantic.field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """Return graders by name; a single grader gets its own name, as at OpenAI."""
        if isinstance(given, Mapping) and isinstance(given.get("type"), str) and isinstance(given.get("name"), str):
            return {given["name"]: dict(given)}
        return given

    @pydantic.field_validator("graders", mode="before")
    @classmethod
    def _sources_fit(cls, given: Any) -> Any:
        """Check the total size of the sources before parsing any of them."""
        singles = given.values() if isinstance(given, Mapping) else ()
        sources = [each.get("source") for each in singles if isinstance(each, Mapping)]
        if sum(len(source) for source in sources if isinstance(source, str)) > _SOURCE:
            raise ValueError(f"the sources of its python graders have more than {_SOURCE:,} characters together")
        return given

    @pydantic.model_validator(mode="after")
    def _formula(self) -> MultiGrader:
        _parse_formula(self.calculate_output, self.graders)
        return self


_AnyGrader = Annotated[
    StringCheckGrader | TextSimilarityGrader | ScoreModelGrader | PythonGrader | MultiGrader,
    Field(discriminator="type"),
]
_TYPES = ("string_check", "text_similarity", "score_model", "python", "multi")
_ADAPTER: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(_AnyGrader)


def parse_grader(given: Any, where: str = "grader") -> Any:
    """Parse a JSON grader. Raises ConfigError naming the invalid key."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind not in _TYPES:
        near = nearest(str(kind), _TYPES, 1)
        hint = f"did you mean {near[0]}?" if near and kind else f"there are {', '.join(_TYPES)}"
        raise ConfigError(
            f"{quoted(str(kind))} is no type of grader" if kind else "a grader has a type", where=where, fix=hint
        )
    try:
        return _ADAPTER.validate_python(given)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"] if part not in _TYPES]
        said = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(said, where=".".join([where, *path])) from None


def has_python(given: Any) -> bool:
    """Return whether an unparsed JSON grader is a python grader or contains one."""
    inner = given.get("graders") if isinstance(given, Mapping) else None
    found = [given, inner, *(inner.values() if isinstance(inner, Mapping) else ())]
    return any(isinstance(each, Mapping) and each.get("type") == "python" for each in found)


def single_graders(grader: Any) -> dict[str, Any]:
    """Return a multi grader's graders by name; any other grader under the name ""."""
    return dict(grader.graders) if isinstance(grader, MultiGrader) else {"": grader}


def grader_models(grader: Any) -> set[str]:
    """Return the models that a grader or its sub-graders ask."""
    return {each.model for each in single_graders(grader).values() if isinstance(each, ScoreModelGrader)}


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
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


def _parse_formula(text: str, names: Mapping[str, Any]) -> Callable[[Mapping[str, float]], float]:
    """Compile a formula of numbers, `names` and the functions above.

    Returns a function of the names' values. A name that is not an identifier cannot be used in a formula.
    Raises ValueError for an invalid formula; the returned function raises ArithmeticError or ValueError if
    there is no value, as for 1/0."""
    try:
        body = ast.parse(text.replace("^", "**").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"calculate_output is no formula: {quoted(text)}") from None

    def made(node: ast.AST) -> Callable[[Mapping[str, float]], float]:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = float(node.value)  # type: ignore[arg-type]
            return lambda values: value
        if isinstance(node, ast.Name):
            if node.id not in names:
                near = nearest(node.id, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise ValueError(f"calculate_output names {quoted(node.id)}, and no grader is called so; {hint}")
            name = node.id
            return lambda values: values[name]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            do, a, b = _OPERATORS[type(node.op)], made(node.left), made(node.right)
            return lambda values: do(a(values), b(values))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            do, a = _OPERATORS[type(node.op)], made(node.operand)
            return lambda values: do(a(values))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
            function, arguments = _FUNCTIONS.get(node.func.id), [made(each) for each in node.args]
            if function is not None and (len(arguments) > 1) == (node.func.id in ("min", "max")):
                return lambda values: float(function(*(each(values) for each in arguments)))
        raise ValueError(f"calculate_output has more than numbers, graders, + - * / ^ and {', '.join(_FUNCTIONS)}")

    try:
        return made(body)
    except (RecursionError, OverflowError):
        raise ValueError("calculate_output is nested too deep, or has a number that is too large") from None


# -- running graders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grade:
    """The result of a grader.

    `errors`: OpenAI's name of an error -> its description. `parts`: values of a multi grader's graders.
    `usage`: tokens, by model."""

    value: float | None
    errors: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class GraderRun:
    """A grader that is ready to run.

    `ask`: asks the model of score_model. `timeout`: seconds for a python function. `sandbox`: where Python
    runs; if None, with this process's rights. Raises ConfigError if score_model has no model to ask, and
    MissingExtraError if a metric's package is missing."""

    def __init__(
        self, grader: Any, *, ask: AskModel | None = None, timeout: float = 120.0, sandbox: Sandbox | None = None
    ) -> None:
        self.grader, self._ask = grader, ask
        self._open = ExitStack()
        if grader_models(grader) and ask is None:
            raise ConfigError("nobody here answers for a score_model", where=grader.name, fix="name a server: `url`")
        sources = {n: each.source for n, each in single_graders(grader).items() if isinstance(each, PythonGrader)}
        how: dict[str, Any] = {"timeout": timeout, "bare": True, "sandbox": sandbox}
        self._functions = {
            name: self._open.enter_context(
                LimitedFunction("grade", source=source, memory=_MEMORY / len(sources), **how)
            )
            for name, source in sources.items()
        }

    def __enter__(self) -> GraderRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def grade(self, asked: Sequence[Asked]) -> list[Grade]:
        """Return a grade for each (sample, item).

        Raises UnavailableError if the model server is unavailable."""
        own = {name: self._grades(name, each, asked) for name, each in single_graders(self.grader).items()}
        if not isinstance(self.grader, MultiGrader):
            return own[""]
        formula = _parse_formula(self.grader.calculate_output, self.grader.graders)
        return [_together(formula, {name: grades[i] for name, grades in own.items()}) for i in range(len(asked))]

    def _grades(self, name: str, grader: Any, asked: Sequence[Asked]) -> list[Grade]:
        if isinstance(grader, PythonGrader):
            return self._by_function(name, asked)
        if isinstance(grader, ScoreModelGrader):
            return self._by_model(grader, asked)
        return [_caught(lambda pair=pair: _of_texts(grader, *pair)) for pair in asked]  # type: ignore[misc]

    def _by_function(self, name: str, asked: Sequence[Asked]) -> list[Grade]:
        try:
            scores = self._functions[name].score(asked)
        except ConfigError as error:  # the source cannot be loaded, whatever the sample
            return [Grade(None, {"python_grader_runtime_error": error.what})] * len(asked)
        return [
            Grade(score.value, {}, score.parts)
            if score.value is not None and math.isfinite(score.value)
            else Grade(None, {"python_grader_runtime_error": score.error or f"it gave {score.value}"})
            for score in scores
        ]

    def _by_model(self, grader: ScoreModelGrader, asked: Sequence[Asked]) -> list[Grade]:
        low, high = grader.range or (0.0, 1.0)
        assert self._ask is not None
        made: list[Question | Grade] = []
        for sample, item in asked:
            try:
                made.append(_question(grader, sample, item))
            except (NoValue, TextTooLong) as error:
                made.append(_no_value(error))
        replies = iter(ask_once(self._ask, [each for each in made if isinstance(each, Question)]))
        return [each if isinstance(each, Grade) else _of_reply(next(replies), grader.model, low, high) for each in made]


def _question(grader: ScoreModelGrader, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Question:
    """Return the question: the grader's filled messages and the required answer form.

    The `result` of the answer is the grade. Raises NoValue, TextTooLong."""
    low, high = grader.range or (0.0, 1.0)
    messages: list[dict[str, str]] = []
    left = FILLED
    for message in grader.input:
        content = filled(message.text, sample, item, left)
        left -= len(content)
        messages.append({"role": message.role, "content": content})
    told, form = score_form(low, high)
    if messages[0]["role"] in ("system", "developer"):
        messages[0] |= {"content": f"{messages[0]['content']}\n\n{told}"}
    else:
        messages.insert(0, {"role": "system", "content": told})
    own = grader.sampling_params or _SamplingParams()
    extra = {} if own.reasoning_effort is None else {"reasoning_effort": own.reasoning_effort}
    return Question(
        messages,
        grader.model,
        tokens=own.max_completions_tokens or 1024,
        temperature=own.temperature or 0.0,
        top_p=own.top_p or 1.0,
        seed=own.seed or 0,
        form=form,
        extra=extra,
    )


def _of_reply(reply: Reply, model: str, low: float, high: float) -> Grade:
    usage = {model: reply.usage}
    if reply.error:
        word = "model_grader_refusal_error" if reply.refused else "model_grader_server_error"
        return Grade(None, {word: reply.error}, usage=usage)
    value = reply_score(reply, low, high)
    if isinstance(value, str):
        return Grade(None, {"model_grader_parse_error": value}, usage=usage)
    return Grade(value, usage=usage)


def _caught(do: Callable[[], float]) -> Grade:
    try:
        return Grade(do())
    except (NoValue, TextTooLong) as error:
        return _no_value(error)


def _no_value(error: NoValue | TextTooLong) -> Grade:
    if isinstance(error, TextTooLong):
        return Grade(None, {TOO_LARGE: str(error)})
    if error.of_sample:
        return Grade(0.0, {"sample_parse_error": str(error)})
    return Grade(None, {"invalid_variable_error": str(error)})


def _of_texts(
    grader: StringCheckGrader | TextSimilarityGrader, sample: Mapping[str, Any], item: Mapping[str, Any]
) -> float:
    text, wanted = filled(grader.input, sample, item), filled(grader.reference, sample, item)
    if isinstance(grader, StringCheckGrader):
        found = {
            "eq": text == wanted,
            "ne": text != wanted,
            "like": wanted in text,
            "ilike": wanted.casefold() in text.casefold(),
        }
        return float(found[grader.operation])
    if max(len(text), len(wanted)) > _COMPARED:
        raise TextTooLong(f"text_similarity compares texts of up to {_COMPARED:,} characters")
    metric = grader.evaluation_metric
    if metric.startswith("rouge_"):
        return rouge(text, wanted, f"rouge{metric.removeprefix('rouge_').upper()}")
    return {"fuzzy_match": fuzzy, "bleu": bleu, "gleu": _gleu, "meteor": _meteor}[metric](text, wanted)


def _gleu(text: str, wanted: str) -> float:
    """Return Google's BLEU (arXiv 1609.08144).

    It is min(precision, recall) of all n-grams of 1 to 4 words."""

    def grams(of: str) -> Counter[tuple[str, ...]]:
        words = of.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    own, other = grams(text), grams(wanted)
    most = max(own.total(), other.total())
    return (own & other).total() / most if most else 0.0


def _meteor(text: str, wanted: str) -> float:
    try:
        from nltk.translate.meteor_score import meteor_score

        return float(meteor_score([wanted.split()], text.split()))
    except ImportError as error:
        raise MissingExtraError("METEOR needs nltk", fix="pip install 'veneer[metrics]'") from error
    except LookupError as error:
        fix = "python -m nltk.downloader wordnet"
        raise MissingExtraError("METEOR needs WordNet, which nltk has not found", fix=fix) from error


def _together(formula: Callable[[Mapping[str, float]], float], own: Mapping[str, Grade]) -> Grade:
    errors: dict[str, str] = {}
    usage: dict[str, Counter[str]] = {}
    for name, grade in own.items():
        for word, said in grade.errors.items():
            errors.setdefault(word, f"{name}: {said}")
        for model, took in grade.usage.items():
            usage.setdefault(model, Counter()).update(took)
    parts = {name: grade.value for name, grade in own.items() if grade.value is not None}
    value = None
    if len(parts) == len(own):
        try:
            value = float(formula(parts))
        except (ArithmeticError, ValueError, RecursionError) as error:
            errors["other_error"] = f"calculate_output: {error}"
        if value is not None and not math.isfinite(value):
            value, errors["other_error"] = None, f"calculate_output gave {value}"
    return Grade(value, errors, parts, usage)
