"""Bodies: pydantic models in which nothing is silent.

A key is a field, and honoured; or in `ignored`, harmless, and named in the answer's `x-veneer-ignored` header; or in
`refused`, where any value but its neutral ones is an error with the reason; or unknown, an error with the nearest name.

Whatever is wrong with a body, little is said of it: an object has at most `KEYS` keys, a list has a bound (`at_most`)
and ends at its first error, and of several kinds of value the one is checked that the value looks like.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from veneer.errors import ConfigError
from veneer.serve.http.errors import invalid
from veneer.serve.http.prompts import Prompts
from veneer.serve.request import Sampling

__all__ = [
    "FIRST",
    "ITEMS",
    "Bias",
    "Biases",
    "Body",
    "Grammar",
    "Ids",
    "Lora",
    "MixField",
    "Objects",
    "Paths",
    "Seed",
    "Stop",
    "Strict",
    "TextOrIds",
    "Texts",
    "TokenId",
    "at_most",
    "bias_of",
    "checked",
    "choices_regex",
    "one_grammar",
    "sampling",
    "schema_text",
    "stops_of",
]

Grammar = tuple[Literal["json_schema", "json_object", "regex"], str]
Neutral = tuple[Any, ...]

_LONGEST_GRAMMAR = 200_000
KEYS = 256
"""Keys that an object of a body may have, where they have names."""
ITEMS = 4096
"""What a list of a body may hold that has no bound of its own."""


FIRST = Field(fail_fast=True)
"""A list that ends at its first error."""


def at_most(n: int) -> BeforeValidator:
    """A list or an object is counted before anything in it is looked at."""

    def counted(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > n:
            raise PydanticCustomError("too_long", "there are {have} of them, and at most {most} may be", {
                "have": len(value), "most": n
            })  # fmt: skip
        return value

    return BeforeValidator(counted)


class Strict(BaseModel):
    """An object with known keys, and no more of them than can be told apart."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > KEYS:
            raise PydanticCustomError("too_long", "an object has more than {most} keys", {"most": KEYS})
        return data


class Body(Strict):
    """A request's body. `refused`: key -> (neutral values, why any other cannot be honoured)."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, tuple[Neutral, str]]] = {}
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _sort_keys(cls, data: Any, build: Callable[[Any], Any]) -> Any:
        if not isinstance(data, dict) or len(data) > KEYS:
            return build(data)
        for key in sorted(set(data) & set(cls.refused)):
            neutral, why = cls.refused[key]
            if data[key] is not None and not any(data[key] == value for value in neutral):
                text = f"{key} cannot be honoured: {why}"
                raise PydanticCustomError("not_honoured", "{text}", {"text": text, "param": key})
        passed = set(data) & cls.ignored
        model = build({key: value for key, value in data.items() if key not in passed and key not in cls.refused})
        model._ignored = sorted(key for key in passed if data[key] is not None)
        return model

    @property
    def headers(self) -> dict[str, str]:
        return {"x-veneer-ignored": ", ".join(self._ignored)} if self._ignored else {}


# -- values ------------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[dict[str, float], at_most(1024)]


def _kind(value: Any) -> str:
    """Which of the four forms of a prompt this is meant to be."""
    if not isinstance(value, list):
        return "=text"
    first = value[0] if value else ""
    return "=ids" if isinstance(first, int | float) else "=texts" if isinstance(first, str) else "=lists"


def _one_or_several(value: Any) -> str:
    return "=several" if isinstance(value, list) else "=one"


Object = dict[str, Any]
Objects = Annotated[list[Object], FIRST, at_most(ITEMS)]
Ids = Annotated[list[TokenId], FIRST]
Texts = Annotated[
    Annotated[str, Tag("=text")]
    | Annotated[Ids, Tag("=ids")]
    | Annotated[list[str], FIRST, at_most(ITEMS), Tag("=texts")]
    | Annotated[list[Ids], FIRST, at_most(ITEMS), Tag("=lists")],
    Discriminator(_kind),
]
"""OpenAI's prompts: a text or token ids, or a list of either. Tags begin with = as they are no part of a body: no error
names one."""
Stop = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[str], FIRST, at_most(KEYS), Tag("=several")],
    Discriminator(_one_or_several),
]
Paths = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[str | None], FIRST, at_most(ITEMS), Tag("=several")],
    Discriminator(_one_or_several),
]
"""SGLang's lora_path: one name, or one for each prompt."""
TextOrIds = Annotated[
    Annotated[str, Tag("=one")] | Annotated[list[TokenId | str], FIRST, Tag("=several")],
    Discriminator(_one_or_several),
]
"""llama.cpp's prompt: a text, or ids and texts in a row."""
Biases = Annotated[
    Annotated[Bias, Tag("=one")]
    | Annotated[list[tuple[int | str, float | bool]], FIRST, at_most(1024), Tag("=several")],
    Discriminator(_one_or_several),
]
"""llama.cpp's logit_bias: an object as OpenAI's, or pairs."""


class Part(Strict):
    adapter: str = Field(min_length=1, max_length=512)
    strength: float = 1.0


class Lora(Strict):
    """llama.cpp's way to name an adapter: its number in GET /lora-adapters, and a scale."""

    id: int
    scale: float = 1.0


def _parts(value: Any) -> Any:
    """[{"adapter", "strength"}], {"name": strength} or ["name:strength"], as a list of parts."""
    if isinstance(value, dict):
        return [{"adapter": name, "strength": strength} for name, strength in value.items()]
    if isinstance(value, list):
        return [_part(item) if isinstance(item, str) else item for item in value]
    return value


def _part(text: str) -> dict[str, Any]:
    name, colon, strength = text.rpartition(":")
    try:
        return {"adapter": name, "strength": float(strength)} if colon and name else {"adapter": text}
    except ValueError:
        return {"adapter": text}


MixField = Annotated[
    list[Part],
    FIRST,
    Field(max_length=64, description='[{"adapter": name, "strength": 0.8}], ["name:0.8"] or {"name": 0.8}'),
    BeforeValidator(_parts),
    at_most(64),
]


# -- what is made of them ----------------------------------------------------------------------------------------------


def sampling(**values: Any) -> Sampling:
    """A Sampling; None leaves the default. Raises Refused(400) that names the value out of range."""
    try:
        return Sampling(**{key: value for key, value in values.items() if value is not None})
    except ConfigError as error:
        raise invalid(error.what, error.where, error.fix) from error


def stops_of(stop: Stop | None, most: int) -> tuple[str, ...]:
    stops = tuple([stop] if isinstance(stop, str) else stop or [])
    if len(stops) > most:
        raise invalid(f"stop has {len(stops)} texts", "stop", f"at most {most}")
    if any(not 0 < len(s) <= 1000 for s in stops):
        raise invalid("a stop text is empty or longer than 1,000 characters", "stop")
    return stops


def bias_of(bias: Bias | None, prompts: Prompts) -> dict[int, float]:
    """Token id -> bias, from JSON's text keys."""
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not math.isfinite(value) or abs(value) > 100:
            raise invalid(f"logit_bias {key[:20]!r}: {value}", "logit_bias", "token id: a number from -100 to 100")
        found[prompts.of_ids([int(key)], "logit_bias")[0]] = value
    return found


def schema_text(schema: Any, param: str) -> str:
    """A JSON schema, given as an object or as text, as text."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not a JSON schema", param) from error
    if not isinstance(found, dict | bool):
        raise invalid(f"{param} is not a JSON schema", param, "an object")
    if len(text) > _LONGEST_GRAMMAR:
        raise invalid(f"{param} has {len(text):,} characters", param, f"at most {_LONGEST_GRAMMAR:,}")
    return text


def choices_regex(choices: Sequence[str]) -> str:
    """A regular expression that matches exactly one of some texts."""
    if not choices or any(not c for c in choices):
        raise invalid("a choice is empty, or there is none", "guided_choice")
    return "(" + "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", c) for c in choices) + ")"


def one_grammar(found: Sequence[Grammar | None]) -> Grammar | None:
    given = [g for g in found if g is not None]
    if len(given) > 1:
        raise invalid("the answer's form is given in several ways", "response_format", "keep one")
    return given[0] if given else None


def checked(model: type[BaseModel], value: Any, param: str) -> Any:
    """`value` as a model, where a body holds one as a plain object."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join([param, *map(str, first["loc"])])
        raise invalid(f"{where}: {first['msg']}", param) from error
