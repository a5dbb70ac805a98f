"""/v1/feedback: users' feedback on stored completions, training rows made from it, and deletion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from veneer.serve.http.bodies import FAIL_FAST, Body, BodyRoute, Strict, at_most, checked
from veneer.serve.http.errors import Json, in_thread
from veneer.serve.http.guard import needs
from veneer.serve.http.service import admission_of, caller_of
from veneer.serve.http.text_bodies import Message
from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy.feedback import AnswerFeedback, FeedbackKind, StoredAnswers, feedback_counts, feedback_rows
from veneer.serve.tenancy.store import ALL, Store

_DATABASE = "the tenants' database"
_LARGEST = 1 << 18
"""Maximum characters of a correction as JSON, including tool calls."""


class ChosenOver(Strict):
    id: str | None = Field(
        default=None, max_length=100, description="id of the other answer's completion; by default the same completion"
    )
    choice: int = Field(default=0, ge=0, lt=1 << 31)


class FeedbackBody(Body):
    """Feedback on an answer: thumb, corrected, rejected, or several. null clears a value."""

    id: str = Field(max_length=100, description="id of a chat completion")
    choice: int = Field(default=0, ge=0, lt=1 << 31, description="index of the choice in the completion")
    thumb: Literal["up", "down"] | None = None
    corrected: str | dict[str, Any] | None = Field(default=None, description="the correct answer")
    rejected: Annotated[list[ChosenOver], FAIL_FAST, at_most(64)] | None = Field(
        default=None, description="other answers to the same messages, to which this answer was preferred"
    )

    def feedback(self) -> AnswerFeedback:
        fields = self.model_fields_set & {"thumb", "corrected", "rejected"}
        if not fields:
            raise invalid("the feedback is empty", None, "thumb, corrected or rejected")
        rejected = None if self.rejected is None else tuple((r.id or self.id, r.choice) for r in self.rejected)
        up = None if self.thumb is None else self.thumb == "up"
        names = frozenset("up" if name == "thumb" else name for name in fields)
        return AnswerFeedback(self.id, self.choice, up, self._message(), rejected, names)

    def _message(self) -> dict[str, Any] | None:
        if self.corrected is None:
            return None
        fields = {"content": self.corrected} if isinstance(self.corrected, str) else self.corrected
        message: Message = checked(Message, {"role": "assistant", **fields}, "corrected")
        result = message.model_dump(exclude_none=True)
        if message.role != "assistant" or not (result.get("content") or result.get("tool_calls")):
            raise invalid("a correction is an assistant's message with a text or tool_calls", "corrected")
        if len(json.dumps(result)) > _LARGEST:
            problem = f"a correction has more than {_LARGEST:,} characters"
            raise Refused(problem, status=413, code="too_large", param="corrected")
        return result


def feedback_routes(answers: StoredAnswers) -> APIRouter:
    """Return the routes for a server's stored completions."""
    router = APIRouter(tags=["feedback"], route_class=BodyRoute, dependencies=[needs("feedback")])
    store = answers.store

    @router.post("/v1/feedback", summary="Rate an answer: a thumb, a correction, or other answers that are worse.")
    async def give(request: HttpRequest, body: FeedbackBody) -> Response:
        tenant, feedback = _tenant(request, store), body.feedback()
        return Json(await in_thread(_DATABASE, lambda: answers.give(tenant, feedback)), headers=body.headers)

    @router.get("/v1/feedback", summary="Get counts of stored and rated answers, and the retention period.")
    async def summary(request: HttpRequest) -> Response:
        tenant = _tenant(request, store)

        def count() -> dict[str, int]:
            with store.reading() as c:
                return feedback_counts(c, tenant, answers.wall())

        counts, terms = await in_thread(_DATABASE, count), store.settings.feedback.get(tenant)
        retention = {"days": None, "names": []} if terms is None else {"days": terms.days, "names": list(terms.names)}
        return Json({"object": "feedback.summary", **retention, **counts})

    @router.get("/v1/feedback/rows", summary="Export training rows as JSON lines.")
    async def rows(
        request: HttpRequest,
        kind: FeedbackKind = "supervised",
        adapter: Annotated[str | None, Query(max_length=512)] = None,
    ) -> Response:
        tenant = _tenant(request, store)
        admission_of(request).reserve("answers", 1)  # held until all rows are sent; counts against the tenant's share
        found_rows = feedback_rows(store.engine, tenant, kind, adapter=adapter, now=answers.wall())
        first = await in_thread(
            _DATABASE, lambda: next(found_rows, None)
        )  # read the first row now, so that a database outage can still set the status

        def lines() -> Iterator[str]:
            for row in chain([] if first is None else [first], found_rows):
                yield json.dumps(row) + "\n"

        return StreamingResponse(lines(), media_type="application/jsonl")

    @router.delete("/v1/feedback", summary="Delete the stored answers of a user, one answer, or all answers.")
    async def forget(
        request: HttpRequest,
        user: Annotated[str | None, Query(min_length=1, max_length=512)] = None,
        id: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
        everything: bool = False,
    ) -> Response:
        tenant = _tenant(request, store)
        if (user is not None) + (id is not None) + everything != 1:
            raise invalid("nothing selected to delete", None, "one of user=…, id=… and everything=true")
        deleted = await in_thread(_DATABASE, lambda: answers.forget(tenant, user=user, id=id))
        return Json({"object": "feedback.deleted", "answers": deleted})

    return router


def _tenant(request: HttpRequest, store: Store) -> str:
    """Return the tenant that the feedback belongs to.

    A request without a tenant belongs to ALL. Raises Refused (400) if ALL does not store feedback.
    """
    tenant = caller_of(request).tenant
    if not tenant and ALL not in store.settings.feedback:
        fix = "a tenant's key; on an open server: veneer tenant set all feedback_days=30"
        raise invalid("feedback belongs to a tenant", None, fix)
    return tenant
