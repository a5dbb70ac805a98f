"""Route classes for handlers that run in threads and return JSON values."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any, TypeVar

from starlette.responses import Response

from veneer.errors import ConfigError
from veneer.serve.http.bodies import BodyRoute
from veneer.serve.http.errors import Json, in_thread
from veneer.serve.request import invalid

T = TypeVar("T")


def thread_route(label: str) -> type[BodyRoute]:
    """Return a route class whose synchronous handlers run in a thread.

    `label` names the resource in errors. A synchronous handler returns JSON values, None (204) or a response.
    A ConfigError becomes a 400 response."""

    class ThreadRoute(BodyRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            if not inspect.iscoroutinefunction(endpoint):
                endpoint = _threaded(label, endpoint)
            super().__init__(path, endpoint, **options | {"response_model": None})

    return ThreadRoute


def _threaded(label: str, endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def run(**values: Any) -> Response:
        result = await blocking(label, partial(endpoint, **values))
        if isinstance(result, Response):
            return result
        return Response(status_code=204) if result is None else Json(result)

    return run


async def blocking(
    label: str, do: Callable[[], T], run: Callable[[Callable[[], T]], Awaitable[T]] = asyncio.to_thread
) -> T:
    """Call `do` in a thread and return its result.

    label: names the resource in errors.
    run: async function that calls `do` in a thread.

    Raises Refused: 400 for a ConfigError; any other error becomes "unavailable" or an internal error."""

    return await in_thread(label, do, run, {ConfigError: lambda error: invalid(error.what, error.where, error.fix)})
