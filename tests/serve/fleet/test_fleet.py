"""A fleet before fake servers over real HTTP: what it sends, where it sends it, and what it does when one fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.fake_servers import FakeTGI, FakeVLLM, running
from veneer.core.adapter import Adapter, Pair
from veneer.errors import ConfigError
from veneer.formats import peft
from veneer.serve.fleet import fleet as upstream
from veneer.serve.fleet.fleet import Fleet
from veneer.serve.fleet.folders import served_name
from veneer.serve.fleet.remote import parse_upstream
from veneer.serve.request import DigestMix, EngineEvent, Finished, Refused, Request, Sampling, Started, Token, make_mix

Q = "model.layers.0.self_attn.q_proj"
ONE, TWO, WRONG = (make_mix([(f"sha256:{c * 64}", 1.0)]) for c in "123")


@pytest.fixture
def shelf(tmp_path: Path) -> Callable[[str], Path]:
    """digest -> its files: two plain adapters, and one with DoRA."""
    places = {}
    for i, mix in enumerate((ONE, TWO, WRONG)):
        pair = Pair(torch.ones(2, 4) * (i + 1), torch.ones(6, 2), 0.5, magnitude=torch.ones(6) if i == 2 else None)
        places[mix[0][0]] = peft.write_folder(Adapter({Q: pair}), tmp_path / f"adapter{i + 1}").folder
    return lambda digest: places[digest]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def fleet(urls: list[str], shelf: Callable[[str], Path], tmp_path: Path, **more: Any) -> Fleet:
    return Fleet(urls, files=shelf, decode=lambda ids: "".join(f"<{i}>" for i in ids), cache=tmp_path / "cache", **more)


async def answer(it: Fleet, mix: DigestMix = (), **sampling: Any) -> list[EngineEvent]:
    request = Request((1, 2, 3), Sampling(**{"max_tokens": 9} | sampling), mix)
    return [event async for event in it.events(request)]


def said(events: list[EngineEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, Token | Finished))


def test_a_request_becomes_vllms_and_its_answer_tokens(shelf, tmp_path):
    fake = FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path, key="sesame") as it:
            sampling = {
                "temperature": 0.5,
                "top_k": 3,
                "top_p": 0.9,
                "min_p": 0.1,
                "seed": 7,
                "stop": ("END",),
                "logprobs": 2,
                "logit_bias": {4: 1.0},
                "stop_ids": (9,),
                "ignore_eos": True,
                "min_tokens": 2,
                "presence_penalty": 0.5,
                "repetition_penalty": 1.1,
                "frequency_penalty": 0.25,
                "grammar": ("regex", "a+"),
            }
            events = await answer(it, **sampling)
            assert isinstance(events[0], Started)
            assert [e.id for e in events if isinstance(e, Token)] == [100, 101, 102, 103, 104]
            assert events[1] == Token(100, " base", -0.5, ((8, "<8>", -0.25), (100, "<100>", -0.5)))
            assert isinstance(events[-1], Finished)
            assert (events[-1].reason, events[-1].stop, events[-1].usage.completion) == ("stop", 104, 5)
            assert (events[-1].usage.prompt, events[-1].usage.cached) == (3, 2)
            (body,) = fake.asked("complete")
            assert body["prompt"] == [1, 2, 3]
            assert body["structured_outputs"] == {"regex": "a+"}
            assert body["logit_bias"] == {"4": 1.0}
            assert body["stop_token_ids"] == [9]
            for name in set(sampling) - {"logit_bias", "stop_ids", "grammar", "stop"}:
                assert body[name] == sampling[name], name
            stats = it.stats()
            assert (stats.prompt_tokens, stats.generated_tokens, stats.running) == (3, 5, 0)

    with running(fake) as urls:
        run(work(urls))


def test_an_adapter_is_loaded_on_every_replica_before_it_is_routed_there(shelf, tmp_path):
    fast, slow = FakeVLLM(), FakeVLLM(load_delay=0.4)

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            events = await answer(it, ONE)
            assert "adapter1" in said(events)
            assert not slow.adapters
            assert not slow.asked("complete")  # it is not there yet
            await answer(it, ONE)
            await asyncio.sleep(0.6)
            await answer(it, ONE)
            await answer(it, ONE)
            assert len(slow.asked("load")) == len(fast.asked("load")) == 1
            assert [len(f.asked("complete")) for f in (fast, slow)] == [2 + 1, 1]
            name = served_name(ONE)
            assert all(set(r.resident) == {name} for r in it.replicas)
            # a plain adapter is served from the library's own files
            assert fast.adapters == {name: str(tmp_path / "adapter1")}

    with running(fast, slow) as urls:
        run(work(urls))


def test_a_weighted_mix_goes_as_one_adapter_of_summed_rank(shelf, tmp_path):
    fake = FakeVLLM()
    mix = make_mix([(ONE[0][0], 0.5), (TWO[0][0], -2.0)])

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            await answer(it, mix)
            await answer(it, make_mix([(ONE[0][0], 0.5)]))

    with running(fake) as urls:
        run(work(urls))
    assert set(fake.adapters) == {served_name(mix), served_name(make_mix([(ONE[0][0], 0.5)]))}
    pair = peft.read_folder(fake.adapters[served_name(mix)]).pairs[Q]
    assert (pair.rank, pair.scale) == (4, 1.0)
    parts = [(peft.read_folder(shelf(digest)).pairs[Q], strength) for digest, strength in mix]
    want = sum(s * p.scale * p.B.double() @ p.A.double() for p, s in parts)
    torch.testing.assert_close(pair.B.double() @ pair.A.double(), want)


def test_what_cannot_be_loaded_is_refused_and_never_answered_by_the_base(shelf, tmp_path):
    fake = FakeVLLM(load_refusal="LoRA rank 64 is greater than max_lora_rank 16.")

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            for _ in range(2):
                with pytest.raises(Refused, match="max_lora_rank") as refusal:
                    await answer(it, ONE)
                assert (refusal.value.status, refusal.value.code) == (422, "adapter_unusable")
            assert len(fake.asked("load")) == 1  # remembered
            with pytest.raises(Refused, match="does not support DoRA"):
                await answer(it, WRONG)
            with pytest.raises(Refused, match="max_lora_rank"):
                await it.load(ONE)
            assert not fake.asked("complete")
            assert "base" in said(await answer(it))

    with running(fake) as urls:
        run(work(urls))


def test_a_refusal_is_forgotten_after_its_time(shelf, tmp_path, monkeypatch):
    """Refusals of mixes that clients invent, and that no replica serves, do not accumulate."""
    fake = FakeVLLM(load_refusal="LoRA rank 64 is greater than max_lora_rank 16.")
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            for strength in (0.25, 0.5, 0.75):
                with pytest.raises(Refused, match="max_lora_rank"):
                    await answer(it, make_mix([(ONE[0][0], strength)]))
                passed[0] += 60.0
            assert len(it.refused) == 1

    with running(fake) as urls:
        run(work(urls))


def test_only_replicas_that_could_load_it_get_the_request(shelf, tmp_path):
    able, unable = FakeVLLM(), FakeVLLM(load_refusal="no room")

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            assert await it.load(ONE) == {urls[0]: "", urls[1]: "a replica cannot load it: no room"}
            for _ in range(4):
                assert "adapter1" in said(await answer(it, ONE))
            assert len(able.asked("complete")) == 4

    with running(able, unable) as urls:
        run(work(urls))


def test_a_replica_that_was_restarted_gets_the_adapter_again(shelf, tmp_path):
    fake = FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            await answer(it, ONE)
            fake.adapters.clear()
            assert "adapter1" in said(await answer(it, ONE))
            assert len(fake.asked("load")) == 2

    with running(fake) as urls:
        run(work(urls))


def test_another_replica_is_tried_before_the_first_token_and_none_after_it(shelf, tmp_path):
    ill, well = FakeVLLM(wrong=[(500, "CUDA error")] * 9), FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            for _ in range(6):
                assert "base" in said(await answer(it))
            assert len(ill.asked("complete")) == upstream.FAULTS  # then it rests
            assert [r.up for r in it.replicas] == [False, True]
            well.breaks_after = 2
            events = await answer(it)
            assert [type(e) for e in events] == [Started, Token, Token, Finished]
            assert events[-1].reason == "error"
            assert events[-1].error.code == "unavailable"
            assert "127.0.0.1" not in str(events[-1].error)

    with running(ill, well) as urls:
        run(work(urls))


def test_nobody_there_is_a_503_and_comes_back(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "REST", (0.05, 0.1))

    async def work() -> None:
        fake = FakeVLLM()
        with running(fake) as urls:
            place = urls[0]
        async with fleet([place], shelf, tmp_path) as it:
            with pytest.raises(Refused, match="cannot be used") as refusal:
                await answer(it)
            assert (refusal.value.status, refusal.value.code) == (503, "unavailable")
            assert "127.0.0.1" not in str(refusal.value)
            assert refusal.value.retry_after >= 1

    run(work())


def test_a_poisonous_request_does_not_take_the_fleet_down(shelf, tmp_path, caplog):
    fakes = [FakeVLLM(wrong=[(500, "bad prompt")]) for _ in range(2)]

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            with pytest.raises(Refused, match="cannot be used") as refusal:
                await answer(it)
            assert "bad prompt" not in str(refusal.value)
            assert "bad prompt" in caplog.text
            assert all(r.up for r in it.replicas)
            assert "base" in said(await answer(it))

    with running(*fakes) as urls:
        run(work(urls))


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [(400, "This model's maximum context length is 64", "context_exceeded"), (422, "bad stop", "invalid_request")],
)
def test_the_clients_own_mistakes_are_told_and_not_tried_elsewhere(shelf, tmp_path, status, text, code):
    fakes = [FakeVLLM(wrong=[(status, text)]), FakeVLLM(wrong=[(status, text)])]

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            with pytest.raises(Refused, match=text) as refusal:
                await answer(it)
            assert (refusal.value.status, refusal.value.code) == (400, code)

    with running(*fakes) as urls:
        run(work(urls))
    assert sum(len(f.asked("complete")) for f in fakes) == 1


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_is_cut_to_it(shelf, tmp_path):
    fake = FakeVLLM(room=5)

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            assert (await answer(it, max_tokens=50))[-1].reason == "length"
            assert fake.asked("complete")[0]["max_tokens"] == 2
            with pytest.raises(Refused) as refusal:
                [e async for e in it.events(Request((1,) * 5))]
            assert refusal.value.code == "context_exceeded"

    with running(fake) as urls:
        run(work(urls))


def test_a_client_that_leaves_ends_the_work_upstream(shelf, tmp_path):
    fake = FakeVLLM(delay=0.1)

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            events = it.events(Request((1, 2, 3)))
            assert isinstance(await anext(events), Started)
            assert it.stats().running == 1
            await events.aclose()
            assert it.stats().running == 0
            for _ in range(30):
                if fake.left:
                    break
                await asyncio.sleep(0.05)
            assert fake.left == 1

    with running(fake) as urls:
        run(work(urls))


def test_requests_go_where_fewest_run_and_where_the_adapter_is(shelf, tmp_path):
    fakes = [FakeVLLM(delay=0.05), FakeVLLM(delay=0.05)]

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path, mix_copies=1) as it:
            await asyncio.gather(*(answer(it) for _ in range(6)))
            assert [len(f.asked("complete")) for f in fakes] == [3, 3]
            half, twice = (
                make_mix([(digest, strength)]) for (digest, _), strength in zip(ONE + TWO, (0.5, 2.0), strict=True)
            )
            await asyncio.gather(*(answer(it, m) for m in (half, twice)))
            assert sum(len(f.adapters) for f in fakes) == 2
            holder = next(f for f in fakes if served_name(half) in f.adapters)
            before = len(holder.asked("complete"))
            await asyncio.gather(*(answer(it, half) for _ in range(4)))
            assert len(holder.asked("complete")) == before + 4
            assert sum(len(f.asked("load")) for f in fakes) == 2

    with running(*fakes) as urls:
        run(work(urls))


def test_the_adapter_longest_unused_makes_room_and_a_busy_one_never(shelf, tmp_path):
    fake = FakeVLLM()
    mixes = [make_mix([(ONE[0][0], s)]) for s in (1.0, 0.5, 0.25)]

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path, capacity=2) as it:
            for mix in mixes:
                await answer(it, mix)
            assert fake.asked("unload") == [{"lora_name": served_name(mixes[0])}]
            fake.delay = 0.1
            events = it.events(Request((1,), mix=mixes[1]))
            await anext(events)
            await answer(it, mixes[0])
            assert fake.asked("unload")[1:] == [{"lora_name": served_name(mixes[2])}]
            await events.aclose()
            await it.unload(mixes[0])
            assert set(fake.adapters) == {served_name(mixes[1])}

    with running(fake) as urls:
        run(work(urls))


def test_what_an_earlier_front_door_loaded_is_known(shelf, tmp_path):
    fake = FakeVLLM(adapters={served_name(ONE): "/somewhere/adapter1", "somebody-elses": "/x"})

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            assert set(it.replicas[0].resident) == {served_name(ONE)}
            await answer(it, ONE)
            assert not fake.asked("load")

    with running(fake) as urls:
        run(work(urls))


def test_another_openai_server_is_asked_for_no_more_than_it_knows(shelf, tmp_path):
    fake = FakeVLLM(owner="somebody")

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            events = await answer(it, temperature=0.5)
            assert said(events) == " base x x x x"
            assert events[-1].usage.completion == 5
            assert "top_k" not in fake.asked("complete")[0]
            with pytest.raises(Refused, match="top_k") as refusal:
                await answer(it, top_k=4)
            assert refusal.value.status == 400
            with pytest.raises(Refused) as refusal:
                await answer(it, ONE)
            assert refusal.value.code == "adapter_unusable"
            assert len(fake.asked("complete")) == 1

    with running(fake) as urls:
        run(work(urls))


def test_what_only_some_replicas_can_do_goes_to_those(shelf, tmp_path):
    plain, full = FakeVLLM(owner="somebody"), FakeVLLM()

    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            for _ in range(3):
                await answer(it, top_k=4)
            assert (len(plain.asked("complete")), len(full.asked("complete"))) == (0, 3)

    with running(plain, full) as urls:
        run(work(urls))


def test_tgi_gets_text_and_only_adapters_that_it_really_has(shelf, tmp_path):
    fake = FakeTGI(adapters={served_name(ONE)})

    async def work(url: str) -> None:
        place = f"tgi+{url}?adapters={served_name(ONE)},{served_name(TWO)}"
        async with fleet([place], shelf, tmp_path) as it:
            events = await answer(it, ONE, stop=("STOP",), seed=3)
            assert said(events) == " a "  # the stop text came in two tokens and is no part of it
            assert (events[-1].reason, events[-1].stop) == ("stop", "STOP")
            body = fake.calls[0][1]
            assert body["inputs"] == "<1><2><3>"
            assert body["add_special_tokens"] is False
            assert body["parameters"]["adapter_id"] == served_name(ONE)
            assert said(await answer(it, stop=("NEVER", " restaurant"))) == " a STOP rest"
            assert "adapter_id" not in fake.calls[1][1]["parameters"]
            # TGI would answer with the base: named in the URL, and its answers are the base's
            with pytest.raises(Refused, match="not started with this adapter"):
                await answer(it, TWO)
            with pytest.raises(Refused, match="min_p"):
                await answer(it, min_p=0.5)
            with pytest.raises(Refused, match="logprobs"):
                await answer(it, logprobs=1, temperature=0.3)
            assert len(fake.calls) == 2

    with running(fake) as urls:
        run(work(urls[0]))


def test_a_fleet_that_closes_takes_no_more(shelf, tmp_path):
    async def work(urls: list[str]) -> None:
        async with fleet(urls, shelf, tmp_path) as it:
            pass
        with pytest.raises(Refused) as refusal:
            await answer(it)
        assert refusal.value.code == "shutting_down"

    with running(FakeVLLM()) as urls:
        run(work(urls))


def test_upstreams_are_named_clearly():
    assert parse_upstream("http://a:8000/v1/") == ("", "http://a:8000", ())
    assert parse_upstream("tgi+https://a/x?adapters=b,c") == ("tgi", "https://a/x", ("b", "c"))
    for wrong in ("a:8000", "ftp://a", "sglang+http://a", "http://a?adapters=b", "tgi+http://a?b=c"):
        with pytest.raises(ConfigError):
            parse_upstream(wrong)
    with pytest.raises(ConfigError, match="each named once"):
        Fleet(["http://a", "http://a"], files=Path, decode=str, cache=Path())


def test_names_are_of_the_mix_and_nothing_else():
    names = [served_name(m) for m in (ONE, TWO, make_mix([(ONE[0][0], 0.5)]), make_mix([*ONE, *TWO]))]
    assert all(a != b for a, b in itertools.combinations(names, 2))
    assert served_name(make_mix([*TWO, *ONE])) == names[3]
    assert all(len(n) == len("veneer-") + 32 for n in names)
