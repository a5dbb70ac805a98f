"""JSON bodies, read strictly and within bounds: what a body holds is counted before anything is made of it.

    router = APIRouter(route_class=BodyRoute)      its routes' bodies are read here
    read_json(data)                                the same for bytes

Eight megabytes of text are one value; eight megabytes of `[],` are millions, each of them dearer in memory than its
bytes by a factor of twenty. So values and depth are counted in the bytes (numpy, without the interpreter's lock), and
large bodies are read in a thread. A key that is there twice is an error: which of the two was meant is anybody's guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from veneer.serve.http.errors import invalid

__all__ = ["BodyRoute", "count", "read_body", "read_json"]

VALUES = 1 << 18
"""Values a body may hold, keys among them: two prompts of 128 thousand tokens as numbers."""
DEPTH = 64
"""How deep a body's lists and objects may stand in one another."""
LARGE = 64 << 10
"""Bytes from which a body is read in a thread."""
CHUNK = 1 << 20

_NEXT, _OPEN, _CLOSE = 1, 2, 3
_KINDS = np.zeros(256, dtype=np.uint8)
_KINDS[list(b",:")] = _NEXT
_KINDS[list(b"[{")] = _OPEN
_KINDS[list(b"]}")] = _CLOSE
_STEP = np.array([0, 0, 1, -1], dtype=np.int8)
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def count(data: bytes, values: int = VALUES, depth: int = DEPTH) -> tuple[int, int]:
    """(values and keys, the deepest nesting) of JSON, or of as much of it as passes one of the bounds."""
    found, level, deepest = 1, 0, 0
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
        found += int(np.count_nonzero(kinds)) - int(np.count_nonzero(kinds == _CLOSE))
        steps = _STEP[kinds[kinds >= _OPEN]]
        if len(steps):
            levels = np.cumsum(steps, dtype=np.int32)
            deepest = max(deepest, level + int(levels.max()))
            level += int(levels[-1])
        if found > values or deepest > depth:
            break
    return found, deepest


def _unescaped(part: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], bool]:
    """1 where a text begins or ends, uint8; and whether the first byte after this part is escaped."""
    ends = (part == _QUOTE).view(np.uint8)
    at = np.flatnonzero(part == _BACKSLASH)
    if not len(at):
        return ends, False
    begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)  # of runs of backslashes
    lengths = np.diff(begins, append=len(at))
    order = np.arange(len(at)) - np.repeat(begins, lengths)
    after = at[order % 2 == 0] + 1
    ends[after[after < len(part)]] = 0
    return ends, bool(after[-1] == len(part))


def read_json(data: bytes) -> Any:
    """Raises Refused (400) that says what is wrong with it."""
    values, depth = count(data)
    if values > VALUES:
        raise invalid(f"the body holds more than {VALUES:,} values", fix="send less at once")
    if depth > DEPTH:
        raise invalid(f"the body's lists and objects stand more than {DEPTH} deep in one another")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # a number of thousands of digits
        raise invalid("the body is not JSON: a number is too long") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid(f"the key {twice[:100]!r} is there twice", twice[:100], "keep one")
    return made


def _no_constant(name: str) -> Any:
    raise invalid(f"the body is not JSON: {name} is no number")


async def read_body(request: Request) -> Any:
    """A request's JSON; that of a large one is read in a thread."""
    data = await request.body()
    place = request.scope.get("veneer.place")
    if len(data) < LARGE or place is None:
        return read_json(data)
    return await place.work(len(data), lambda: read_json(data))


class BodyRoute(APIRoute):
    """A route whose JSON body is read by `read_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None and await request.body() and _is_json(request):
                request._json = await read_body(request)
            return await handler(request)

        return handle


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
