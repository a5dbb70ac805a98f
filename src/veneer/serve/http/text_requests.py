"""Chat requests to the engine, from an HTTP body or from a Studio view in this process.

    chat_job    admission, prompt tokens, storage for feedback -> a TextJob, which `answers.run` runs

Only the adapters in a request's mix are loaded for the request, and no adapter is merged into the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.serve.access import ResolvedModel, shadow_id
from veneer.serve.engine.admission import AdmittedRequest
from veneer.serve.http.answers import TextJob
from veneer.serve.http.service import Service
from veneer.serve.http.tools import ToolReader, ToolUse, message_of_answer
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Sampling


async def chat_job(
    service: Service,
    principal: Principal,
    model: ResolvedModel,
    messages: Sequence[dict[str, Any]],
    sampling: Callable[[int], Sampling],
    admitted: AdmittedRequest,
    id: str,
    *,
    n: int = 1,
    use: ToolUse | None = None,
    variables: Mapping[str, Any] | None = None,
    cache_salt: str = "",
    stores: bool = True,
) -> TextJob:
    """Return an engine job that answers a conversation.

    `sampling`: called with the number of free tokens in the context. `id`: id of the response. `variables`:
    variables for the chat template, without messages and tools. `stores`: whether the completion can be
    stored for feedback. Raises Refused (429 for too many requests, 400 for a prompt that exceeds the
    context).
    """
    use, variables = use or ToolUse(), variables or {}
    admitted.reserve("answers", n)
    prompt = await service.prompts.of_messages(messages, admitted, use.tools, **variables)
    settings = sampling(service.prompts.fits(prompt, "messages"))
    continued = bool(variables.get("continue_final_message"))

    def keeping(answered: ResolvedModel, answer_id: str) -> Callable[[Sequence[str]], None] | None:
        """Return a function that stores completions for feedback, or None."""
        keep = service.tenancy.keeping(principal, answered, answer_id) if stores else None
        if keep is None:
            return None
        start = str(messages[-1].get("content") or "") if continued else ""
        row: dict[str, Any] = {"messages": list(messages[:-1] if continued else messages)}
        if use.tools:
            row["tools"] = list(use.tools)
        return lambda texts: keep(row, [message_of_answer(ToolReader(use), start + text) for text in texts])

    keep, keep_shadow = keeping(model, id), None
    if keep is not None and model.shadow is not None and not isinstance(mix := model.shadow[1], Refused):
        name = model.shadow[0]
        behind = ResolvedModel(mix, model.name, name, adapters=(name,) if mix else ())
        keep_shadow = keeping(behind, shadow_id(id))
    return TextJob(principal, model, [prompt], settings, n, cache_salt, keep, keep_shadow, id)
