"""The picture engine: batches, fairness, disconnects, failures and the adapter cache."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_twins import levels, state_of
from tests.serve.http.toy import wait_for
from tests.serve.pictures_here import Shelf, ask, collect, drawn, shelf_of
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer.adapters.use import load_adapter
from veneer.core.adapter import Adapter, Pair
from veneer.errors import BaseError
from veneer.formats.convert import write
from veneer.imaging.adapters import ImagePipeline
from veneer.imaging.reproduce import read_recipe, reproduce
from veneer.library.library import open_library
from veneer.models.image.base import ImageBase, load_image
from veneer.serve.pictures import engine as pictures
from veneer.serve.pictures.engine import PictureEngine, PictureTurns
from veneer.serve.pictures.request import FinishedPicture, PictureStep, Queued
from veneer.serve.request import Refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ImageBase:
    return load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), "flux1")))


@pytest.fixture(scope="module")
def shelf(base: ImageBase) -> Shelf:
    return shelf_of(base)


@pytest.fixture
def engine(base: ImageBase, shelf: Shelf) -> Iterator[PictureEngine]:
    before = state_of(base.model)
    with PictureEngine(base, shelf.read, window=0.5) as opened:
        yield opened
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "the base was changed"


def test_a_picture_does_not_depend_on_its_batch(engine: PictureEngine, shelf: Shelf) -> None:
    brand, look, dora = (shelf.digest[name] for name in ("brand", "look", "dora"))
    requests = [ask(1, (brand, 0.8)), ask(2, (look, -0.5), (dora, 0.7), prompt="a dog"), ask(3), ask(1, (dora, 1.0))]
    together = drawn(engine, *requests)
    assert [one.batch for one in together] == [4] * 4
    alone = [drawn(engine, request)[0] for request in requests]
    assert [one.batch for one in alone] == [1] * 4
    for own, shared in zip(alone, together, strict=True):
        assert levels(own.picture.image, shared.picture.image) <= 1
    assert levels(alone[0].picture.image, alone[3].picture.image) > 8, "the mixes act"


def test_adapters_alternate_without_side_effects(engine: PictureEngine, shelf: Shelf) -> None:
    a, b = (shelf.digest["brand"], 1.0), (shelf.digest["dora"], 1.0)
    pictures = [drawn(engine, ask(5, *mix))[0].picture.image for mix in ([a], [b], [], [a], [])]
    assert levels(pictures[0], pictures[3]) == levels(pictures[2], pictures[4]) == 0
    assert min(levels(pictures[0], pictures[1]), levels(pictures[1], pictures[2])) > 8


def test_only_compatible_requests_share_a_batch(engine: PictureEngine) -> None:
    requests = [ask(1), ask(2, steps=2), ask(3), ask(4, width=2 * SIZE), ask(5, guidance=2.0), ask(6)]
    assert [one.batch for one in drawn(engine, *requests)] == [3, 1, 3, 1, 1, 3]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", ["flux1", "sdxl"])
def test_each_request_gets_its_pictures(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    base = load_image(str(tiny_image_base(folder, family)))
    half = Image.new("L", (SIZE, SIZE))
    half.paste(255, (0, 0, SIZE // 2, SIZE))
    monkeypatch.setattr(pictures, "control_model_of", lambda base, spec: str(tiny_control(folder, family)))
    with PictureEngine(base, shelf_of(base).read, window=0.5) as engine:
        from veneer.models.image.generate import Control

        model = engine.control("edges")[1]
        assert engine.control("depth")[1] is model, "loaded once"
        edits = [ask(i, image=noise(i), mask=m, denoise=0.7) for i, m in ((1, half), (2, half.transpose(2)))]
        held = [ask(i, controls=(Control(model, noise(i), 0.9),)) for i in (3, 4)]
        twice = [ask(i, controls=(Control(model, noise(i), 0.5), Control(model, noise(i + 1), 0.9))) for i in (5, 6)]
        groups = [edits, held, twice] if family == "sdxl" else [edits, held]
        for pair in groups:
            together = drawn(engine, *pair)
            assert [one.batch for one in together] == [2, 2]
            for request, shared in zip(pair, together, strict=True):
                assert levels(drawn(engine, request)[0].picture.image, shared.picture.image) <= 1


def test_steps_are_reported(engine: PictureEngine) -> None:
    events: list[tuple[int, Any]] = []
    asyncio.run(collect(engine, ask(1, steps=8), ask(2, steps=8), on_event=lambda i, event: events.append((i, event))))
    own = [event for i, event in events if i == 0]
    assert isinstance(own[0], Queued)
    assert [event.done for event in own if isinstance(event, PictureStep)] == list(range(1, 9))


def test_a_cancelled_request_computes_nothing_more(engine: PictureEngine) -> None:
    async def run() -> tuple[int, list[FinishedPicture]]:
        async with aclosing(engine.events([ask(1, steps=100)])) as events:
            async for _, event in events:
                if isinstance(event, PictureStep):
                    break
        while engine.stats().running:
            await asyncio.sleep(0.01)
        alone = engine.stats().steps
        staying = asyncio.create_task(collect(engine, ask(2, steps=5)))
        leaving = asyncio.create_task(collect(engine, ask(3, steps=5)))
        queued = asyncio.create_task(collect(engine, ask(4, steps=90)))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        leaving.cancel()
        queued.cancel()
        return alone, await staying

    alone, made = asyncio.run(run())
    assert alone < 60, "a batch that all have left ends"
    assert made[0].batch == 2
    assert engine.stats().steps == alone + 5, "the waiting request never started"
    assert engine.stats().waiting == 0


def test_turns_are_shared_by_weight() -> None:
    turns = PictureTurns()
    weights = {"a": 1.0, "b": 2.0}
    for tenant in weights:
        turns.enter(tenant, {*weights} - {tenant})
    order = ""
    for _ in range(9):
        tenant = min(weights, key=turns.at)
        turns.take(tenant, weights[tenant])
        order += tenant
    assert order.count("b") == 2 * order.count("a")
    turns.enter("late", {"a", "b"})
    assert turns.at("late") >= max(map(turns.at, weights)) - 1, "a pause saves nothing up"


def test_unknown_controls_are_refused_with_the_bases_kinds(
    base: ImageBase, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, base: ImageBase) -> None:
        raise BaseError("not found", fix="download it")

    monkeypatch.setattr(pictures, "load_control", fail)
    with PictureEngine(base, shelf.read) as engine:
        for known, fix in (({}, "this base has no ControlNet"), ({"depth": "none/such"}, "use one of depth")):
            packaged = replace(base.row, control="known", controlnets=known)
            monkeypatch.setattr(type(base), "row", packaged)
            with pytest.raises(Refused, match="no control of type 'edges'") as caught:
                engine.control("edges")
            assert fix in str(caught.value.fix)
        with pytest.raises(Refused, match="not found") as caught:
            engine.control("depth")
        assert (caught.value.status, caught.value.fix) == (400, "download it")


def test_a_busy_tenant_does_not_delay_others(base: ImageBase, shelf: Shelf) -> None:
    order: list[str] = []
    with PictureEngine(base, shelf.read, window=0.3, max_batch=1) as engine:

        async def one(tenant: str, seed: int) -> None:
            await collect(engine, ask(seed, tenant=tenant, steps=2))
            order.append(tenant)

        async def run() -> None:
            many = [asyncio.create_task(one("many", i)) for i in range(5)]
            while engine.stats().waiting < 5 and not order:
                await asyncio.sleep(0.001)
            await asyncio.gather(*many, one("few", 9))

        asyncio.run(run())
    assert order.index("few") <= 2


def test_a_full_or_closed_queue_refuses_requests(base: ImageBase, shelf: Shelf) -> None:
    engine = PictureEngine(base, shelf.read, window=5.0, max_batch=8, max_waiting=2)

    async def run() -> list[Any]:
        first = asyncio.create_task(collect(engine, ask(1), ask(2)))
        while engine.stats().waiting < 2:
            await asyncio.sleep(0.001)
        more = await asyncio.gather(collect(engine, ask(3)), return_exceptions=True)
        await asyncio.to_thread(engine.close)
        late = await asyncio.gather(first, collect(engine, ask(4)), return_exceptions=True)
        return [*more, *late]

    full, waiting, closed = asyncio.run(run())
    assert (full.status, full.code, full.retry_after) == (429, "overloaded", 5.0)
    assert waiting.code == closed.code == "shutting_down"
    with PictureEngine(base, shelf.read, max_waiting=2) as again, pytest.raises(Refused, match="at most 2"):
        asyncio.run(collect(again, ask(1), ask(2), ask(3)))


def test_an_error_fails_only_its_picture(base: ImageBase, shelf: Shelf) -> None:
    first = next(iter(shelf.adapters.values()))
    name, pair = next((n, p) for n, p in first.pairs.items() if n.startswith("transformer"))
    over = Adapter({name: Pair(pair.A * 1e20, pair.B * 1e20, 1.0)})
    unfit = Adapter({name: Pair(pair.A[:, :-1], pair.B, 1.0)})
    bad = Shelf(over=over, unfit=unfit)
    bad.adapters |= shelf.adapters
    with PictureEngine(base, bad.read, window=0.5) as engine:

        async def run() -> list[Any]:
            mixes = [(bad.digest["over"], 1.0)], [(bad.digest["unfit"], 1.0)], [], [("sha256:no", 1.0)]
            asked = [collect(engine, ask(i, *mix)) for i, mix in enumerate(mixes)]
            return await asyncio.gather(*asked, return_exceptions=True)

        overflow, unfitting, fine, missing = asyncio.run(run())
        assert levels(fine[0].picture.image, drawn(engine, ask(2))[0].picture.image) == 0
    assert (overflow.code, overflow.status) == ("invalid_request", 400)
    assert "NaN or infinite" in str(overflow)
    assert unfitting.code == "adapter_unusable"
    assert missing.status == 404


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 1000}, "at most 150"),
        ({"width": 3}, "multiples of"),
        ({"negative": "a dog"}, "no effect"),
        ({"scheduler": "euler-q"}, "euler-q"),
        ({"image": noise(1), "denoise": 0.1}, "runs none"),
    ],
)
def test_invalid_requests_never_wait(engine: PictureEngine, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        drawn(engine, ask(1, **changes))
    assert (caught.value.status, engine.stats().steps) == (400, 0)


def test_adapters_stay_while_memory_is_free(base: ImageBase) -> None:
    shelf = shelf_of(base)
    a, b, c = shelf.digest.values()
    size = next(iter(shelf.adapters.values())).size_bytes()
    with PictureEngine(base, shelf.read, window=0.0, adapter_bytes=int(2.5 * size)) as engine:

        def settled() -> set[str]:
            wait_for(lambda: not engine.stats().running and engine.stats().adapter_bytes <= 2.5 * size)
            return set(engine.attachment.adapters)

        first = drawn(engine, ask(1, (a, 1.0)))[0].picture.image
        for digest in (b, a, c):
            drawn(engine, ask(1, (digest, 1.0)))
        assert settled() == {a, c}, "the least recently used is evicted first"
        assert levels(first, drawn(engine, ask(1, (a, 1.0)))[0].picture.image) == 0
        assert shelf.read_of == [a, b, c]
        engine.residents.drop(a)
        wait_for(lambda: a not in engine.attachment.adapters)
        assert levels(first, drawn(engine, ask(1, (a, 1.0)))[0].picture.image) == 0
        assert shelf.read_of == [a, b, c, a]
        with pytest.raises(Refused, match="too_large"):
            drawn(engine, ask(1, (a, 0.5), (b, 0.5), (c, 0.5)))


def test_cancelling_during_a_read_releases_everything(base: ImageBase) -> None:
    shelf, gate = shelf_of(base), threading.Event()

    def read(digest: str) -> Adapter:
        assert gate.wait(20)
        return shelf.read(digest)

    a = next(iter(shelf.digest.values()))
    with PictureEngine(base, read, window=0.0) as engine:

        async def leave() -> None:
            task = asyncio.create_task(collect(engine, ask(1, (a, 1.0))))
            while not engine.residents.stats().waiting:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        gate.set()
        assert engine.residents.stats().waiting == 0
        drawn(engine, ask(1, (a, 1.0)))
        engine.residents.drop(a)
        wait_for(lambda: not engine.residents.resident() and not engine.attachment.adapters)  # all leases have ended


def test_a_record_belongs_to_one_caller(engine: PictureEngine, shelf: Shelf) -> None:
    brand = shelf.digest["brand"]
    mine = ask(7, (brand, 0.5), prompt="my cat", labels={brand: "library/acme@3"}, tenant="me")
    yours = ask(8, (shelf.digest["look"], 1.0), prompt="your secret", tenant="you")
    one, other = drawn(engine, mine, yours)
    assert one.batch == other.batch == 2
    png = one.picture.png()
    assert b"secret" not in png
    assert shelf.digest["look"].encode() not in png
    assert one.picture.infotext.prompt == "my cat <lora:acme:0.5>"
    assert "Lora hashes" not in one.picture.infotext.fields, "no hash of a file is known"
    assert one.picture.record["rows"][0]["adapters"] == [[brand, "0.5"]]
    assert (one.usage.completion, one.usage.prompt > 2) == (engine.positions(mine.settings), True)


def test_a_picture_can_be_repeated_from_the_library(base: ImageBase, shelf: Shelf, tmp_path: Path) -> None:
    brand = shelf.digest["brand"]
    write(shelf.adapters[brand], tmp_path / "brand.safetensors", to="kohya", family="flux1")
    with open_library() as library:
        library.add(tmp_path / "brand.safetensors", "brand")
    kept = Shelf(brand=load_adapter(base, "brand"))
    with PictureEngine(base, kept.read) as engine:
        asked = ask(3, (kept.digest["brand"], 0.7), labels={kept.digest["brand"]: "brand"})
        made = drawn(engine, asked)[0].picture
    wanted = read_recipe(made.save(tmp_path / "out.png"))
    with ImagePipeline(base) as mixer:
        assert levels(reproduce(mixer, wanted).image, made.image) == 0


def refused_by(engine: PictureEngine) -> None:
    with pytest.raises(Refused):
        asyncio.run(collect(engine, ask(2)))


def test_an_engine_reports_that_it_is_idle(base: ImageBase, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with PictureEngine(base, shelf.read, stuck_seconds=0.2) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "generate_images", fails)
            for _ in range(3):
                assert engine.problem() == ""
                refused_by(engine)
            assert engine.problem() == "the last 3 pictures failed"
        drawn(engine, ask(1))
        assert engine.problem() == ""
        gate = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "generate_images", lambda *args, **options: gate.wait(20) and fails())
            waiting = threading.Thread(target=refused_by, args=(engine,))
            waiting.start()
            wait_for(lambda: "has not ended" in engine.problem())
            gate.set()
            waiting.join()
