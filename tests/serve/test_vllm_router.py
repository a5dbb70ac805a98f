"""veneer serve -> vllm-router -> two vLLM servers with the plug-in: real processes.

Expected answers are computed with veneer.core's attachment, as in tests/serve/test_vllm.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.http.toy import free_port, wait_for
from tests.serve.test_routers import Router, answers, router
from tests.serve.test_vllm import PYTHON, SPECS, TOKENS, Shop, made, start, wait
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.sources import find_base
from veneer.models.text.base import load_text
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.request import DigestMix, Request, Sampling, Token, make_mix, served_name
from veneer.serve.upstream import Upstream

pytestmark = pytest.mark.peers


class Fleet(Shop):
    """The shop of test_vllm.py, in which both vLLM servers have the plug-in."""

    def start(self, which: int) -> None:
        library = {"VENEER_LIBRARY": str(self.place / "library"), "VENEER_VLLM_CACHE": str(self.place / "mixes")}
        cores, port = sorted(os.sched_getaffinity(0)), int(self.urls[which].rpartition(":")[2])
        log = self.place / f"{which}.log"
        self.servers[which] = start(self.files, port, cores[which % len(cores)], log, **library)

    def ready(self, which: int) -> None:
        wait(self.servers[which], self.urls[which], self.place / f"{which}.log")

    def path(self, digest: str) -> Path:
        with open_library(self.place / "library") as library:
            return library.resolve(digest)

    def mix(self, **strengths: float) -> DigestMix:
        return make_mix([(self.adapters[name].digest(), s) for name, s in strengths.items()])

    def names(self, which: int) -> set[str]:
        return {card["id"] for card in httpx.get(f"{self.urls[which]}/v1/models", timeout=30).json()["data"]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}: make test-peers")
    place, files = tmp_path_factory.mktemp("fleet"), find_base("smollm2-135m")
    base = load_text(str(files), dtype="float32")
    adapters = {name: made(base, SPECS[name], i + 1) for i, name in enumerate(("plain", "stable"))}
    with open_library(place / "library") as library:
        for name, adapter in adapters.items():
            peft.write_folder(adapter, place / name, base=base.model)
            library.add(place / name, name)
    fleet = Fleet(base, place, adapters, [f"http://127.0.0.1:{free_port()}" for _ in range(2)])
    fleet.files, fleet.servers = files, {}
    try:
        for which in range(2):
            fleet.start(which)
        for which in range(2):
            fleet.ready(which)
        yield fleet
    finally:
        for server in fleet.servers.values():
            server.terminate()
        for server in fleet.servers.values():
            server.wait(timeout=60)


@pytest.fixture(scope="module")
def between(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router("vllm-router", fleet.urls, tmp_path_factory.mktemp("router")) as running:
        yield running


async def answer(door: Upstream, shop: Fleet, mix: DigestMix) -> tuple[list[int], list[float]]:
    sampling = Sampling(max_tokens=TOKENS, temperature=0, logprobs=2, ignore_eos=True)
    events = [e async for e in door.events(Request(tuple(shop.prompt), sampling, mix))]
    tokens = [e for e in events if isinstance(e, Token)]
    last = events[-1]
    assert (last.reason, last.usage.completion) == ("length", TOKENS)
    assert last.usage.prompt == len(shop.prompt)
    assert "".join(t.text for t in tokens) + last.text == shop.base.tokenizer.decode([t.id for t in tokens])
    assert all(len(t.top) == 2 and t.top[0][0] == t.id and t.top[0][2] >= t.top[1][2] for t in tokens)
    return [t.id for t in tokens], [t.logprob for t in tokens if t.logprob is not None]


def ask(fleet: Fleet, url: str, *mixes: dict[str, float]) -> None:
    """Send one request for each mix through a door at once, and check the answers."""

    async def work() -> None:
        door = Upstream(url, mixes=Mixes(fleet.path, fleet.place / "mixes"), decode=fleet.base.tokenizer.decode)
        await door.begin()
        try:
            got = await asyncio.gather(*(answer(door, fleet, fleet.mix(**mix)) for mix in mixes))
        finally:
            await door.end()
        for mix, each in zip(mixes, got, strict=True):
            fleet.check(*each, **mix)

    asyncio.run(work())


def test_adapters_and_mixes_are_answered_through_the_router(fleet, between):
    ask(fleet, between.url, {}, {"plain": 1.0}, {"stable": 1.0}, {"plain": 0.75, "stable": -0.5}, {"plain": 2.0})
    loaded = fleet.names(0) | fleet.names(1)
    assert {served_name(fleet.mix(**mix)) for mix in ({"plain": 1.0}, {"plain": 2.0})} <= loaded


def test_a_restarted_replica_needs_nothing(fleet, between):
    """Kill a replica; the other answers. Restart it, and kill the other: the new one loads adapters by name."""
    mixes: list[dict[str, float]] = [{}, {"plain": 1.0}, {"plain": 0.75, "stable": -0.5}]
    ask(fleet, between.url, *mixes)
    for killed in (0, 1):
        os.killpg(fleet.servers[killed].pid, signal.SIGKILL)
        fleet.servers[killed].wait()
        wait_for(lambda: answers(between.url), 120)
        for mix in mixes:
            ask(fleet, between.url, mix)
        fleet.start(killed)
        fleet.ready(killed)
