"""One remote server over HTTP: vLLM, TGI, or any server of OpenAI's /v1/completions.

| kind   | prompt, answer      | adapters                               | unsupported |
| ----   | --------------      | --------                               | ----------- |
| vllm   | ids, ids            | POST /v1/load_lora_adapter, /v1/models | nothing |
| openai | ids, text           | those that /v1/models lists            | fields not in OpenAI's API |
| tgi    | text, text with ids | started with, named in its URL         | fields not in /generate_stream |

    http://host:8000   vllm+http://…   openai+https://…   tgi+http://host:8080?adapters=veneer-3fa9…,…

Without a kind prefix the kind is detected. TGI answers an unknown adapter id with the base and status 200,
and has no list of adapters: so the URL names them, and each counts as loaded once its answer differs from the
base's.

Handles HTTP and one server; `fleet` decides which server gets a request.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from veneer.errors import ConfigError
from veneer.serve.request import Finished, Refused, Request, Sampling, Token, Usage

log = logging.getLogger("veneer.serve.fleet.fleet")

_SOON = 10.0
"""Seconds within which a healthy server answers a health check."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included, with the base's tokenizer."""


class Failed(Exception):
    """The server did not answer, or reported a failure; another server may succeed.

    `answered`: the server did answer, so the request may be the cause and the server healthy.
    """

    def __init__(self, what: str, answered: bool = True) -> None:
        super().__init__(what)
        self.answered = answered


class NotThere(Exception):
    """The server no longer has an adapter: it restarted, or somebody unloaded it."""


class Remote:
    """A server.

    `base`: the server's name for its base. `room`: context size in tokens, 0 if unknown. `loads`: whether
    adapters can be loaded at runtime.
    """

    loads = False

    def __init__(self, url: str, client: httpx.AsyncClient, decode: Decode) -> None:
        self.url, self.client, self.decode = url, client, decode
        self.base, self.room = "", 0

    async def check(self) -> set[str]:
        """The adapters that the server has. Raises Failed if it does not answer."""
        raise NotImplementedError

    async def load(self, name: str, folder: str) -> None:
        """Load an adapter. Raises Refused or Failed.

        Refused if the server rejects the adapter, Failed if it does not answer.
        """
        raise NotImplementedError

    async def unload(self, name: str) -> None:
        """Unload an adapter; does nothing if the server cannot load any."""

    def refusal(self, sampling: Sampling) -> list[str]:
        """The settings of a request that the server does not support."""
        raise NotImplementedError

    def stream(self, request: Request, model: str) -> AsyncGenerator[Token | Finished, None]:
        """Yield Tokens and Finished.

        Raises Refused, Failed or NotThere before the first event.
        """
        raise NotImplementedError


def parse_upstream(text: str) -> tuple[str, str, tuple[str, ...]]:
    """(kind or "", URL, adapters) of an --upstream value. Raises ConfigError."""
    kind, plus, rest = text.partition("+")
    kind, url = (kind, rest) if plus and kind in ("vllm", "openai", "tgi") else ("", text)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"{text!r} is not the address of a server", fix="http://host:port, or vllm+, openai+ or tgi+ in front of it"
        )
    query = parse_qs(parts.query)
    if set(query) - {"adapters"} or (query and kind != "tgi"):
        raise ConfigError(f"{text!r}: the only parameter is ?adapters=…, for tgi+http", where="--upstream")
    adapters = tuple(a for value in query.get("adapters", []) for a in value.split(",") if a)
    path = parts.path.rstrip("/").removesuffix("/v1")
    return kind, f"{parts.scheme}://{parts.netloc}{path}", adapters


async def recognise(text: str, client: httpx.AsyncClient, decode: Decode) -> Remote:
    """The server at an --upstream.

    Raises Failed if it does not answer, ConfigError for a bad URL.
    """
    kind, url, adapters = parse_upstream(text)
    if not kind:
        kind = await _kind(url, client)
    if kind == "tgi":
        return TextGeneration(url, client, decode, adapters)
    return Completions(url, client, decode, vllm=kind == "vllm")


async def _kind(url: str, client: httpx.AsyncClient) -> str:
    models = await _ask(client, "GET", f"{url}/v1/models", accept=range(600), timeout=_SOON)
    if any(m.get("owned_by") == "vllm" for m in _json(models).get("data") or []):
        return "vllm"
    info = await _ask(client, "GET", f"{url}/info", accept=range(600), timeout=_SOON)
    return "tgi" if {"model_id", "max_total_tokens", "router"} <= set(_json(info)) else "openai"


class Completions(Remote):
    """A server of /v1/completions: vLLM with its extensions, or any other.

    Others get OpenAI's own fields only.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, decode: Decode, *, vllm: bool) -> None:
        super().__init__(url, client, decode)
        self.vllm = self.loads = vllm

    async def check(self) -> set[str]:
        cards = _json(await _ask(self.client, "GET", f"{self.url}/v1/models", timeout=_SOON)).get("data") or []
        if not cards:
            raise Failed(f"{self.url}/v1/models lists nothing")
        first = next((c for c in cards if not c.get("parent")), cards[0])
        self.base, self.room = str(first.get("id", "")), int(first.get("max_model_len") or 0)
        return {str(c.get("id")) for c in cards} - {self.base}

    async def load(self, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder}
        answer = await _ask(self.client, "POST", f"{self.url}/v1/load_lora_adapter", body, accept=range(600))
        if answer.status_code == 200 or "already been loaded" in answer.text:
            return
        if answer.status_code in (404, 405) and "lora" not in answer.text.lower():
            raise Refused(
                "a replica cannot load adapters while it runs",
                status=503,
                code="adapter_unusable",
                fix="start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
            )
        if answer.status_code in (429, 502, 503, 504):
            raise Failed(f"{self.url}: {_message(answer)}")
        # vLLM also answers 500 if the adapter is at fault: its rank, its kind, a missing file.
        said = _message(answer).replace(folder, name) if folder else _message(answer)
        log.warning("%s cannot load %s: %s", self.url, name, said)
        raise Refused(f"a replica cannot load it: {said}", status=422, code="adapter_unusable")

    async def unload(self, name: str) -> None:
        body = {"lora_name": name}
        await _ask(self.client, "POST", f"{self.url}/v1/unload_lora_adapter", body, accept=range(500))

    def refusal(self, sampling: Sampling) -> list[str]:
        return _asked(sampling, ("prompt_logprobs",) if self.vllm else ("prompt_logprobs", *_VLLM_ONLY))

    def body(self, request: Request, model: str) -> dict[str, Any]:
        """The request body for /v1/completions."""
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
        }
        body |= {"seed": s.seed} if s.seed is not None else {}
        body |= {"stop": list(s.stop)} if s.stop else {}
        body |= {"logprobs": s.logprobs} if s.logprobs is not None else {}
        body |= {"logit_bias": {str(i): b for i, b in s.logit_bias.items()}} if s.logit_bias else {}
        if not self.vllm:
            return body
        body |= {
            "top_k": s.top_k,
            "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "min_tokens": s.min_tokens,
            "stop_token_ids": list(s.stop_ids),
            "ignore_eos": s.ignore_eos,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if request.salt:  # hashed: tenant names stay private
            body["cache_salt"] = hashlib.sha256(request.salt.encode("utf-8", "surrogatepass")).hexdigest()
        if s.grammar is not None:
            kind, text = s.grammar
            key, value = {
                "json_schema": ("json", text),
                "json_object": ("json_object", True),
                "regex": ("regex", text),
            }[kind]
            body["structured_outputs"] = {key: value}
        return body

    async def stream(self, request: Request, model: str) -> AsyncGenerator[Token | Finished, None]:
        clock, reason, stop, last = _Clock(), None, None, None
        usage: dict[str, Any] = {}
        events = _events(self.client, f"{self.url}/v1/completions", self.body(request, model), missing=model)
        async with aclosing(events):
            async for event in events:
                if model != self.base and event.get("model", model) != model:
                    raise Failed(f"{self.url} answered as {event['model']!r}, and {model!r} was asked")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or []:
                    for token in self._tokens(choice, request.sampling):
                        clock.token()
                        last = token.id
                        yield token
                    reason = choice.get("finish_reason") or reason
                    stop = choice.get("stop_reason") if choice.get("stop_reason") is not None else stop
        if reason is None:
            raise Failed(f"{self.url} ended the stream without a reason")
        if reason == "stop" and stop is None and self.vllm:
            stop = last
        details = usage.get("prompt_tokens_details") or {}
        took = clock.usage(len(request.prompt), usage.get("completion_tokens"), details.get("cached_tokens") or 0)
        if reason in ("length", "stop"):
            yield Finished(reason, took, stop)
        else:
            wrong = Refused(f"a replica ended with {reason!r}", status=500, code="internal")
            yield Finished("error", took, stop, error=wrong)

    def _tokens(self, choice: dict[str, Any], sampling: Sampling) -> list[Token]:
        """The tokens of one stream event; the text of several tokens is on the last."""
        text, ids = str(choice.get("text") or ""), choice.get("token_ids")
        if not ids:  # a server without ids, or text that was held back
            return [Token(-1, text)] if text else []
        logprobs = choice.get("logprobs") or {}
        own, tops = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
        out = []
        for token, logprob, near in zip_longest(ids, own[: len(ids)], tops[: len(ids)]):
            ranked = sorted(((_id(k), v) for k, v in (near or {}).items()), key=lambda found: -found[1])
            top = tuple((k, self.decode([k]), v) for k, v in ranked[: sampling.logprobs or 0])
            out.append(Token(token, "", logprob, top))
        return [*out[:-1], replace(out[-1], text=text)]


_VLLM_ONLY = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_ids", "ignore_eos", "grammar", "logprobs")
"""Includes logprobs, because OpenAI's alternatives are texts, and a Token's have ids."""


class TextGeneration(Remote):
    """A TGI server.

    TGI sends stop texts as part of the answer; they are cut here. Its logprobs are of the distribution after
    temperature and penalties, so they are supported only without these.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, decode: Decode, adapters: tuple[str, ...]) -> None:
        super().__init__(url, client, decode)
        self.adapters, self.believed = adapters, set[str]()

    async def check(self) -> set[str]:
        info = _json(await _ask(self.client, "GET", f"{self.url}/info", timeout=_SOON))
        self.base, self.room = str(info.get("model_id", "")), int(info.get("max_total_tokens") or 0)
        for name in set(self.adapters) - self.believed:
            if await self._probe(name) != await self._probe(None):
                self.believed.add(name)
        return set(self.believed)

    async def _probe(self, adapter: str | None) -> list[tuple[int, float]]:
        """(id, rounded logprob) of a few greedy tokens."""
        settings = {"max_new_tokens": 8, "do_sample": False, "details": True, "adapter_id": adapter}
        body = {"inputs": "The", "parameters": settings}
        answer = _json(await _ask(self.client, "POST", f"{self.url}/generate", body))
        tokens = (answer.get("details") or {}).get("tokens") or []
        return [(int(t["id"]), round(float(t.get("logprob") or 0), 3)) for t in tokens]

    async def load(self, name: str, folder: str) -> None:
        raise Refused(
            "a replica is TGI and was not started with this adapter",
            status=422,
            code="adapter_unusable",
            fix=f"start it with LORA_ADAPTERS={name}=FOLDER (`veneer export --for tgi` makes the folder), and name it "
            f"behind its --upstream: ?adapters={name}",
        )

    def refusal(self, sampling: Sampling) -> list[str]:
        never = ("presence_penalty", "min_p", "logit_bias", "min_tokens", "ignore_eos", "stop_ids", "prompt_logprobs")
        out = _asked(sampling, never)
        shaped = sampling.temperature not in (0, 1) or _asked(
            sampling, ("top_k", "top_p", "repetition_penalty", "frequency_penalty", "grammar")
        )
        if sampling.logprobs is not None and shaped:
            out.append("logprobs beside what changes the distribution")
        return out

    def body(self, request: Request, model: str) -> dict[str, Any]:
        """The request body for /generate_stream, without defaults, which TGI rejects."""
        s = request.sampling
        settings: dict[str, Any] = {"max_new_tokens": s.max_tokens, "details": True, "do_sample": s.temperature > 0}
        settings |= {"adapter_id": model} if model != self.base else {}
        if s.temperature > 0:
            settings |= {"temperature": s.temperature} if s.temperature != 1 else {}
            settings |= {"top_k": s.top_k} if s.top_k else {}
            settings |= {"top_p": s.top_p} if s.top_p < 1 else {}
        settings |= {"repetition_penalty": s.repetition_penalty} if s.repetition_penalty != 1 else {}
        settings |= {"frequency_penalty": s.frequency_penalty} if s.frequency_penalty else {}
        settings |= {"seed": s.seed} if s.seed is not None else {}
        settings |= {"stop": list(s.stop)} if s.stop else {}
        settings |= {"top_n_tokens": s.logprobs} if s.logprobs else {}
        if s.grammar is not None:
            kind, text = s.grammar
            settings["grammar"] = (
                {"type": "regex", "value": text} if kind == "regex" else {"type": "json", "value": json.loads(text)}
            )
        return {"inputs": self.decode(request.prompt), "parameters": settings, "add_special_tokens": False}

    async def stream(self, request: Request, model: str) -> AsyncGenerator[Token | Finished, None]:
        clock, held, found, last = _Clock(), "", "", -1
        details: dict[str, Any] = {}
        events = _events(self.client, f"{self.url}/generate_stream", self.body(request, model), missing=model)
        async with aclosing(events):
            async for event in events:
                for token in [event["token"]] if event.get("token") else []:
                    clock.token()
                    special = bool(token.get("special"))
                    text, held, hit = _until(
                        held + ("" if special or found else str(token["text"])), request.sampling.stop
                    )
                    found = found or hit
                    logprob = token.get("logprob") if request.sampling.logprobs is not None else None
                    top = tuple((t["id"], t["text"], t["logprob"]) for t in event.get("top_tokens") or [])
                    yield Token(int(token["id"]), text, logprob, top, special)
                    last = int(token["id"])
                details = event.get("details") or details
        if not details:
            raise Failed(f"{self.url} ended the stream without a reason")
        reason = details.get("finish_reason")
        usage = clock.usage(len(request.prompt), details.get("generated_tokens"), 0)
        stop = None if reason == "length" else found or last
        yield Finished("length" if reason == "length" else "stop", usage, stop=stop, text="" if found else held)


def _until(text: str, stops: Sequence[str]) -> tuple[str, str, str]:
    """(text to send, possible start of a stop text, stop text found)."""
    places = [(text.find(stop), stop) for stop in stops if stop in text]
    if places:
        at, stop = min(places)
        return text[:at], "", stop
    keep = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - keep], text[len(text) - keep :], ""


def _asked(sampling: Sampling, names: Sequence[str]) -> list[str]:
    """The settings among `names` that differ from their defaults."""
    usual = Sampling()
    return [n for n in names if getattr(sampling, n) != getattr(usual, n)]


class _Clock:
    """Counts tokens and measures the times of `Usage`."""

    def __init__(self) -> None:
        self.start, self.first, self.tokens = time.monotonic(), 0.0, 0

    def token(self) -> None:
        self.first = self.first or time.monotonic()
        self.tokens += 1

    def usage(self, prompt: int, completion: int | None, cached: int) -> Usage:
        now = time.monotonic()
        first = self.first or now
        return Usage(prompt, cached, completion or self.tokens, 0.0, first - self.start, now - first)


# -- HTTP --------------------------------------------------------------------------------------------------------------


async def _ask(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: Any = None,
    accept: Sequence[int] = (200,),
    timeout: float | None = None,
) -> httpx.Response:
    try:
        answer = await client.request(method, url, json=body, timeout=timeout or client.timeout)
    except (httpx.HTTPError, OSError) as error:
        raise Failed(f"{url}: {type(error).__name__} {error}".rstrip(), answered=False) from error
    if answer.status_code not in accept:
        raise Failed(f"{url}: {answer.status_code} {_message(answer)}")
    return answer


async def _events(client: httpx.AsyncClient, url: str, body: Any, missing: str) -> AsyncGenerator[dict[str, Any], None]:
    """The data of a stream of server-sent events.

    Closing the iterator closes the connection.
    """
    try:
        async with client.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise _refused(url, answer, missing)
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if event.get("error"):
                    raise Failed(f"{url}: {_text(event)}")
                yield event
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise Failed(f"{url}: {type(error).__name__} {error}".rstrip(), answered=False) from error


def _refused(url: str, answer: httpx.Response, missing: str) -> Exception:
    text, status = _message(answer), answer.status_code
    if status == 404 and missing in text:
        return NotThere(f"{url}: {text}")
    if status >= 500 or status in (401, 403, 404, 408, 424, 429):
        return Failed(f"{url}: {status} {text}")
    long = status in (400, 413, 422) and any(word in text for word in ("context length", "max_model_len", "`inputs`"))
    return Refused(text, status=400, code="context_exceeded" if long else "invalid_request")


def _json(answer: httpx.Response) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(answer: httpx.Response) -> str:
    return _text(_json(answer)) or answer.text[:500]


def _text(body: dict[str, Any]) -> str:
    error = body.get("error", body.get("message") or body.get("detail") or "")
    return str(error.get("message") or error if isinstance(error, dict) else error)


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
