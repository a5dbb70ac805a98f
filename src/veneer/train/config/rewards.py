"""The entries of `reinforcement.rewards`: a list of sections, one per reward.

    rewards:
      - {kind: exact_match, column: answer}
      - {kind: length, most: 200, slack: 50, weight: 0.2}

`REWARD_KINDS` maps each kind to its section. `RewardList` is the type of the field. train/rewards computes
the rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
import regex  # type: ignore[import-untyped]

from veneer.errors import nearest, quoted
from veneer.train.config.section import BASE_MODEL, SERVER_KEYS, Section, changed_keys, setting


class RewardSection(Section):
    """The keys that every reward has. `kind` selects the reward."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Keys whose values are paths, relative to the configuration's folder."""

    kind: str
    name: str | None = setting(None, "name in the log", "its kind", pattern=r"^\w[\w.-]{0,63}$")
    weight: float = setting(1.0, "factor of the score; a negative factor makes it a penalty", ge=-1e6, le=1e6)

    @property
    def called(self) -> str:
        return self.name or self.kind

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> RewardSection:
        if problem := self.problem():
            raise ValueError(problem)
        return self

    def problem(self) -> str:
        """Return the problem of an invalid combination of keys, or ""."""
        return ""


class _Compared(RewardSection):
    column: str = setting("answer", "column with the expected answer", "the row's own answer")


class ExactMatchReward(_Compared):
    """1 if the completion equals the expected text, else 0.

    Outer white space is ignored. JSON is compared by value."""

    kind: Literal["exact_match"]


class JsonSchemaReward(RewardSection):
    """1 if the completion is JSON that matches a schema, else 0."""

    kind: Literal["json_schema"]
    json_schema: dict[str, Any] | None = setting(None, "the schema (JSON Schema 2020-12)")
    column: str | None = setting(None, "column with a schema for each row")

    def problem(self) -> str:
        is_one = (self.json_schema is None) != (self.column is None)
        return "" if is_one else "set exactly one of `json_schema` and `column`"


class JsonFieldsReward(_Compared):
    """The share of the expected JSON object's keys that have equal values in the completion."""

    kind: Literal["json_fields"]


class RegexReward(RewardSection):
    """1 if a regular expression matches the completion, else 0.

    With `column`, the text of the expression's group must also equal the value in the column."""

    kind: Literal["regex"]
    pattern: str = setting(..., "regular expression of the regex package; `.` matches line ends", min_length=1)
    whole: bool = setting(False, "match the entire answer, ignoring outer whitespace")
    column: str | None = setting(
        None, "column whose value must equal the group `answer`, or else the first group, of the last match"
    )

    def problem(self) -> str:
        try:
            compiled = regex.compile(self.pattern)
        except regex.error as error:
            return f"`pattern` is not a regular expression: {error}"
        if self.column is not None and not compiled.groups:
            return "`column` is compared with a group, but `pattern` has none: put the part to compare in parentheses"
        return ""


class LengthReward(RewardSection):
    """1 for a completion of `least` to `most` tokens, falling linearly to 0 at distance `slack`."""

    kind: Literal["length"]
    least: int = setting(0, "shortest answer with score 1", ge=0)
    most: int | None = setting(None, "longest answer with score 1", ge=0)
    slack: int = setting(0, "distance from this range at which the score reaches 0", "0 outside the range", ge=0)

    def problem(self) -> str:
        if self.most is None and not self.least:
            return "give `least`, `most` or both"
        return "`most` is below `least`" if self.most is not None and self.most < self.least else ""


class ModelReward(RewardSection):
    """The keys of rewards that query a model, in this process or on a server."""

    url: str | None = setting(None, "server, as https://api.openai.com/v1", "this process", pattern=r"^https?://\S+$")
    key: str | None = setting(None, "environment variable with the server's key", "none", pattern=r"^[A-Za-z_]\w*$")
    timeout: float = setting(60.0, "seconds per request", gt=0)
    patience: float = setting(600.0, "seconds of outage before the run stops", "survives a restart", ge=0)
    at_once: int = setting(8, "concurrent requests", gt=0, le=256)

    def problem(self) -> str:
        server_keys = [f"`{key}`" for key in changed_keys(self) if key in SERVER_KEYS]
        if self.url is not None or not server_keys:
            return ""
        return f"{', '.join(server_keys)} belong{'s' * (len(server_keys) == 1)} to a server: give its `url`"


class JudgeReward(ModelReward):
    """A number from a model's reply, scaled to the range 0 to 1.

    The model is the base, another adapter, or a model on an OpenAI-compatible server."""

    kind: Literal["judge"]
    prompt: str = setting(
        ...,
        "the judge's prompt: {{ sample.output_text }} is the answer, {{ item.COLUMN }} is a column of the row",
        min_length=1,
    )
    model: str = setting(BASE_MODEL, "base, an adapter (library name or folder) or, with `url`, a model on the server")
    range: tuple[float, float] = setting((0.0, 10.0), "lowest and highest number that the judge can give")
    tokens: int = setting(512, "maximum reply tokens; a truncated reply has no score", gt=0)

    def problem(self) -> str:
        return super().problem() or (
            "" if self.range[0] < self.range[1] else "`range` must begin with the lower number"
        )


class PythonReward(RewardSection):
    """A function in the user's Python file, run in a separate process."""

    paths: ClassVar[tuple[str, ...]] = ("file",)

    kind: Literal["python"]
    file: str = setting(..., "Python file", min_length=1)
    function: str = setting("score", "name of the function: (sample, item) -> number")
    timeout: float = setting(10.0, "seconds for one answer", gt=0)
    memory_gb: float = setting(2.0, "memory of the process, in GB", gt=0)
    at_once: int = setting(1, "concurrent processes; the limits apply to each process", gt=0, le=64)


class GraderReward(ModelReward):
    """A grader of OpenAI's fine-tuning API. A score_model grader queries the model on the server."""

    kind: Literal["grader"]
    grader: dict[str, Any] = setting(..., "string_check, text_similarity, score_model, python or multi")
    sandbox: bool = setting(
        False, "run the grader's Python code in the sandbox; jobs created through OpenAI's routes always do"
    )


class ReasoningGymReward(RewardSection):
    """reasoning-gym's score of a completion.

    Requires `data.train: reasoning-gym:TASK@ROWS`."""

    kind: Literal["reasoning_gym"]
    answer: str | None = setting(
        None, "regular expression; its first group is the final answer", "<answer>…</answer> if present"
    )


_Rule = ExactMatchReward | JsonSchemaReward | JsonFieldsReward | RegexReward | LengthReward
_Program = JudgeReward | PythonReward | GraderReward | ReasoningGymReward
AnyReward = Annotated[_Rule | _Program, pydantic.Field(discriminator="kind")]
REWARD_KINDS: dict[str, type[RewardSection]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(AnyReward)[0])
}


def _distinct(rewards: tuple[RewardSection, ...]) -> tuple[RewardSection, ...]:
    for name, count in Counter(reward.called for reward in rewards).items():
        if count > 1:
            raise ValueError(f"{count} rewards are called {quoted(name)}; give each one a different name")
    return rewards


RewardList = Annotated[tuple[AnyReward, ...], pydantic.AfterValidator(_distinct)]
"""The rewards of a configuration."""


def reward_problem(loc: Sequence[str], error: Mapping[str, Any]) -> str:
    """Return the message for an error in an entry.

    loc: number, kind and key of the entry. The kind and the key can be missing."""
    message, key = str(error["msg"]).removeprefix("Value error, "), loc[2] if len(loc) > 2 else ""
    if len(loc) == 1:
        return f"entry {int(loc[0]) + 1}: {message}"
    fields = REWARD_KINDS[loc[1]].model_fields
    if error["type"] == "extra_forbidden":
        suggestions = [f"did you mean `{name}`?" for name in nearest(key, list(fields), 1)]
        message = f"unknown key `{key}`; {(suggestions or ['valid keys: ' + ', '.join(fields)])[0]}"
    elif error["type"] == "missing":
        message = f"`{key}` is required: {fields[key].description}"
    elif key:
        message = f"`{key}` should be {message.removeprefix('Input should be ')}"
    return f"entry {int(loc[0]) + 1} ({loc[1]}): {message}"


def resolve_reward_paths(entries: Sequence[Any], folder: Path) -> list[Any]:
    """Return the entries with their paths resolved against `folder`."""

    def rooted(entry: Any) -> Any:
        kind = REWARD_KINDS.get(str(entry.get("kind"))) if isinstance(entry, dict) else None
        if kind is None:
            return entry
        paths = {key: entry[key] for key in kind.paths if isinstance(entry.get(key), str)}
        return entry | {key: str(folder.resolve() / Path(value).expanduser()) for key, value in paths.items()}

    return [rooted(entry) for entry in entries]
