"""An `Engine` that sends requests to a vLLM server, or to a router in front of several.

    upstream = Upstream("http://router:8000", mixes=Mixes(…), decode=…)
    await upstream.begin()
    async for event in upstream.events(request): …

Requests and responses contain token ids, on /v1/completions. An adapter is requested by its name (`mixes`),
which veneer's plug-in in each vLLM server resolves in the shared library. The folder of a weighted mix is
written to the shared folder before the request is sent. Load balancing is the router's task.

| upstream | reaction |
| -------- | -------- |
| does not respond, or responds 5xx or 429 | before the first token, retry twice; then 503 with Retry-After |
| does not know a mix | write its folder again and retry |
| fails after the first token | Finished with an error, because tokens already sent cannot be taken back |
| rejects the adapter | 400 `adapter_unusable`, with the reason if `check` finds one; vLLM's log has others |
| rejects the request | the client gets the same error |
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, VeneerError
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.http.telemetry import current
from veneer.serve.names.catalog import NoAdapters
from veneer.serve.principal import FAIRNESS, WEIGHT
from veneer.serve.request import (
    DigestMix,
    Engine,
    EngineEvent,
    EngineStats,
    Finished,
    Refused,
    Request,
    Sampling,
    Started,
    Token,
    Usage,
    invalid,
    is_weighted,
    served_name,
    shutting_down,
)
from veneer.serve.transient import internal_error, is_transient, transient_error

log = logging.getLogger(__name__)

PAUSES = (0.1, 0.5)
"""Seconds to wait before the second and the third attempt."""
_CHECK_SECONDS = 5.0
SHORT_TIMEOUT = 10.0
_SLOTS = 1 << 20

Decode = Callable[[Sequence[int]], str]
"""Converts token ids to text, including special tokens, with the base's tokenizer."""


class _Failed(Exception):
    """The upstream did not respond, or failed; another attempt can succeed.

    `refused`: the error for the client if the last attempt fails; None for an outage.
    """

    def __init__(self, message: str, refused: Refused | None = None) -> None:
        super().__init__(message)
        self.refused = refused


def upstream_url(text: str) -> str:
    """Return the URL given as --upstream, without /v1. Raises ConfigError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
        raise ConfigError(f"{text!r} is not the URL of a server", where="--upstream", fix="http://host:port")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


class Upstream(Engine[Request, EngineEvent]):
    """An engine that sends requests to one URL.

    `decode`: decodes with the base's tokenizer. `key`: sent as a bearer token. `timeout`: maximum seconds
    between two bytes from the upstream. `check`: raises Refused with the reason if vLLM cannot serve the
    adapter with this digest; blocking; called if the upstream does not find an adapter.
    """

    def __init__(
        self,
        url: str,
        *,
        mixes: Mixes,
        decode: Decode,
        key: str | None = None,
        timeout: float = 300.0,
        check: Callable[[str], object] = lambda digest: None,
    ) -> None:
        self.check = check
        self.url, self.mixes, self.decode = upstream_url(url), mixes, decode
        self._secret = (key or secrets.token_hex()).encode()  # an empty key would let routers guess tenants
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=5.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None),
        )
        self.base, self.context = "", 0
        """The base's name in the upstream ("" before the first response) and its context (0 if unknown)."""
        self.closing = False
        self.running = self.waiting = self.prompt_tokens = self.generated_tokens = 0
        self._trouble = ""
        self._watch: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Check the upstream once, then keep checking in the background."""
        await self._check()
        self._watch = asyncio.create_task(self._watching())

    async def end(self) -> None:
        self.closing = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.client.aclose()

    def trouble(self) -> str:
        """Return why no request can run now, or "" if the upstream passed the last check."""
        return self._trouble

    def stats(self) -> EngineStats:
        """Return this server's counters; vLLM reports cache use and steps at its own /metrics.

        A request waits until its first token. This server loads no adapters, so it has no limit on their number."""
        tokens = {"prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens}
        return EngineStats(self.running, self.waiting, adapter_slots=_SLOTS, **tokens)

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._check()

    async def _check(self) -> None:
        """Read the base's name and context from the upstream, and set `trouble`."""
        trouble = ""
        try:
            answer = await self.client.get(f"{self.url}/v1/models", timeout=SHORT_TIMEOUT)
            cards = _json(answer).get("data") or []
            if answer.status_code == 200 and cards:
                base = next((c for c in cards if not c.get("parent")), cards[0])
                self.base, self.context = str(base.get("id", "")), int(base.get("max_model_len") or 0)
            else:
                trouble = f"/v1/models: {answer.status_code} {_message(answer)}"
        except (httpx.HTTPError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            trouble = f"{type(error).__name__} {error}".rstrip()
        if trouble and not self._trouble:
            log.warning("%s does not answer: %s", self.url, trouble)
        self._trouble = "the upstream does not answer" if trouble else ""

    async def events(self, request: Request) -> AsyncGenerator[EngineEvent, None]:
        """Yield the events of a request: Started at the first token, Tokens, Finished."""
        if self.closing:
            raise shutting_down()
        if request.sampling.prompt_logprobs:
            raise invalid("the upstream does not support prompt_logprobs", "prompt_logprobs")
        with self.mixes.using(request.mix, request.tenant):
            self.waiting, waits = self.waiting + 1, True
            try:
                async with aclosing(self._attempts(request)) as events:
                    async for event in events:
                        if waits:
                            self.waiting, self.running, waits = self.waiting - 1, self.running + 1, False
                        yield event
            finally:
                self.waiting -= waits
                self.running -= not waits

    async def _attempts(self, request: Request) -> AsyncGenerator[EngineEvent, None]:
        tokens = 0
        for attempt, pause in enumerate((*PAUSES, None)):
            try:
                async with aclosing(self._attempt(request, attempt)) as events:
                    async for event in events:
                        if not tokens:
                            yield Started(0)
                        tokens += 1
                        yield event
                return
            except _Failed as error:
                self.mixes.stored.pop(served_name(request.mix) if request.mix else "", None)  # store the mix again
                if tokens:
                    problem = transient_error("the rest of the answer", error)
                    yield Finished("error", Usage(len(request.prompt), 0, tokens), error=problem)
                    return
                if error.refused is not None and request.mix:
                    await asyncio.to_thread(self.check, request.mix[0][0])
                if pause is None:
                    raise error.refused or transient_error("the model", error) from error
            await asyncio.sleep(pause)

    async def _attempt(self, request: Request, attempt: int) -> AsyncGenerator[Token | Finished, None]:
        if not self.base:
            await self._check()
        if not self.base:
            raise _Failed(f"{self.url}: {self._trouble}")
        if is_weighted(request.mix):
            await self._write(request.mix)
        model = served_name(request.mix) if request.mix else self.base
        began, first, count = time.monotonic(), 0.0, 0
        reason = stop = last = None
        usage: dict[str, Any] = {}
        async with aclosing(self._chunks(self._fitted(request), model, attempt)) as chunks:
            async for chunk in chunks:
                if model != self.base and chunk.get("model", model) != model:
                    raise _Failed(f"{self.url} responded as {chunk['model']!r} instead of {model!r}")
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or []:
                    for token in self._tokens(choice, request.sampling):
                        first, count, last = first or time.monotonic(), count + 1, token.id
                        self.generated_tokens += 1  # at once, so that a long completion does not look stuck
                        yield token
                    reason = choice.get("finish_reason") or reason
                    stop = choice.get("stop_reason") if choice.get("stop_reason") is not None else stop
        if reason is None:
            raise _Failed(f"{self.url} ended the stream without a reason")
        if reason == "stop" and stop is None:
            stop = last
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        completion, now = usage.get("completion_tokens") or count, time.monotonic()
        prefill, decode = (first or now) - began, now - (first or now)
        measured = Usage(len(request.prompt), cached, completion, prefill=prefill, decode=decode)
        self.prompt_tokens += measured.prompt
        self.generated_tokens += measured.completion - count
        if reason in ("length", "stop"):
            yield Finished(reason, measured, stop)
        else:
            problem = Refused(f"the upstream ended with {reason!r}", status=500, code="internal")
            yield Finished("error", measured, stop, error=problem)

    async def _write(self, mix: DigestMix) -> None:
        try:
            await asyncio.to_thread(self.mixes.write, mix)
        except Refused:
            raise
        except (VeneerError, OSError) as error:
            if not isinstance(error, VeneerError) or is_transient(error):
                raise internal_error("the adapter", error) from error
            for digest, _ in mix:  # raises the reason with the adapter's name
                await asyncio.to_thread(self.check, digest)
            raise Refused(error.what, status=400, code="adapter_unusable", fix=error.fix) from error

    def _fitted(self, request: Request) -> Request:
        """Return the request with max_tokens reduced to fit in the upstream's context.

        Raises Refused if the prompt does not fit.
        """
        left, sampling = self.context - len(request.prompt), request.sampling
        if not self.context or sampling.max_tokens <= left:
            return request
        if left < 1:
            raise Refused(
                f"the prompt has {len(request.prompt)} tokens, but the context has only {self.context}",
                status=400,
                code="context_exceeded",
            )
        fitted = replace(sampling, max_tokens=left, min_tokens=min(sampling.min_tokens, left))
        return replace(request, sampling=fitted)

    def _tokens(self, choice: dict[str, Any], sampling: Sampling) -> list[Token]:
        """Return the tokens of one chunk; the last token has the text of the whole chunk."""
        text, ids = str(choice.get("text") or ""), choice.get("token_ids")
        if not ids:  # text that the upstream had held back, without new tokens
            return [Token(-1, text)] if text else []
        logprobs = choice.get("logprobs") or {}
        logprob_list, tops = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
        out = []
        for token, logprob, alternatives in zip_longest(ids, logprob_list[: len(ids)], tops[: len(ids)]):
            ranked = sorted(
                ((int(k.removeprefix("token_id:")), v) for k, v in (alternatives or {}).items()),
                key=lambda pair: -pair[1],
            )
            top = tuple((k, self.decode([k]), v) for k, v in ranked[: sampling.logprobs or 0])
            out.append(Token(token, "", logprob, top))
        return [*out[:-1], replace(out[-1], text=text)]

    def _headers(self, request: Request, model: str, attempt: int) -> dict[str, str]:
        """Return the headers that routers read. A router sees tenants and users only as keyed hashes.

        A retry has new keys, because a router that hashes keys would choose the failed engine again.

        x-llm-d-inference-fairness-id: the tenant, for the flow control of llm-d (llm-d-router,
            pkg/epp/metadata/consts.go)
        x-veneer-weight: the tenant's weight, for embedded engines
        x-session-id: the tenant's user, or tenant and model without a user; the first key of `consistent_hash`
            (vllm-project/router, docs/load_balancing/README.md)
        x-veneer-model: `model` of the body, percent-encoded, for routers that cannot parse bodies; of a retry, the
            request's id
        x-request-id: the id of this server's own response, and the number of the completion
        """

        def hashed(*parts: str) -> str:
            text = json.dumps(parts).encode()
            return hmac.new(self._secret, text, "sha256").hexdigest()[:32]

        key = f"{request.id} {attempt}" if attempt else model
        session = hashed(request.tenant, *((key, "model") if attempt or not request.user else (request.user, "user")))
        ids = {"x-session-id": session, "x-request-id": request.id, "x-veneer-model": quote(key, "/ :@+=")}
        return ids | ({FAIRNESS: hashed(request.tenant), WEIGHT: str(request.weight)} if request.tenant else {})

    async def _chunks(self, request: Request, model: str, attempt: int) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the data of each server-sent event. Closing the iterator closes the connection."""
        try:
            body, headers, trail = _body(request, model), self._headers(request, model, attempt), current.get()
            headers |= {"traceparent": trail.traceparent} if trail is not None and trail.span is not None else {}
            url = f"{self.url}/v1/completions"
            async with self.client.stream("POST", url, json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _error(answer, model, request.name)
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if not data or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if chunk.get("error"):
                        raise _Failed(f"{self.url}: {_text(chunk)}")
                    yield chunk
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise _Failed(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error


class UpstreamAdapters(NoAdapters):
    """The adapter cache of a server with an upstream, for `Catalog`. Loads nothing in advance."""

    def load(self, digest: str, adapter: Adapter | None = None) -> None:
        """Do nothing: the upstream loads adapters by name."""


def _body(request: Request, model: str) -> dict[str, Any]:
    """Return the request body for vLLM's /v1/completions."""
    s = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": s.max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": s.top_k,
        "min_p": s.min_p,
        "repetition_penalty": s.repetition_penalty,
        "min_tokens": s.min_tokens,
        "stop_token_ids": list(s.stop_ids),
        "ignore_eos": s.ignore_eos,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    body |= {"seed": s.seed} if s.seed is not None else {}
    body |= {"stop": list(s.stop)} if s.stop else {}
    body |= {"logprobs": s.logprobs} if s.logprobs is not None else {}
    body |= {"logit_bias": {str(i): b for i, b in s.logit_bias.items()}} if s.logit_bias else {}
    if is_weighted(request.mix):  # for embedded engines; vLLM ignores the field
        body["mix"] = [{"adapter": digest, "strength": strength} for digest, strength in request.mix]
    if request.salt:  # hashed, so that tenant names stay private
        body["cache_salt"] = hashlib.sha256(request.salt.encode("utf-8", "surrogatepass")).hexdigest()
    if s.grammar is not None:
        kind, text = s.grammar
        grammars = {"json_schema": ("json", text), "json_object": ("json_object", True), "regex": ("regex", text)}
        key, value = grammars[kind]
        body["structured_outputs"] = {key: value}
    return body


def _error(answer: httpx.Response, model: str, name: str) -> _Failed | Refused:
    """Return the error for a response that is not a stream. `name`: the client's name of `model`."""
    text, status = _message(answer), answer.status_code
    message = f"{answer.url}: {status} {text}"
    if model in text and model.startswith("veneer-") and status in (400, 404):
        log.warning("the upstream cannot load an adapter: %s", message)
        reason = "was found but could not be loaded" if status == 400 else "was not found"
        refused = Refused(
            f"the upstream cannot load the adapter {name}: it {reason}",
            status=400,
            code="adapter_unusable",
            fix="see vLLM's log; each vLLM needs veneer's plug-in, the library, and a sufficient --max-lora-rank",
        )
        return refused if status == 400 else _Failed(message, refused)
    if status >= 500 or status in (401, 403, 404, 408, 424, 429):
        return _Failed(message)
    long = status in (400, 413, 422) and any(word in text for word in ("context length", "max_model_len"))
    return Refused(text, status=400, code="context_exceeded" if long else "invalid_request")


def _json(answer: httpx.Response) -> dict[str, Any]:
    """Return a response's JSON object, or {} if the body is anything else."""
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _message(answer: httpx.Response) -> str:
    return _text(_json(answer)) or answer.text[:500]


def _text(body: dict[str, Any]) -> str:
    error = body.get("error", body.get("message") or body.get("detail") or "")
    return str(error.get("message") or error if isinstance(error, dict) else error)
