"""After some minutes of mixed load, nothing is left behind.

VENEER_SOAK_SECONDS sets the duration (default 180).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import openai
import psutil
import pytest

from tests.formats import hostile
from tests.serve.http.toy import wait_for
from tests.serve.whole import KINDS, Said, Whole, asking, make_shop, prompt, said, served
from veneer.serve.settings import HttpSettings

SECONDS = float(os.environ.get("VENEER_SOAK_SECONDS", "180"))
WARM_UP = 30.0
CLIENTS = 12
GROWTH = 24 << 20
"""Maximum growth in bytes after the warm-up. Allocators keep a constant amount, but leaks grow."""
TENSORS = 500
"""Maximum growth in tensors: about two adapters, because it is random which adapters are cached at the end."""
PARTS = 3
SWAPPED = ("one", "two", "three")


class Soak:
    """Clients that behave randomly. Completions are checked if the expected result is known."""

    def __init__(self, whole: Whole, right: dict[tuple[str, int], Said]) -> None:
        self.whole, self.right = whole, right
        self.did: Counter[str] = Counter()
        self.api = openai.AsyncOpenAI(base_url=f"{whole.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.http: Any = self.api._client

    async def run(self, seconds: float, seed: int) -> None:
        end = time.monotonic() + seconds
        async with self.api:
            await asyncio.gather(*(self._client(random.Random(f"{seed}-{n}"), end) for n in range(CLIENTS)))

    async def burst(self) -> None:
        """Fill all pools of threads and connections, because pools never shrink."""
        async with self.api:
            for thing in (self.bad_load, self.load):
                await asyncio.gather(*(thing(random.Random(n)) for n in range(80)))

    async def _client(self, pick: random.Random, end: float) -> None:
        things = [self.answer, self.swapped, self.mix, self.grammar, self.leave, self.cancel, self.stop_reading]
        things += [self.load, self.unload, self.bad_load]
        while time.monotonic() < end:
            thing = pick.choice(things)
            await thing(pick)
            self.did[thing.__name__] += 1

    async def answer(self, pick: random.Random) -> None:
        name, k = pick.choice(list(self.right))
        assert said(await self.api.completions.create(**asking(name, prompt(9 + 20 * k, k)))).same(self.right[name, k])

    async def swapped(self, pick: random.Random) -> None:
        """Use a name that other clients load, replace and unload.

        The response must be one adapter's completion or a 404.
        """
        with suppress(openai.NotFoundError):
            got = said(await self.api.completions.create(**asking(pick.choice(SWAPPED), prompt(9, 0))))
            assert any(got.same(self.right[name, 0]) for name in KINDS)

    async def mix(self, pick: random.Random) -> None:
        parts = [f"{name}:{pick.uniform(-1, 1):.2f}" for name in pick.sample(list(KINDS), 2)]
        ids = prompt(pick.randrange(1, 60), pick.randrange(9))
        got = said(await self.api.completions.create(**asking("tiny", ids, 40, extra_body={"mix": parts})))
        assert len(got.logprobs) == 40

    async def grammar(self, pick: random.Random) -> None:
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        answer = await self.api.chat.completions.create(
            model=pick.choice(["tiny", *KINDS]),
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
        if answer.choices[0].finish_reason == "stop":
            assert json.loads(answer.choices[0].message.content or "")["a"] in (1, 2)

    async def leave(self, pick: random.Random) -> None:
        """Read a few events, then disconnect."""
        left = pick.randrange(0, 12)
        stream: Any = await self.api.completions.create(**self._long(pick), stream=True)
        async for _ in stream:
            left -= 1
            if left < 0:
                break
        await stream.close()

    async def cancel(self, pick: random.Random) -> None:
        """Disconnect before the response is complete."""
        asked = asyncio.create_task(self.api.completions.create(**self._long(pick)))
        await asyncio.sleep(pick.uniform(0, 0.2))
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked

    async def stop_reading(self, pick: random.Random) -> None:
        """Open a stream, read nothing for a while, then disconnect."""
        asked = self._long(pick)
        body = {**{k: v for k, v in asked.items() if k != "extra_body"}, **asked["extra_body"], "stream": True}
        async with self.http.stream("POST", f"{self.whole.url}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            await asyncio.sleep(pick.uniform(0, 1.5))

    async def load(self, pick: random.Random) -> None:
        body = {"lora_name": pick.choice(SWAPPED), "lora_path": pick.choice(list(KINDS)), "load_inplace": True}
        assert (await self._post("load", body)).status_code == 200

    async def unload(self, pick: random.Random) -> None:
        assert (await self._post("unload", {"lora_name": pick.choice(SWAPPED)})).status_code in (200, 404)

    async def bad_load(self, pick: random.Random) -> None:
        body = {"lora_name": "bad", "lora_path": f"hostile/{pick.choice(list(hostile.FILES))}"}
        assert 400 <= (await self._post("load", body)).status_code < 500

    async def _post(self, what: str, body: dict[str, Any]) -> Any:
        return await self.http.post(f"{self.whole.url}/v1/{what}_lora_adapter", json=body)

    def _long(self, pick: random.Random) -> dict[str, Any]:
        return asking(pick.choice(["tiny", *KINDS]), prompt(pick.randrange(1, 90), pick.randrange(9)), 250)


def left_over(whole: Whole) -> dict[str, int]:
    """Return how many resources the idle process still holds."""
    for name in SWAPPED:
        assert whole.unload(name).status_code in (200, 404)
    whole.idle()
    engine, service = whole.engine, whole.built.service
    wait_for(lambda: engine.residents.stats().waiting == 0)
    assert not service.shadows
    assert engine.runner.attached <= set(engine.residents.resident())
    used = sum(each.bytes for each in engine.residents.resident().values())
    assert engine.residents.stats().bytes == used <= engine.residents.limit
    process = psutil.Process()
    time.sleep(2)  # give connections and pool threads time to close
    gc.collect()
    tensors = sum(type(each).__name__ in ("Tensor", "Parameter") for each in gc.get_objects())
    # AnyIO's pool has a maximum size and ends idle threads only when a later call finds them
    threads = sum(not thread.name.startswith("AnyIO") for thread in threading.enumerate())
    held = {"tensors": tensors, "resident": len(engine.residents.resident()), "threads": threads}
    return held | {"rss": process.memory_info().rss, "files": process.num_fds()}


@pytest.mark.slow
# httpx warns about disconnected clients if they are still in use when the garbage collector finds them
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <async_generator object Response.aiter_raw:pytest.PytestUnraisableExceptionWarning"
)
def test_soak(tmp_path_factory: pytest.TempPathFactory) -> None:
    shop = make_shop(tmp_path_factory.mktemp("shop"))
    hostile.write(shop.adapters / "hostile")
    right = {
        (name, k): shop.wanted([] if name == "tiny" else [(name, 1.0)], prompt(9 + 20 * k, k), 12)
        for name in ("tiny", *KINDS)
        for k in range(3)
    }
    settings = {"rows": 8, "cache_bytes": 128 << 10, "adapter_bytes": 110_000, "http": HttpSettings(stall=1.0)}
    with served(shop, **settings) as whole:
        asyncio.run(Soak(whole, right).burst())
        asyncio.run(Soak(whole, right).run(WARM_UP, 0))
        seen = [left_over(whole)]
        did: Counter[str] = Counter()
        for part in range(PARTS):
            soak = Soak(whole, right)
            asyncio.run(soak.run(SECONDS / PARTS, part + 1))
            did += soak.did
            seen.append(left_over(whole))
        stats, residents = whole.engine.stats(), whole.engine.residents.stats()
        print(dict(did), *seen, stats, residents, sep="\n")
        assert len(did) == 10  # every behavior has occurred
        assert stats.preemptions > 0
        assert residents.evictions > 0
        before, after = seen[0], seen[-1]
        assert after["files"] <= before["files"]
        assert after["threads"] <= before["threads"]
        assert after["tensors"] <= before["tensors"] + TENSORS
        assert after["rss"] - before["rss"] < GROWTH
