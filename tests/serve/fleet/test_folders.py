"""What a fleet keeps of the mixes that clients make: bounds on replicas and on disk, and where mixes go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.serve.fake_servers import FakeVLLM, running
from tests.serve.fleet.test_fleet import ONE, answer, fleet, run, said, shelf
from veneer.serve.fleet.fleet import Fleet
from veneer.serve.fleet.folders import served_name
from veneer.serve.request import DigestMix, Refused, Request, make_mix

__all__ = ["shelf"]


def blends(n: int) -> list[DigestMix]:
    """Mixes as a client makes them: other strengths each time."""
    return [make_mix([(ONE[0][0], 0.5 + i / 100)]) for i in range(n)]


def test_mixes_that_clients_make_are_bounded_for_each_tenant_on_replicas_and_on_disk(shelf, tmp_path):
    fakes = [FakeVLLM(), FakeVLLM()]

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path, mixes=3) as it:
            of_b = Request((1,), mix=blends(30)[-1], tenant="b")
            [_ async for _ in it.events(of_b)]
            for mix in blends(12):
                [_ async for _ in it.events(Request((1,), mix=mix, tenant="a"))]
            await settled(it)
            kept = {served_name(m) for m in blends(12)[-3:]} | {served_name(of_b.mix)}
            assert set(fakes[0].adapters) == set(fakes[1].adapters) == kept
            assert {p.name for p in it.folders.cache.iterdir()} == kept

    with running(*fakes) as urls:
        run(work(urls))


async def settled(it: Fleet) -> None:
    """What goes on behind requests has ended."""
    for _ in range(100):
        if all(task.done() for task in it.behind()):
            return
        await asyncio.sleep(0.05)


def test_more_mixes_at_once_than_a_tenant_may_have_are_refused_and_none_that_runs_is_taken(shelf, tmp_path):
    fake = FakeVLLM(delay=0.05)

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path, mixes=2) as it:
            running_now = [it.events(Request((1,), mix=m, tenant="a")) for m in blends(2)]
            for events in running_now:
                await anext(events)
            with pytest.raises(Refused, match="2 different mixes") as refusal:
                await anext(it.events(Request((1,), mix=blends(3)[2], tenant="a")))
            assert (refusal.value.status, refusal.value.code) == (429, "overloaded")
            await anext(it.events(Request((1,), mix=blends(3)[2], tenant="b")))
            for events in running_now:
                assert [e async for e in events][-1].reason == "stop"

    with running(fake) as urls:
        run(work(urls))


def test_folders_of_all_take_no_more_than_the_limit_and_the_longest_unused_go(shelf, tmp_path):
    fake = FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            await answer(it, blends(1)[0])
            size = sum(f.stat().st_size for f in next(it.folders.cache.iterdir()).iterdir())
            it.folders.limit_bytes, it.folders.grace = int(3.5 * size), 0.0
            for mix in blends(8)[1:]:
                await answer(it, mix)
                await settled(it)
            kept = {served_name(m) for m in blends(8)[-3:]}
            assert {p.name for p in it.folders.cache.iterdir()} == kept == set(fake.adapters)
            assert "adapter1" not in said(await answer(it, blends(8)[0]))  # made again, under its own name
            assert served_name(blends(1)[0]) in fake.adapters

    with running(fake) as urls:
        run(work(urls))


def test_a_folder_that_another_front_door_collected_is_made_again(shelf, tmp_path):
    fake = FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it, fleet(urls, shelf, tmp_path) as other:
            mix = blends(1)[0]
            await answer(it, mix)
            other.collect([served_name(mix)])
            await settled(other)
            fake.adapters.clear()
            assert not list(it.folders.cache.iterdir())
            assert served_name(mix) in said(await answer(it, mix))
            assert Path(fake.adapters[served_name(mix)]).is_dir()

    with running(fake) as urls:
        run(work(urls))


def test_a_mix_goes_to_the_same_few_replicas_whichever_front_door_asks(shelf, tmp_path):
    fakes = [FakeVLLM() for _ in range(4)]

    async def work(urls: list[str]) -> None:
        for door in range(2):
            async with fleet(urls[::-1] if door else urls, shelf, tmp_path / str(door), mix_copies=2) as it:
                for mix in blends(16):
                    await answer(it, mix)
                await settled(it)
        assert sum(len(f.asked("load")) for f in fakes) == 2 * 16  # the second door found all where it looked
        assert all(1 <= len(f.adapters) <= 15 for f in fakes)
        before = [set(f.adapters) for f in fakes]
        async with fleet(urls[:3], shelf, tmp_path / "fewer", mix_copies=2) as it:
            for mix in blends(16):
                await answer(it, mix)
            await settled(it)
        moved = set().union(*(set(f.adapters) - had for f, had in zip(fakes, before, strict=True)))
        assert moved <= before[3]  # only what was on the one that left

    with running(*fakes) as urls:
        run(work(urls))
