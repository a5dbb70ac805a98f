"""OpenAI's graders, as rewards and for `/v1/fine_tuning/alpha/graders/run`.

    string_check      1 if eq, ne, like (the reference is in the input) or ilike holds for the texts, else 0
    text_similarity   fuzzy_match, bleu, gleu or rouge_1 … rouge_l of input and reference, from 0 to 1
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
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from veneer.errors import ConfigError, quoted
from veneer.train.config.section import Section
from veneer.train.rewards.judge import AskModel, Question, Reply, ask_unique, reply_score, score_form
from veneer.train.rewards.limited import LimitedFunction, ScoreInput
from veneer.train.rewards.sandbox import Sandbox
from veneer.train.rewards.template import FILLED, NoValue, TextTooLong, filled, template_problem
from veneer.train.rewards.text_scores import bleu, fuzzy, gleu, rouge

_SOURCE = 64 << 10
"""Maximum characters of the python sources in a grader, all together.

Parsing them takes 50 ms at most, and holds the GIL."""
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
    ]  # cosine needs an embedding model, and OpenAI supports it for evals only


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
        try:
            names = {getattr(statement, "name", "") for statement in ast.parse(source).body}
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            raise ValueError(f"the source is not valid Python: {at}{getattr(error, 'msg', error)}") from None
        if "grade" not in names:
            raise ValueError("the source defines no function grade(sample, item)")
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
        """Return graders by name; a single grader gets its own name, as at OpenAI.

        Checks the total size of the sources before any of them is parsed."""
        if isinstance(value, Mapping) and isinstance(value.get("type"), str) and isinstance(value.get("name"), str):
            value = {value["name"]: dict(value)}
        singles = value.values() if isinstance(value, Mapping) else ()
        sources = [each.get("source") for each in singles if isinstance(each, Mapping)]
        if sum(len(source) for source in sources if isinstance(source, str)) > _SOURCE:
            raise ValueError(f"the sources of its python graders have more than {_SOURCE:,} characters together")
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
    """Parse a JSON grader. Raises ConfigError naming the invalid key."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in _TYPES:
        problem = f"{quoted(str(kind))} is not a type of grader" if kind else "a grader needs a type"
        raise ConfigError(problem, where=where, fix=f"there are {', '.join(_TYPES)}")
    try:
        return _ADAPTER.validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"] if part not in _TYPES]
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(message, where=".".join([where, *path])) from None


def has_python(value: Any) -> bool:
    """Return whether an unparsed JSON grader is a python grader or contains one."""
    inner = value.get("graders") if isinstance(value, Mapping) else None
    graders = [value, inner, *(inner.values() if isinstance(inner, Mapping) else ())]
    return any(isinstance(each, Mapping) and each.get("type") == "python" for each in graders)


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
        raise ValueError(f"calculate_output is not a formula: {quoted(text)}") from None

    def compiled(node: ast.AST) -> Callable[[Mapping[str, float]], float]:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = float(node.value)  # type: ignore[arg-type]
            return lambda values: value
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise ValueError(f"calculate_output names {quoted(node.id)}, and no grader is called so")
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
        if grader_models(grader) and ask is None:
            raise ConfigError("no model is available for score_model", where=grader.name, fix="name a server: `url`")
        self.grader, self._ask = grader, ask
        sources = {n: each.source for n, each in single_graders(grader).items() if isinstance(each, PythonGrader)}
        how: dict[str, Any] = {"timeout": timeout, "memory": _MEMORY / max(1, len(sources)), "sandbox": sandbox}
        self._functions = {name: LimitedFunction("grade", source=source, **how) for name, source in sources.items()}

    def __enter__(self) -> GraderRun:
        return self

    def __exit__(self, *_: object) -> None:
        for function in self._functions.values():
            function.close()

    def grade(self, inputs: Sequence[ScoreInput]) -> list[Grade]:
        """Return a grade for each (sample, item).

        Raises UnavailableError if the model server is unavailable."""
        grades_by_name = {name: self._grades(name, each, inputs) for name, each in single_graders(self.grader).items()}
        if not isinstance(self.grader, MultiGrader):
            return grades_by_name[""]
        formula = _parse_formula(self.grader.calculate_output, self.grader.graders)
        return [
            _together(formula, {name: grades[i] for name, grades in grades_by_name.items()}) for i in range(len(inputs))
        ]

    def _grades(self, name: str, grader: Any, inputs: Sequence[ScoreInput]) -> list[Grade]:
        if isinstance(grader, PythonGrader):
            return self._by_function(name, inputs)
        scores: list[Any] = []
        for sample, item in inputs:
            try:
                if isinstance(grader, ScoreModelGrader):
                    scores.append(_question(grader, sample, item))
                else:
                    scores.append(Grade(_of_texts(grader, sample, item)))
            except TextTooLong as error:
                scores.append(Grade(None, {TOO_LARGE: str(error)}))
            except NoValue as error:
                word = "sample_parse_error" if error.of_sample else "invalid_variable_error"
                scores.append(Grade(0.0 if error.of_sample else None, {word: str(error)}))
        questions = [each for each in scores if isinstance(each, Question)]
        if not questions:
            return scores
        assert self._ask is not None
        replies = iter(ask_unique(self._ask, questions))
        return [_of_reply(next(replies), grader) if isinstance(each, Question) else each for each in scores]

    def _by_function(self, name: str, inputs: Sequence[ScoreInput]) -> list[Grade]:
        try:
            scores = self._functions[name].score(inputs)
        except ConfigError as error:  # the source cannot be loaded, whatever the sample
            return [Grade(None, {"python_grader_runtime_error": error.what})] * len(inputs)
        return [
            Grade(score.value)
            if score.value is not None and math.isfinite(score.value)
            else Grade(None, {"python_grader_runtime_error": score.error or f"it gave {score.value}"})
            for score in scores
        ]


def _question(grader: ScoreModelGrader, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Question:
    """Return the question: the grader's filled messages and the required answer form.

    The `result` of the answer is the grade. Raises NoValue, TextTooLong."""
    messages: list[dict[str, str]] = []
    left = FILLED
    for message in grader.input:
        content = filled(message.text, sample, item, left)
        left -= len(content)
        messages.append({"role": message.role, "content": content})
    instruction, form = score_form(*grader.bounds)
    if messages[0]["role"] in ("system", "developer"):
        messages[0] |= {"content": f"{messages[0]['content']}\n\n{instruction}"}
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


def _of_reply(reply: Reply, grader: ScoreModelGrader) -> Grade:
    usage = {grader.model: reply.usage}
    if reply.error:
        word = "model_grader_refusal_error" if reply.refused else "model_grader_server_error"
        return Grade(None, {word: reply.error}, usage=usage)
    value = reply_score(reply, *grader.bounds)
    if isinstance(value, str):
        return Grade(None, {"model_grader_parse_error": value}, usage=usage)
    return Grade(value, usage=usage)


def _of_texts(
    grader: StringCheckGrader | TextSimilarityGrader, sample: Mapping[str, Any], item: Mapping[str, Any]
) -> float:
    text, reference = filled(grader.input, sample, item), filled(grader.reference, sample, item)
    if isinstance(grader, StringCheckGrader):
        match grader.operation:
            case "eq":
                return float(text == reference)
            case "ne":
                return float(text != reference)
            case "like":
                return float(reference in text)
            case "ilike":
                return float(reference.casefold() in text.casefold())
    if max(len(text), len(reference)) > _COMPARED:
        raise TextTooLong(f"text_similarity compares texts of up to {_COMPARED:,} characters")
    metric = grader.evaluation_metric
    if metric.startswith("rouge_"):
        return rouge(text, reference, f"rouge{metric.removeprefix('rouge_').upper()}")
    return {"fuzzy_match": fuzzy, "bleu": bleu, "gleu": gleu}[metric](text, reference)


def _together(formula: Callable[[Mapping[str, float]], float], grades: Mapping[str, Grade]) -> Grade:
    errors: dict[str, str] = {}
    usage: dict[str, Counter[str]] = {}
    for name, grade in grades.items():
        for word, text in grade.errors.items():
            errors.setdefault(word, f"{name}: {text}")
        for model, took in grade.usage.items():
            usage.setdefault(model, Counter()).update(took)
    parts = {name: grade.value for name, grade in grades.items() if grade.value is not None}
    value = None
    if len(parts) == len(grades):
        try:
            value = float(formula(parts))
        except (ArithmeticError, ValueError, RecursionError) as error:
            errors["other_error"] = f"calculate_output: {error}"
        if value is not None and not math.isfinite(value):
            value, errors["other_error"] = None, f"calculate_output gave {value}"
    return Grade(value, errors, parts, usage)
