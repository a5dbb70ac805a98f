"""JSON bodies: strict parsing, within limits, into pydantic models that never drop a key silently.

    router = APIRouter(route_class=BodyRoute)      parses the bodies of its routes
    read_json(data)                                parses bytes in the same way
    class Load(Body): …                            declares the keys of a route's body

Eight megabytes of text are one value, but eight megabytes of `[],` are millions of values that need twenty
times as much memory. So values and nesting are first counted in the bytes (in numpy, without the GIL), and
large bodies are parsed in a thread. A duplicate key is an error.

There are four kinds of keys: fields, which are applied; keys in `ignored`, which have no effect and are
listed in the response's `x-veneer-ignored` header; keys in `refused`, for which any value except null and a
neutral value is an error; and unknown keys, for which the error suggests the nearest name.

Validation work is bounded: an object has at most `KEYS` keys; a list has a maximum length (`at_most`), and
its validation stops at the first error; a union checks only the type that matches the value.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from fastapi.routing import APIRoute, APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from veneer.errors import ConfigError, nearest
from veneer.formats.strengths import split_strength
from veneer.serve.http.guard import media_type, permissions_of, principal_of
from veneer.serve.principal import Permission
from veneer.serve.request import Refused, invalid

VALUES = 1 << 18
"""Maximum number of values and keys in a body: enough for two prompts of 128 thousand token ids."""
DEPTH = 64
"""Maximum nesting of lists and objects in a body."""
LARGE_BODY = 64 << 10
"""Size in bytes from which a body is parsed in a thread."""
CHUNK = 1 << 20
KEYS = 256
"""Maximum number of keys in an object with known keys."""
ITEMS = 4096
"""Maximum number of items in a list that has no limit of its own."""

_NEXT, _OPEN, _CLOSE = 1, 2, 3
_KINDS = np.zeros(256, dtype=np.uint8)
_KINDS[list(b",:")] = _NEXT
_KINDS[list(b"[{")] = _OPEN
_KINDS[list(b"]}")] = _CLOSE
_STEP = np.array([0, 0, 1, -1], dtype=np.int8)
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def count_values(data: bytes, values: int = VALUES, depth: int = DEPTH) -> tuple[int, int]:
    """Return (number of values and keys, maximum nesting) of a JSON text.

    Stops counting once a limit is exceeded."""
    values_found, level, deepest = 1, 0, 0
    inside, escaped = np.uint8(0), False
    for start in range(0, len(data), CHUNK):
        part = np.frombuffer(data, np.uint8, min(CHUNK, len(data) - start), start)
        if escaped:
            part = part[1:]
        ends, escaped = _unescaped(part)
        outside = (np.bitwise_xor.accumulate(ends) ^ inside) == 0 if len(ends) else ends
        if len(ends):
            inside ^= np.bitwise_xor.reduce(ends)
        kinds = _KINDS[part] * outside
        values_found += int(np.count_nonzero(kinds)) - int(np.count_nonzero(kinds == _CLOSE))
        steps = _STEP[kinds[kinds >= _OPEN]]
        if len(steps):
            levels = np.cumsum(steps, dtype=np.int32)
            deepest = max(deepest, level + int(levels.max()))
            level += int(levels[-1])
        if values_found > values or deepest > depth:
            break
    return values_found, deepest


def _unescaped(part: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], bool]:
    """Find the quotes that start or end a string in a part of a JSON text.

    Returns (uint8 array with 1 at each such quote, whether the byte after this part is escaped)."""
    ends = (part == _QUOTE).view(np.uint8)
    at = np.flatnonzero(part == _BACKSLASH)
    if not len(at):
        return ends, False
    begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)  # starts of runs of backslashes
    lengths = np.diff(begins, append=len(at))
    order = np.arange(len(at)) - np.repeat(begins, lengths)
    after = at[order % 2 == 0] + 1
    ends[after[after < len(part)]] = 0
    return ends, bool(after[-1] == len(part))


def read_json(data: bytes) -> Any:
    """Parse JSON. Raises Refused (400) that names the problem."""
    values, depth = count_values(data)
    if values > VALUES:
        raise invalid(f"the body holds more than {VALUES:,} values", fix="send less at once")
    if depth > DEPTH:
        raise invalid(f"the body's lists and objects are nested more than {DEPTH} deep")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # a number with thousands of digits
        raise invalid("the body is not JSON: a number is too long") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        visited: set[str] = set()
        twice = next(key for key, _ in pairs if key in visited or visited.add(key))  # type: ignore[func-returns-value]
        raise invalid(f"the key {twice[:100]!r} is given twice", twice[:100], "keep one")
    return merged


def _no_constant(name: str) -> Any:
    raise invalid(f"the body is not JSON: {name} is not a valid JSON number")


async def read_body(request: Request) -> Any:
    """Return a request's parsed JSON. Parses a large body in a thread."""
    data = await request.body()
    admitted = request.scope.get("veneer.admitted")
    if len(data) < LARGE_BODY or admitted is None:
        return read_json(data)
    return await admitted.work(len(data), lambda: read_json(data))


class BodyRoute(APIRoute):
    """A route that checks its permission (`needs`) before it reads and parses its JSON body (`read_body`)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        permissions: list[Permission | None] = [*permissions_of(self.dependencies)] or [None]

        async def handle(request: Request) -> Response:
            for permission in permissions:
                principal_of(request.scope).require(permission)
            if self.body_field is not None and await request.body() and _is_json(request.headers):
                request._json = await read_body(request)
            return await handler(request)

        return handle


def check_guarded(router: APIRouter) -> None:
    """Raise ValueError for a route that declares no permission, or that does not use `BodyRoute`.

    Only a `BodyRoute` checks the permission before it reads the body."""
    for route in router.routes:
        if not isinstance(route, BodyRoute) or not permissions_of(route.dependencies):
            raise ValueError(f"the route {getattr(route, 'path', route)} declares no permission")


def _is_json(headers: Headers) -> bool:
    kind = media_type(headers)
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


# -- models ------------------------------------------------------------------------------------------------------------

FAIL_FAST = Field(fail_fast=True)
"""Makes a list stop at its first error."""


def at_most(n: int) -> BeforeValidator:
    """Return a validator that checks the length of a list or object before its items."""

    def check_length(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > n:
            counts = {"have": len(value), "most": n}
            raise PydanticCustomError("too_long", "{have} items; at most {most} are allowed", counts)
        return value

    return BeforeValidator(check_length)


class Strict(BaseModel):
    """An object with known keys, and a limit on their number."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > KEYS:
            raise PydanticCustomError("too_long", "an object has more than {most} keys", {"most": KEYS})
        return data


class Body(Strict):
    """A request body, or an object inside one.

    `ignored`: keys without effect, which the body reports with those of the objects inside it. `refused`: key
    -> the only value that is accepted besides null.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, Any]] = {}
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _sort_keys(cls, data: Any, build: Callable[[Any], Any]) -> Any:
        if not isinstance(data, dict) or len(data) > KEYS:
            return build(data)
        for key in sorted(set(data) & set(cls.refused)):
            if data[key] is not None and data[key] != cls.refused[key]:
                raise PydanticCustomError("unsupported", "{key} is not supported: leave it out", {"key": key})
        passed = set(data) & cls.ignored
        model = build({key: value for key, value in data.items() if key not in passed and key not in cls.refused})
        inner = [each for value in vars(model).values() for each in (value if isinstance(value, list) else [value])]
        names = {name for each in inner if isinstance(each, Body) for name in each._ignored}
        model._ignored = sorted(names | {key for key in passed if data[key] is not None})
        return model

    def ignore(self, key: str) -> None:
        """Report a key as ignored."""
        self._ignored = sorted({*self._ignored, key})

    @property
    def headers(self) -> dict[str, str]:
        return {"x-veneer-ignored": ", ".join(self._ignored)} if self._ignored else {}


# -- values shared by several surfaces ---------------------------------------------------------------------------------

Objects = Annotated[list[dict[str, Any]], FAIL_FAST, at_most(ITEMS)]


class MixPart(Strict):
    """An adapter with its strength. Can also be given as a text such as "name:0.8"."""

    adapter: str = Field(min_length=1, max_length=512)
    strength: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _parse_text(cls, value: Any) -> Any:
        try:
            return cls.fields_of(value) if isinstance(value, str) else value
        except ConfigError as error:
            raise PydanticCustomError("strength", "{text}", {"text": f"{error.what}: {error.fix}"}) from error

    @classmethod
    def fields_of(cls, text: str) -> dict[str, Any]:
        """Return the fields that a text such as "name:0.8" stands for. Raises ConfigError."""
        name, strength = split_strength(text)
        return {"adapter": name} if strength is None else {"adapter": name, "strength": strength}


MixField = Annotated[
    list[MixPart],
    FAIL_FAST,
    Field(max_length=64, description='[{"adapter": name, "strength": 0.8}] or ["name:0.8"]'),
    at_most(64),
]


def mix_of(parts: Sequence[MixPart] | None) -> list[tuple[str, float]] | None:
    """Return (name, strength) of each part of a body's `mix`, or None without a mix."""
    return None if parts is None else [(part.adapter, part.strength) for part in parts]


def checked(model: type[BaseModel], value: Any, param: str) -> Any:
    """Validate `value`, an object inside a body, with a model. Raises Refused (400)."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join([param, *map(str, first["loc"])])
        raise invalid(problem_text(where, first), param) from error


# -- validation errors -------------------------------------------------------------------------------------------------


_PLAIN = [
    (re.compile(r"^Value error, |, unable to parse string as an? \w+|, got a number with a fractional part"), ""),
    (re.compile(r"^(Input|Value|String|List|Tuple|Set|Dictionary) should (?=be|have|match)"), "must "),
    (re.compile(r"^Field required$"), "is required"),
]
"""Patterns in pydantic's messages -> their plainer replacements."""


def problem_text(where: str, problem: Mapping[str, Any]) -> str:
    """Return the text of one pydantic error in plain words.

    `where`: the key; "" for the whole body.
    """
    text = str(problem["msg"])
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    if not where:
        return text
    return f"{where} {text}" if text.startswith(("must ", "is ")) else f"{where}: {text}"


def body_error(errors: Iterable[Mapping[str, Any]], known_keys: Iterable[str]) -> Refused:
    """Combine pydantic's errors into one error.

    `known_keys`: the body's keys, to suggest the nearest name for an unknown key.
    """
    problems = list(errors)
    texts: list[str] = []
    names = list(known_keys)
    for problem in problems[:5]:
        inside = problem["loc"][problem["loc"][:1] in (("body",), ("query",)) :]
        where = ".".join(str(part) for part in inside if not str(part).startswith("="))
        if problem["type"] == "extra_forbidden":
            suggestions = [name for name in nearest(str(problem["loc"][-1]), names, n=1) if name != where]
            texts.append(f"unknown key {where!r}" + (f", did you mean {suggestions[0]!r}?" if suggestions else ""))
        elif problem["type"] == "missing" and not where:
            texts.append("the request has no body: a JSON object is expected")
        elif not where and isinstance(problem.get("input"), bytes):
            texts.append("the Content-Type is not JSON: send Content-Type: application/json")
        elif problem["type"] in ("model_attributes_type", "dict_type", "model_type"):
            texts.append(f"{where or 'the body'}: a JSON object is expected")
        else:
            texts.append(problem_text(where, problem))
    if len(problems) > 5:
        texts.append(f"and {len(problems) - 5} more")
    first = next((str(part) for p in problems for part in p["loc"][1:2] if isinstance(part, str)), None)
    return invalid("; ".join(dict.fromkeys(texts)) or "the body is not valid", first)


def keys_of_bodies(endpoint: Any) -> list[str]:
    """Return every key that a route's body can have, to suggest the nearest name."""
    try:
        kinds = typing.get_type_hints(endpoint).values()
    except (NameError, TypeError):
        return []
    return sorted(set(_keys(kinds)))


def _keys(kinds: Iterable[Any]) -> Iterable[str]:
    """Yield the keys of all models that these types contain."""
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            yield from _keys(typing.get_args(kind))
            continue
        for name, field in kind.model_fields.items():
            yield field.alias or name
            yield from _keys([field.annotation])
        if issubclass(kind, Body):
            yield from (*kind.ignored, *kind.refused)
