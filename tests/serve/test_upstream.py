"""A server in front of a fake vLLM over real HTTP.

Covers requests, retries, adapter names, and the limits on weighted mixes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.fake_servers import FakeVLLM, running
from veneer.core.adapter import Adapter, Pair
from veneer.errors import ConfigError
from veneer.formats import peft
from veneer.serve.fleet.mixes import Mixes
from veneer.serve.request import (
    DigestMix,
    EngineEvent,
    Finished,
    Refused,
    Request,
    Sampling,
    Started,
    Token,
    make_mix,
    served_name,
)
from veneer.serve.upstream import Upstream, upstream_url

Q = "model.layers.0.self_attn.q_proj"
ONE, TWO, DORA = (make_mix([(f"sha256:{c * 64}", 1.0)]) for c in "123")


class Setup:
    """A library of three adapters (the third uses DoRA), and the shared folder for mixes."""

    def __init__(self, tmp_path: Path) -> None:
        self.cache, self.adapters = tmp_path / "cache", {}
        for i, mix in enumerate((ONE, TWO, DORA)):
            pair = Pair(torch.ones(2, 4) * (i + 1), torch.ones(6, 2), 0.5, magnitude=torch.ones(6) if i == 2 else None)
            folder = peft.write_folder(Adapter({Q: pair}), tmp_path / f"adapter{i + 1}").folder
            self.adapters[mix[0][0]] = folder

    def resolve(self, name: str) -> Path | None:
        """Resolve a name as the plug-in does.

        Return an adapter's folder in the library or a mix's folder in the shared folder, otherwise None.
        """
        mix = self.cache / name
        return self.adapters.get(f"sha256:{name.removeprefix('veneer-')}") or (mix if mix.is_dir() else None)

    def mixes(self, **limits: Any) -> Mixes:
        return Mixes(self.adapters.__getitem__, self.cache, **limits)

    def upstream(self, url: str, mixes: Mixes | None = None, **more: Any) -> Upstream:
        def decode(ids):
            return "".join(f"<{i}>" for i in ids)

        return Upstream(url, mixes=mixes or self.mixes(), decode=decode, **more)

    def run(self, fake: FakeVLLM, work: Callable[[Upstream], Awaitable[None]], **limits: Any) -> None:
        """Run `work` with an upstream engine connected to the fake server."""
        fake.resolve = self.resolve

        async def live(url: str) -> None:
            engine = self.upstream(url, self.mixes(**limits))
            await engine.begin()
            await work(engine)
            await engine.end()

        with running(fake) as url:
            asyncio.run(live(url))

    def folders(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def answer(engine: Upstream, mix: DigestMix = (), tenant: str = "", **sampling: Any) -> list[EngineEvent]:
    request = Request((1, 2, 3), Sampling(**{"max_tokens": 9} | sampling), mix, tenant=tenant)
    return [event async for event in engine.events(request)]


def text(events: list[EngineEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, Token | Finished))


def weighted(n: int) -> list[DigestMix]:
    return [make_mix([(ONE[0][0], 0.5 + i / 100)]) for i in range(n)]


def test_requests_and_answers_are_translated_for_vllm(setup):
    same = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7, "logprobs": 2, "ignore_eos": True}
    same |= {"min_tokens": 2, "presence_penalty": 0.5, "repetition_penalty": 1.1, "frequency_penalty": 0.25}
    other = {"stop": ("END",), "logit_bias": {4: 1.0}, "stop_ids": (9,), "grammar": ("regex", "a+")}

    async def work(engine: Upstream) -> None:
        _, *tokens, last = await answer(engine, **same, **other)
        assert [token.id for token in tokens] == [100, 101, 102, 103, 104]
        assert tokens[0] == Token(100, " base", -0.5, ((8, "<8>", -0.25), (100, "<100>", -0.5)))
        assert (last.reason, last.stop, last.usage.completion) == ("stop", 104, 5)
        assert (last.usage.prompt, last.usage.cached) == (3, 2)
        stats = engine.stats()
        assert (stats.prompt_tokens, stats.generated_tokens, stats.running) == (3, 5, 0)
        with pytest.raises(Refused, match="prompt_logprobs"):
            await answer(engine, prompt_logprobs=True)

    setup.run(fake := FakeVLLM(), work)
    (body,) = fake.calls
    wanted = {"prompt": [1, 2, 3], "structured_outputs": {"regex": "a+"}, "logit_bias": {"4": 1.0}}
    wanted |= {"stop_token_ids": [9], **same}
    assert {name: body[name] for name in wanted} == wanted


def test_headers_identify_the_tenant_the_user_and_the_model(setup):
    """A router can group requests by these headers, but cannot read tenants and users."""

    def headers(i: int) -> tuple[str, ...]:
        names = ("x-llm-d-inference-fairness-id", "x-session-id", "x-veneer-model", "x-request-id")
        return tuple(fake.headers[i].get(name, "") for name in names)

    async def work(engine: Upstream) -> None:
        for i, (mix, tenant, user) in enumerate(
            [(ONE, "acme", "ann"), (TWO, "acme", "ann"), (ONE, "acme", ""), (TWO, "acme", ""), (ONE, "other", "ann")]
        ):
            request = Request((1, 2), Sampling(max_tokens=2), mix, tenant, i + 0.5, user=user, id=f"cmpl-{i}")
            [event async for event in engine.events(request)]
        await answer(engine)

    setup.run(fake := FakeVLLM(), work)
    fairness, sessions, models, ids = zip(*map(headers, range(6)), strict=True)
    assert len(set(fairness[:4])) == 1
    assert fairness[4] not in fairness[:4]
    assert fairness[5] == ""
    assert [float(h.get("x-veneer-weight", "0")) for h in fake.headers] == [0.5, 1.5, 2.5, 3.5, 4.5, 0]
    assert sessions[0] == sessions[1]
    assert len(set(sessions)) == 5
    assert models == (*(served_name(m) for m in (ONE, TWO, ONE, TWO, ONE)), "base")
    assert ids[:5] == tuple(f"cmpl-{i}" for i in range(5))
    sent = " ".join(" ".join(h.values()) for h in fake.headers)
    assert not any(word in sent for word in ("acme", "ann", "other"))


def test_a_base_can_have_any_name(setup):
    async def work(engine: Upstream) -> None:
        assert text(await answer(engine)).startswith(" base")

    setup.run(fake := FakeVLLM(base="org/modèle 7b"), work)
    assert fake.calls[0]["model"] == "org/modèle 7b"
    assert fake.headers[0]["x-veneer-model"] == "org/mod%C3%A8le 7b"


def test_a_retry_has_keys_that_choose_another_engine(setup):
    """A router that hashes a key sends equal keys to the same engine, which has just failed."""

    async def work(engine: Upstream) -> None:
        request = Request((1, 2), Sampling(max_tokens=2), ONE, tenant="acme", user="ann", id="cmpl-1")
        assert "adapter1" in text([event async for event in engine.events(request)])

    setup.run(fake := FakeVLLM(wrong=[(500, "broken")] * 2), work)
    for name in ("x-veneer-model", "x-session-id"):
        assert len({headers[name] for headers in fake.headers}) == 3
    assert {body["model"] for body in fake.calls} == {served_name(ONE)}
    assert {headers["x-request-id"] for headers in fake.headers} == {"cmpl-1"}


def test_a_plain_adapter_is_requested_by_its_digest(setup):
    async def work(engine: Upstream) -> None:
        assert "adapter1" in text(await answer(engine, ONE))

    setup.run(fake := FakeVLLM(), work)
    assert fake.calls[0]["model"] == "veneer-" + "1" * 64
    assert not setup.cache.exists()


def test_a_weighted_mix_is_written_once(setup):
    mix = make_mix([(ONE[0][0], 0.5), (TWO[0][0], -2.0)])
    file = setup.cache / served_name(mix) / "adapter_model.safetensors"

    async def work(engine: Upstream) -> None:
        assert served_name(mix) in text(await answer(engine, mix))
        written = file.stat().st_mtime_ns
        await answer(engine, mix)
        assert file.stat().st_mtime_ns == written

    setup.run(FakeVLLM(), work)
    pair = peft.read_folder(file.parent).pairs[Q]
    assert (pair.rank, pair.scale) == (4, 1.0)
    # 0.5 · 0.5 · (1 + 1) - 2 · 0.5 · (2 + 2): all elements of B are 1; those of A are 1 and 2, respectively
    torch.testing.assert_close(pair.B.double() @ pair.A.double(), torch.full((6, 4), -3.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fails", "mix", "why"),
    [
        (True, ONE, "could not be loaded"),
        (True, weighted(1)[0], "could not be loaded"),
        (False, make_mix([("sha256:" + "9" * 64, 1.0)]), "was not found"),
        (False, make_mix([(DORA[0][0], 0.5)]), "DoRA"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_refused(setup, fails, mix, why):
    async def work(engine: Upstream) -> None:
        with pytest.raises(Refused, match=why) as refusal:
            await answer(engine, mix)
        assert (refusal.value.status, refusal.value.code) == (400, "adapter_unusable")
        assert "base" in text(await answer(engine))

    setup.run(FakeVLLM(load_fails=fails), work)


def test_a_failed_request_is_retried_before_the_first_token_only(setup):
    fake = FakeVLLM(wrong=[(500, "CUDA error"), (429, "busy")])

    async def work(engine: Upstream) -> None:
        assert "base" in text(await answer(engine))
        assert len(fake.calls) == 3
        fake.breaks_after = 2
        events = await answer(engine)
        assert [type(e) for e in events] == [Started, Token, Token, Finished]
        assert (events[-1].reason, events[-1].error.code) == ("error", "unavailable")
        assert "127.0.0.1" not in str(events[-1].error)
        assert len(fake.calls) == 4

    setup.run(fake, work)


def test_a_request_that_always_fails_is_503_without_the_reason(setup, caplog):
    async def work(engine: Upstream) -> None:
        with pytest.raises(Refused, match="cannot be used") as refusal:
            await answer(engine)
        assert (refusal.value.status, refusal.value.code) == (503, "unavailable")
        assert refusal.value.retry_after >= 1
        assert "bad prompt" not in str(refusal.value)
        assert "bad prompt" in caplog.text
        assert not engine.trouble()
        assert "base" in text(await answer(engine))

    setup.run(FakeVLLM(wrong=[(500, "bad prompt")] * 3), work)


def test_an_unreachable_upstream_is_reported_and_gives_503(setup):
    with running(FakeVLLM()) as url:
        pass

    async def work() -> None:
        engine = setup.upstream(url)
        await engine.begin()
        assert engine.trouble()
        with pytest.raises(Refused, match="cannot be used") as refusal:
            await answer(engine)
        assert refusal.value.status == 503
        assert "127.0.0.1" not in str(refusal.value)
        await engine.end()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [(400, "This model's maximum context length is 64", "context_exceeded"), (422, "bad stop", "invalid_request")],
)
def test_an_invalid_request_is_not_retried(setup, status, message, code):
    async def work(engine: Upstream) -> None:
        with pytest.raises(Refused, match=message) as refusal:
            await answer(engine)
        assert (refusal.value.status, refusal.value.code) == (400, code)

    setup.run(fake := FakeVLLM(wrong=[(status, message)]), work)
    assert len(fake.calls) == 1


def test_answers_and_prompts_are_limited_to_the_context(setup):
    async def work(engine: Upstream) -> None:
        assert (await answer(engine, max_tokens=50))[-1].reason == "length"
        assert fake.calls[0]["max_tokens"] == 2
        with pytest.raises(Refused) as refusal:
            [e async for e in engine.events(Request((1,) * 5))]
        assert refusal.value.code == "context_exceeded"

    setup.run(fake := FakeVLLM(context=5), work)


def test_a_disconnected_client_cancels_the_upstream_request(setup):
    async def work(engine: Upstream) -> None:
        events = engine.events(Request((1, 2, 3)))
        assert isinstance(await anext(events), Started)
        assert engine.stats().running == 1
        await events.aclose()
        assert engine.stats().running == 0
        for _ in range(30):
            if fake.left:
                break
            await asyncio.sleep(0.05)
        assert fake.left == 1

    setup.run(fake := FakeVLLM(delay=0.1), work)


def test_a_closed_engine_refuses_requests(setup):
    async def work(engine: Upstream) -> None:
        await engine.end()
        with pytest.raises(Refused) as refusal:
            await answer(engine)
        assert refusal.value.code == "shutting_down"

    setup.run(FakeVLLM(), work)


def test_an_upstream_is_one_http_url():
    assert upstream_url("http://a:8000/v1/") == "http://a:8000"
    assert upstream_url("https://a/x") == "https://a/x"
    for wrong in ("a:8000", "ftp://a", "vllm+http://a", "http://a?adapters=b"):
        with pytest.raises(ConfigError):
            upstream_url(wrong)


def test_equal_mixes_have_equal_names():
    names = {served_name(m) for m in (ONE, TWO, make_mix([(ONE[0][0], 0.5)]), make_mix([*ONE, *TWO]))}
    assert len(names) == 4
    assert served_name(make_mix([*TWO, *ONE])) in names


# -- limits on mixes ---------------------------------------------------------------------------------------------------


def test_mixes_are_limited_for_each_tenant(setup):
    async def work(engine: Upstream) -> None:
        of_b = weighted(30)[-1]
        await answer(engine, of_b, tenant="b")
        for mix in weighted(12):
            await answer(engine, mix, tenant="a")
        assert setup.folders() == {served_name(m) for m in [*weighted(12)[-3:], of_b]}

    setup.run(FakeVLLM(), work, each=3, grace=-1.0)


def test_a_tenant_with_all_its_mixes_running_gets_429(setup):
    async def work(engine: Upstream) -> None:
        running_now = [engine.events(Request((1,), mix=m, tenant="a")) for m in weighted(2)]
        for events in running_now:
            await anext(events)
        with pytest.raises(Refused, match="2 different mixes") as refusal:
            await answer(engine, weighted(3)[2], tenant="a")
        assert (refusal.value.status, refusal.value.code) == (429, "overloaded")
        await answer(engine, weighted(3)[2], tenant="b")
        for events in running_now:
            assert [e async for e in events][-1].reason == "stop"

    setup.run(FakeVLLM(delay=0.05), work, each=2)


def test_least_recently_used_folders_over_the_size_limit_are_deleted(setup):
    async def work(engine: Upstream) -> None:
        await answer(engine, weighted(1)[0])
        size = sum(f.stat().st_size for f in next(setup.cache.iterdir()).iterdir())
        engine.mixes.limit_bytes = int(3.5 * size)
        for mix in weighted(8)[1:]:
            await answer(engine, mix)
        assert setup.folders() == {served_name(m) for m in weighted(8)[-3:]}
        assert served_name(weighted(1)[0]) in text(await answer(engine, weighted(1)[0]))  # written again

    setup.run(FakeVLLM(), work, grace=-1.0)


def test_folders_in_use_or_recently_used_are_kept(setup):
    async def work(engine: Upstream) -> None:
        first, *others = weighted(4)
        events = engine.events(Request((1,), mix=first))
        await anext(events)
        await answer(engine, others[0])
        assert setup.folders() == {served_name(first), served_name(others[0])}
        engine.mixes.grace = 60.0
        for mix in others:
            await answer(engine, mix)
        await events.aclose()
        assert len(setup.folders()) == 4

    setup.run(FakeVLLM(delay=0.02), work, limit_bytes=1, grace=-1.0)
