"""Formats `Refused` errors for each API, each in the API's own body.

A route's first tag names its API, and thereby the format. The status is the error's own, unless the API uses
another (TGI: 422 for an invalid request, 424 for a failed generation).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.responses import Response

from veneer.errors import MissingExtraError, VeneerError
from veneer.serve.request import Refused
from veneer.serve.transient import internal_error

log = logging.getLogger("veneer.serve")

_T = TypeVar("_T")


class Json(Response):
    """A JSON response.

    The content must not contain NaN. A lone surrogate becomes "?" instead of an error.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def message_of(error: VeneerError) -> str:
    """Return the message and the fix of an error as one text.

    A missing extra's fix is the operator's: it can name folders of the server."""
    secret = isinstance(error, MissingExtraError)
    return f"{error.what.rstrip('.')}: {error.fix}" if error.fix and not secret else error.what


def as_refused(error: Exception) -> Refused:
    """Return the client's error for an exception.

    An unexpected exception is logged in full, under an id that the client's error names.
    """
    if isinstance(error, Refused):
        return error
    return internal_error("the server", error)


# -- bodies ------------------------------------------------------------------------------------------------------------

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OPENAI_CODES = {"context_exceeded": "context_length_exceeded", "rate_limited": "rate_limit_exceeded"}
_OPENAI_CODES["unauthorized"] = "invalid_api_key"
"""This server's code -> OpenAI's, which OpenAI's clients check."""


def _openai(error: Refused) -> tuple[int, Any]:
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    status = 400 if error.status == 422 else error.status
    code = _OPENAI_CODES.get(error.code, error.code)
    return status, {"error": {"message": message_of(error), "type": kind, "param": error.param, "code": code}}


_VLLM_TYPES = {400: "BadRequestError", 422: "BadRequestError", 404: "NotFoundError", 401: "UnauthorizedError"}
_VLLM_TYPES |= {403: "ForbiddenError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


def _vllm(error: Refused) -> tuple[int, Any]:
    kind = _VLLM_TYPES.get(error.status, "BadRequestError" if error.status < 500 else "InternalServerError")
    if error.code in ("adapter_exists", "invalid_request"):
        kind = "InvalidUserInput"
    status = 400 if error.status == 422 else error.status
    flat = {"message": message_of(error), "type": kind, "param": error.param, "code": status}
    # Older versions of vLLM did not nest the error. production-stack's controller still reads `type` and
    # `message` at the top (operator/internal/controller/loraadapter_controller.go).
    return status, {"error": flat, "object": "error", **flat}


def _dynamo_error(error: Refused) -> tuple[int, Any]:
    return (400 if error.status == 422 else error.status), {"status": "error", "message": message_of(error)}


def _tgi(error: Refused) -> tuple[int, Any]:
    status, kind = error.status, error.code
    if error.status == 400:
        status, kind = 422, "validation"
    elif error.status == 422:
        kind = "validation"
    elif error.status == 500:
        status, kind = 424, "generation"
    elif error.status in (429, 503) and error.code == "overloaded":
        status, kind = 429, "overloaded"
    return status, {"error": message_of(error), "error_type": kind}


def _sglang(error: Refused) -> tuple[int, Any]:
    status = error.status if error.status in (401, 403, 413, 429, 503) else 400
    return status, {"success": False, "error_message": message_of(error), "loaded_adapters": {}}


def _ollama(error: Refused) -> tuple[int, Any]:
    return (400 if error.status == 422 else error.status), {"error": message_of(error)}


_ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC_TYPES |= {413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error"}


def _anthropic(error: Refused) -> tuple[int, Any]:
    """Anthropic's clients raise OverloadedError for 529 only, so 529 replaces 503."""
    status = {422: 400, 503: 529}.get(error.status, error.status)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": message_of(error)}}


_FORMS: dict[str, Callable[[Refused], tuple[int, Any]]] = {
    "OpenAI": _openai,
    "Anthropic": _anthropic,
    "vLLM": _vllm,
    "TGI": _tgi,
    "SGLang": _sglang,
    "AIBrix": _vllm,
    "Dynamo": _dynamo_error,
    "Ollama": _ollama,
}


def error_body(error: Refused, surface: str) -> tuple[int, Any]:
    """Return (status, body) for an error in an API's format. Unknown APIs get OpenAI's format."""
    status, body = _FORMS.get(surface, _openai)(error)
    if surface.startswith("OpenAI") and (error.status, error.code) == (404, "not_found"):
        body["error"]["code"] = None  # OpenAI's "not found" errors have no code, except for models and jobs
    return status, body


def answer_error(error: Refused, surface: str, request_id: str = "") -> Json:
    status, body = error_body(error, surface)
    if surface == "Anthropic":
        body["request_id"] = request_id
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif status in (429, 503, 529):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Json(body, status_code=status, headers=headers)


KnownErrors = Mapping[type[Exception], Callable[[Any], Refused | None]]
"""Exception type -> the client's error, or None for an outage or internal error."""


@contextmanager
def answering(resource: str, known_errors: KnownErrors = MappingProxyType({})) -> Iterator[None]:
    """Convert exceptions into errors for the client.

    `resource`: the part of the server that is used inside the block; the errors for outages and internal
    errors name it. `known_errors`: exceptions that the request can cause; the first matching type applies.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        answer = next((known_errors[kind] for kind in known_errors if isinstance(error, kind)), lambda error: None)
        raise answer(error) or internal_error(resource, error) from error


async def in_thread(
    resource: str,
    do: Callable[[], _T],
    run: Callable[[Callable[[], _T]], Awaitable[_T]] = asyncio.to_thread,
    known_errors: KnownErrors = MappingProxyType({}),
) -> _T:
    """Call `run(do)`, by default in a thread, and convert errors as `answering` does."""
    with answering(resource, known_errors):
        return await run(do)
