"""Completions sampled by other servers: `reinforcement.samplers`.

    with sampler_servers(config, base, attachment, "run") as servers:
        wait = servers.begin([CompletionRequest(prompt, seed, how, "run"), …])
        rollouts, metrics = wait(interrupted)

Trainer and servers share a library. The trainer adds its adapter as a version of one name, and removes older
versions that no request needs. Requests name the version, and each answer states the base's fingerprint and the
adapter's digest (`sampled_by`), so an answer from any other weights is dropped. A completion is a function of
prompt, seed and adapter, so another server can take over a request without changing the run.

| server | reaction |
| --- | --- |
| does not respond; 408, 409, 425, 429, 5xx | other servers take its requests; tried again after 0.5, 1, 2 … 30 s |
| all servers are unavailable | the run waits |
| answers from other weights, or not as requested | answer dropped and counted; other servers take the request |
| does so three times in a row, and no other server is available | TrainingError |

The trainer's own sampler replays the completions, and samples the judges' replies. The servers' API key is
read from the environment and never appears in a message.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, MissingExtraError, TrainingError, VeneerError, counted, shown
from veneer.library.library import Library, open_library
from veneer.library.maintenance import gc
from veneer.library.names import likely_name
from veneer.train.loop import Stop
from veneer.train.text.prompts import WaitForSamples
from veneer.train.text.rollouts import CompletionRequest, Rollout, SamplingParams, sampling_metrics
from veneer.train.text.save import write_adapter

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.attach import Attachment
    from veneer.library.queries import Version
    from veneer.models.text.base import TextBase
    from veneer.train.config.text import TrainConfig

KEY = "VENEER_SAMPLER_KEY"
"""Environment variable with the API key of all servers."""
_AGAIN = {408, 409, 425, 429}
_INVALID = 3
"""Number of times that a server is set aside for unusable answers before the run stops."""
_SILENCE = 600.0
"""Maximum seconds without a byte from a server."""
_PAUSES = (0.5, 30.0)
"""Shortest and longest wait in seconds before a server is tried again."""
_ANNOUNCED = 5.0
"""Seconds after which every server knows a new version; with PostgreSQL, they check each second."""
_COLLECT = 16
"""Number of versions after which the files of removed versions are collected."""
_TOKEN_BYTES = 4096
"""Maximum bytes of a response per token."""


class _Unavailable(Exception):
    """The server does not answer now."""


class _Invalid(Exception):
    """The server's answer cannot be used."""


class _Unknown(_Invalid):
    """The server does not know the version."""


@dataclass(eq=False)
class _Server:
    """A server.

    trouble: why the server is set aside, or "". after: time from which it can be tried again. invalid: number of
    times that it was set aside for an unusable answer since its last usable answer."""

    url: str
    trouble: str = ""
    invalid: int = 0
    pause: float = _PAUSES[0]
    after: float = 0.0


@contextmanager
def sampler_servers(config: TrainConfig, base: TextBase, attachment: Attachment, name: str) -> Iterator[SamplerServers]:
    """Yield the servers that sample with the adapter `name`, after one request to each.

    At the end, the run's versions are removed from the library. Raises ConfigError if a server has another base,
    cannot find the adapter or refuses the key, MissingExtraError without httpx, and the errors of the library."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("reinforcement.samplers needs httpx", extra="rewards") from error
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {KEY} does not contain a valid API key", fix=f"export {KEY}=…")
    urls, adapter = config.reinforcement.samplers, partial(attachment.adapter, name)
    limits = httpx.Limits(max_connections=config.reinforcement.rows * len(urls))
    timeout = httpx.Timeout(_SILENCE, connect=5.0, pool=None)
    client = httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout, limits=limits
    )
    loop = asyncio.new_event_loop()
    with open_library() as library:
        thread = threading.Thread(target=loop.run_forever, name="samplers", daemon=True)
        thread.start()
        servers = SamplerServers(config, base, adapter, library, loop, client, [_Server(url) for url in urls])
        try:
            servers.check()
            yield servers
        finally:
            asyncio.run_coroutine_threadsafe(_close(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            with suppress(VeneerError):  # the run has its adapter; the next run removes the versions
                servers.remove(servers.own_versions())


async def _close(client: Any) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


@dataclass
class SamplerServers:
    """See `sampler_servers`.

    adapter: returns the trained adapter. say: shows a message to the user. dropped: number of unusable answers."""

    config: TrainConfig
    base: TextBase
    adapter: Callable[[], Adapter]
    library: Library
    loop: asyncio.AbstractEventLoop
    client: Any
    servers: list[_Server]
    say: Callable[[str], None] = lambda text: None
    dropped: int = 0
    added: int = 0
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        output = Path(self.config.output.directory).absolute()
        self.name = self.config.reinforcement.publish or f"sampling-{likely_name(output.name) or 'run'}"
        self.source = f"sampling for {output} on {socket.gethostname()}"

    # -- the library ---------------------------------------------------------------------------------------------------

    def own_versions(self) -> list[Version]:
        """Return the versions that this run added, even before it was killed; oldest first."""
        found = self.library.search(name=self.name, all_versions=True)
        return [v for v in found if (v.name, v.source) == (self.name, self.source)]

    def publish(self) -> Version:
        """Return the version with the adapter's current values; add it if it is not the newest.

        Keeps the versions for this step, for a validation, and for later steps that are being sampled."""
        r, adapter, own = self.config.reinforcement, self.adapter(), self.own_versions()
        if own and own[-1].digest == adapter.digest():
            return own[-1]
        card = replace(adapter.card, base=self.base.name, base_fingerprint=self.base.fingerprint, kind="text")
        with tempfile.TemporaryDirectory(prefix="veneer-") as folder:
            write_adapter(replace(adapter, card=card), Path(folder), self.base)
            version = self.library.add(folder, self.name, source=self.source).version
        self.remove(own[: -1 - r.staleness // r.updates])
        self.added += 1
        if self.added % _COLLECT == 0:
            gc(self.library, strays=False)
        return version

    def remove(self, versions: Sequence[Version]) -> None:
        for version in versions:
            self.library.remove(version.reference, with_aliases=True)

    # -- all requests --------------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[CompletionRequest]) -> WaitForSamples:
        """Start sampling with the adapter's current values.

        Raises the library's errors. The returned function raises TrainingError if the answers cannot be used."""
        return partial(self._wait, asyncio.run_coroutine_threadsafe(self._all(requests, self.publish()), self.loop))

    def check(self) -> None:
        """Request one token from each server. Raises ConfigError if a server's answer cannot be used."""
        version, request = self.publish(), CompletionRequest((0,), 0, SamplingParams(max_tokens=1))
        for server in self.servers:
            try:
                asyncio.run_coroutine_threadsafe(self._request(server, request, version), self.loop).result()
            except _Unavailable as error:
                self._set_aside(server, error)
            except _Invalid as error:
                fix = f"serve {self.base.name} with --library {self.library.location}; set {KEY} for keys"
                raise ConfigError(f"the sampler cannot be used: {error}", where=server.url, fix=fix) from None

    def _wait(self, future: concurrent.futures.Future[Any], interrupted: Stop) -> Any:
        """Wait for the result and show messages. If interrupted, cancel the requests and return None."""
        done = False
        while not done:
            done = bool(concurrent.futures.wait([future], timeout=0.1).done)
            while self.messages:
                self.say(self.messages.pop(0))
            if interrupted() and not done:
                future.cancel()
                return None
        return future.result()

    async def _all(
        self, requests: Sequence[CompletionRequest], version: Version
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Send all requests. Requests with the same prompt go to one server, which caches the prompt."""
        began, dropped = time.perf_counter(), self.dropped
        homes = {prompt: i for i, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(homes[each.prompt], each, version)) for each in requests]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        rollouts, lost = [task.result() for task in tasks], float(self.dropped - dropped)
        metrics = sampling_metrics(rollouts, time.perf_counter() - began)
        return rollouts, metrics | ({"dropped_answers": lost} if lost else {})

    async def _complete(self, home: int, request: CompletionRequest, version: Version) -> Rollout:
        """Return one completion, from the server `home` if that server is available."""
        while True:
            now, all_servers = time.monotonic(), self.servers[home % len(self.servers) :] + self.servers
            server = next((each for each in all_servers if now >= each.after), None)
            if server is None:
                await asyncio.sleep(_PAUSES[0] / 5)
                continue
            if retry := bool(server.trouble):  # only one request at a time retries a server that is set aside
                server.after = now + server.pause
            try:
                rollout = await self._request(server, request, version)
                if server.trouble:
                    self.messages.append(f"the sampler {server.url} is available again")
                server.trouble, server.pause, server.after, server.invalid = "", _PAUSES[0], 0.0, 0
                return rollout
            except (_Unavailable, _Invalid) as error:
                self._set_aside(server, error, retry)

    def _set_aside(self, server: _Server, error: Exception, retry: bool = False) -> None:
        """Send no requests to a server for a while, which doubles with each further failure.

        Raises TrainingError if no other server is available and the server's answers stay unusable."""
        now, invalid, first = time.monotonic(), isinstance(error, _Invalid), not server.trouble
        server.trouble, self.dropped = str(error), self.dropped + invalid
        away = all(each.trouble for each in self.servers)
        if first:
            rest = "no sampler is available; the run waits until one is" if away else "other samplers take its requests"
            self.messages.append(f"warning: the sampler {server.url} is set aside: {error}; {rest}")
        if first or retry:  # several requests can fail at once
            server.after, server.pause = now + server.pause, min(_PAUSES[1], 2 * server.pause)
            server.invalid += invalid
        if away and server.invalid >= _INVALID:
            fix = "check the sampler's log and settings"
            raise TrainingError(f"the sampler's answers cannot be used: {error}", where=server.url, fix=fix)

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _request(self, server: _Server, request: CompletionRequest, version: Version) -> Rollout:
        """Return a server's completion. Raises _Unavailable, _Invalid.

        With PostgreSQL, a server knows a new version only once the database has announced it."""
        until = time.monotonic() + _ANNOUNCED
        while True:
            try:
                return await self._answer(server, request, version)
            except _Unknown:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)

    async def _answer(self, server: _Server, request: CompletionRequest, version: Version) -> Rollout:
        import httpx

        how, content = vars(request.how) | {"seed": request.seed, "logprobs": 0}, bytearray()
        if grammar := how.pop("grammar"):
            kind, text = grammar
            how["structured_outputs"] = {kind.replace("_schema", ""): kind == "json_object" or text}
        body = how | {"model": version.reference, "prompt": list(request.prompt), "return_token_ids": True}
        most, url = _TOKEN_BYTES * (request.how.max_tokens + 64), server.url.rstrip("/").removesuffix("/v1")
        try:
            async with self.client.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > most:
                        raise _Invalid(f"the response exceeds {most} bytes")
        except httpx.HTTPError as error:
            raise _Unavailable(f"{type(error).__name__} {shown(str(error))[:200]}".strip()) from error
        text, status = shown(content[:300].decode("utf-8", "replace")), response.status_code
        if status != 200:
            kind = _Unknown if status == 404 else _Unavailable if status in _AGAIN or status >= 500 else _Invalid
            raise kind(f"HTTP {status}: {text}")
        try:
            return _rollout(request, json.loads(content), self.base, version.digest)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            message = "not a completion with token_ids, logprobs and sampled_by, as `veneer serve` returns"
            raise _Invalid(f"{message}: {text}") from None


def _rollout(request: CompletionRequest, answer: Any, base: TextBase, digest: str) -> Rollout:
    """Return the completion in a response.

    Raises _Invalid if it is not this base and adapter's completion of the request, and other exceptions if the
    response has another structure."""
    how, (choice,), by, most = request.how, answer["choices"], answer["sampled_by"], request.how.max_tokens
    ids, logps, end, text = (
        choice["token_ids"],
        choice["logprobs"]["token_logprobs"],
        choice["finish_reason"],
        choice["text"],
    )
    unmodified = how.temperature in (0, 1) and how.top_p == 1 and how.grammar is None
    sampling_logps = choice.get("sampling_logprobs", logps if unmodified else [])
    vocabulary, n = base.model.get_input_embeddings().num_embeddings, counted(len(ids), "token")
    for ok, problem in (
        (by["base"] == base.fingerprint, f"its base is {by['base']}, the trainer's is {base.fingerprint}"),
        (by["adapters"] == [[digest, 1.0]], f"it sampled from {by['adapters']} instead of {digest}"),
        ("sampling_logprobs" in choice or unmodified, "without sampling_logprobs, only temperature 1 is possible"),
        (all(type(i) is int and 0 <= i < vocabulary for i in ids), "a token is not in the vocabulary"),
        (len(ids) == len(logps) == len(sampling_logps), f"{n} with {len(logps)} log-probabilities"),
        (1 <= len(ids) <= most and (end != "length" or len(ids) == most), f"{n} instead of at most {most}"),
        (end in ("stop", "length") and type(text) is str, f"the completion ended with {end!r}"),
        (
            all(math.isfinite(x) and x <= 1e-6 for x in logps + sampling_logps),
            "a log-probability is not finite, or is positive",
        ),
    ):
        if not ok:
            raise _Invalid(shown(problem)[:300])
    cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    numbers = (tuple(ids), tuple(map(float, logps)), tuple(map(float, sampling_logps)))
    return Rollout(request.prompt, *numbers, text, end == "length", int(cached))
