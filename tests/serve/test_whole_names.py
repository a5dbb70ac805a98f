"""Names change while the server runs: requests get the current adapter, and unused adapters are released."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.http.toy import wait_for
from tests.serve.whole import Said, Shop, Whole, alive, asking, held, prompt, slowed

LONG = 80


class Running:
    """A running stream that has already received tokens."""

    def __init__(self, whole: Whole, model: str, ids: list[int]) -> None:
        self.texts: list[str] = []
        self.logprobs: list[float] = []
        self.ended: list[str] = []
        self.stream: Any = whole.client.completions.create(**asking(model, ids, LONG), stream=True)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        wait_for(lambda: len(self.logprobs) > 2)

    def _read(self) -> None:
        for chunk in self.stream:
            choice = chunk.choices[0]
            self.texts.append(choice.text)
            self.logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
            self.ended += [choice.finish_reason] if choice.finish_reason else []

    def whole_answer(self) -> Said:
        self.thread.join(60)
        assert self.ended == ["length"]
        return Said(self.logprobs, "".join(self.texts))


def refused(whole: Whole, model: str) -> tuple[int, str]:
    answer = whole.http.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 2})
    return answer.status_code, answer.json()["error"]["code"]


def test_reloading_a_name_keeps_running_requests(whole: Whole, shop: Shop) -> None:
    ids = prompt(20, 6)
    assert whole.load("live", "plain").status_code == 200
    taken = whole.load("live", "rs")
    assert taken.status_code == 400
    assert "already been loaded" in taken.text
    before, after = shop.wanted([("plain", 1.0)], ids, LONG), shop.wanted([("rs", 1.0)], ids, LONG)
    with slowed(whole.engine):
        running = Running(whole, "live", ids)
        assert whole.load("live", "rs", load_inplace=True).status_code == 200
        assert whole.ask("live", ids, LONG // 10).logprobs == pytest.approx(after.logprobs[: LONG // 10], abs=1e-4)
        assert not running.ended
        assert running.whole_answer().same(before)
    assert whole.ask("live", ids, LONG).same(after)
    for _ in range(3):  # load the name from a file that is overwritten with other weights
        for seed in (70, 71):
            shop.make("changing", seed)
            shop.kept.clear()
            assert whole.load("live", "changing", load_inplace=True).status_code == 200
            assert whole.ask("live", ids).same(shop.wanted([("changing", 1.0)], ids, 12))
    assert whole.unload("live").status_code == 200
    whole.idle()


@pytest.mark.parametrize("kind", ["plain", "dora", "rows"])
def test_unloading_waits_for_requests_and_frees_memory(whole: Whole, shop: Shop, kind: str) -> None:
    """New requests cannot use the name any more, but running requests finish. Then the memory is released."""
    ids = prompt(20, 7)
    digest = shop.make(
        "leaving", 50, **({"token_rows": {"model.embed_tokens": (9,)}} if kind == "rows" else {}), dora=kind == "dora"
    )
    wanted = shop.wanted([("leaving", 1.0)], ids, LONG)
    shop.kept.clear()
    bytes_before = whole.engine.residents.stats().bytes
    assert whole.load("leaving", "leaving").status_code == 200
    watched = held(whole.engine, digest)
    with slowed(whole.engine):
        running = Running(whole, "leaving", ids)
        assert whole.engine.residents.stats().bytes > bytes_before
        assert whole.unload("leaving").status_code == 200
        assert refused(whole, "leaving") == (404, "model_not_found")
        assert "leaving" not in [card.id for card in whole.client.models.list()]
        assert not running.ended
        assert running.whole_answer().same(wanted)
    whole.idle()
    assert digest not in whole.engine.residents.resident()
    assert whole.engine.residents.stats().bytes == bytes_before
    runner = whole.engine.runner  # the runner must not keep the adapter attached
    wait_for(lambda: not alive(watched) and digest not in runner.attached, 5)


def test_changing_names_never_serve_another_adapter(whole: Whole, shop: Shop) -> None:
    """While a name is replaced, unloaded and loaded, a response is either the completion of one of the name's
    adapters or a 404."""
    ids, kinds = prompt(18, 8), ("plain", "rs", "dora")
    right = {kind: shop.wanted([(kind, 1.0)], ids, 8) for kind in kinds}
    stop = threading.Event()

    def client() -> tuple[int, int]:
        answered = gone = 0
        while not stop.is_set():
            answer = whole.http.post("/v1/completions", json=flat(asking("swapped", ids, 8)))
            if answer.status_code == 404:
                gone += 1
                continue
            choice = answer.json()["choices"][0]
            got = Said(choice["logprobs"]["token_logprobs"], choice["text"])
            assert any(got.same(each) for each in right.values())
            answered += 1
        return answered, gone

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            for turn in range(30):
                assert whole.load("swapped", kinds[turn % 3], load_inplace=True).status_code == 200
                assert whole.ask("swapped", ids, 8).same(right[kinds[turn % 3]])
                if turn % 4 == 3:
                    assert whole.unload("swapped").status_code == 200
                    assert refused(whole, "swapped")[0] == 404
        finally:
            stop.set()
        counts = [each.result() for each in clients]
    assert sum(answered for answered, _ in counts) > 10
    whole.idle()


def flat(asked: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in asked.items() if k != "extra_body"}, **asked["extra_body"]}
