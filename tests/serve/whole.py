"""A whole server: a tiny base and a library on disk, the server, and reference completions.

    shop = make_shop(folder)                    a base, PEFT folders of every adapter kind, and their library
    with served(shop) as whole: …               `build`, uvicorn in a thread, OpenAI's client
    shop.wanted([("plain", 1.0)], ids, 12)      the expected tokens, computed without the server

References recompute the whole sequence for each token, with PEFT or with veneer.core's attachment.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from tests.families import llama3
from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.forward.test_runner import trained
from tests.serve.http.toy import free_port, wait_for
from tests.serve.http.toy import served as listening
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.core.adapter import Card
from veneer.core.attach import attach
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.text.base import TextBase, load_text
from veneer.serve.build import Application, build
from veneer.serve.checks import check_settings
from veneer.serve.engine.engine import TextEngine
from veneer.serve.settings import EngineSettings, ServeSettings

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Maximum difference of float32 log-probabilities between the server and PEFT."""
CONTEXT = 4096
NO_SPECIAL = {str(i): -100 for i in range(3)}
"""A logit bias that excludes special tokens, so that no token is missing from a completion's text."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rs": {"rank": 5, "rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 1.5}},
    "dora": {"dora": True},
    "rows": {"targets": ("q_proj", "up_proj"), "token_rows": {"model.embed_tokens": (40, 41, 42)}},
}
"""The kinds of adapters in a shop. `rows` has no low-rank form, so it tests the runner's other path."""

Mix = Sequence[tuple[str, float]]


@dataclass
class Said:
    """A completion: the log-probabilities of its tokens, and its text."""

    logprobs: list[float]
    text: str
    cached: int = 0

    def same(self, other: Said) -> bool:
        return (
            self.text == other.text
            and len(self.logprobs) == len(other.logprobs)
            and all(math.isclose(a, b, abs_tol=TOLERANCE) for a, b in zip(self.logprobs, other.logprobs, strict=True))
        )


@dataclass
class Shop:
    """A folder that contains a base, a library, and `adapters` with one folder per adapter."""

    folder: Path
    kept: dict[Any, Said] = field(default_factory=dict)

    @property
    def base_dir(self) -> Path:
        return self.folder / "tiny"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @cached_property
    def base(self) -> TextBase:
        return load_text(str(self.base_dir))

    @cached_property
    def library(self) -> Any:
        return open_library(self.folder / "library")

    def make(self, name: str, seed: int, **spec: Any) -> str:
        """Write an adapter to the folder `adapters`. Return its digest."""
        adapter = trained(self.base.model, seed, **spec)
        for rows in adapter.token_rows.values():
            rows.rows = rows.rows + 0.1 * torch.randn(rows.rows.shape, generator=torch.Generator().manual_seed(seed))
        adapter.card = Card(base=self.base.name, base_fingerprint=self.base.fingerprint)
        peft.write_folder(adapter, self.adapters / name)
        return peft.load_folder(self.adapters / name, self.base.model).adapter.digest()

    def wanted(self, mix: Mix, ids: Sequence[int], n: int) -> Said:
        """Return the greedy completion computed with veneer.core. `mix` names folders inside `adapters`."""
        key = (tuple(mix), tuple(ids), n)
        if key not in self.kept:
            with attach(self.base.model) as attachment:
                for name, _ in mix:
                    attachment.add(name, peft.load_folder(self.adapters / name, self.base.model).adapter)
                attachment.use(*mix)
                self.kept[key] = greedy(self.base, self.base.model, ids, n)
        return self.kept[key]

    def by_peft(self, mix: Mix, ids: Sequence[int], n: int) -> Said:
        """Return the greedy completion computed with PEFT: one adapter, or several combined exactly."""
        from peft import PeftModel

        fresh = load_text(str(self.base_dir))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*(missing|[Uu]nexpected|not match|mismatch).*")
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module.*")
            (first, _), *more = mix
            model = PeftModel.from_pretrained(fresh.model, str(self.adapters / first), adapter_name=first).eval()
            for name, _ in more:
                model.load_adapter(str(self.adapters / name), adapter_name=name)
            if more or mix[0][1] != 1:
                names, strengths = [name for name, _ in mix], [strength for _, strength in mix]
                model.add_weighted_adapter(names, strengths, "together", combination_type="cat")
                model.set_adapter("together")
        return greedy(fresh, model, ids, n)


@torch.no_grad()
def greedy(base: TextBase, model: Any, ids: Sequence[int], n: int) -> Said:
    sequence, logprobs = list(ids), []
    for _ in range(n):
        row = model(input_ids=torch.tensor([sequence])).logits[0, -1].double().log_softmax(-1)
        token = 3 + int(row[3:].argmax())
        sequence.append(token)
        logprobs.append(float(row[token]))
    return Said(logprobs, base.tokenizer.decode(sequence[len(ids) :]))


def make_shop(folder: Path, kinds: Iterable[str] = KINDS, **config: Any) -> Shop:
    shop = Shop(folder)
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, **config}
    llama3(bos_token_id=1, eos_token_id=2, pad_token_id=2, **config).save_pretrained(shop.base_dir)
    tiny_tokenizer().save_pretrained(shop.base_dir)
    for seed, kind in enumerate(kinds):
        shop.make(kind, seed, **KINDS[kind])
        shop.library.add(shop.adapters / kind, kind)
    return shop


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- a server ----------------------------------------------------------------------------------------------------------


@dataclass
class Whole:
    shop: Shop
    url: str
    built: Application
    client: openai.OpenAI
    http: httpx.Client

    @property
    def engine(self) -> TextEngine:
        engine: Any = self.built.service.engine
        return engine

    def ask(self, model: str, ids: Sequence[int], n: int = 12, **more: Any) -> Said:
        return said(self.client.completions.create(**asking(model, ids, n, **more)))

    def together(self, asked: Iterable[dict[str, Any]]) -> list[Said]:
        """Send all requests concurrently. Return their completions."""

        async def all_of_them() -> list[Said]:
            async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as client:
                return [said(a) for a in await asyncio.gather(*(client.completions.create(**a) for a in asked))]

        return asyncio.run(all_of_them())

    def load(self, name: str, source: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": source, **more})

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def idle(self) -> None:
        """Wait until nothing runs. Assert that no request, cache block or lease remains."""
        engine = self.engine
        wait_for(lambda: not engine.here)
        wait_for(lambda: not any(each.leases for each in engine.residents.resident().values()))
        assert engine.cache.in_use == 0
        assert engine.residents.stats().waiting == 0
        assert not engine.scheduler.running
        assert engine.scheduler.waiting == 0
        wait_for(lambda: self.built.service.inside == 0)


def asking(model: str, ids: Sequence[int], n: int = 12, **more: Any) -> dict[str, Any]:
    """Return arguments of `completions.create` for a greedy completion of exactly `n` tokens."""
    extra = {"ignore_eos": True, **more.pop("extra_body", {})}
    asked = {"model": model, "prompt": list(ids), "max_tokens": n, "temperature": 0, "logprobs": 0}
    return asked | {"logit_bias": NO_SPECIAL, "extra_body": extra} | more


def said(answer: Any) -> Said:
    choice = answer.choices[0]
    return Said(choice.logprobs.token_logprobs, choice.text, answer.usage.prompt_tokens_details.cached_tokens)


@contextmanager
def served(shop: Shop, **settings: Any) -> Iterator[Whole]:
    """Serve the shop's base and library; clients can load adapters from the folder `adapters`.

    `extend`: an extension for `build`, from a package of a higher layer.
    """
    extend = settings.pop("extend", None)
    small = {"folders": (str(shop.adapters),), "dtype": "float32", "device": "cpu", "library": shop.library.location}
    mine = {key: settings.pop(key) for key in list(settings) if key in EngineSettings.__dataclass_fields__}
    engine = EngineSettings(**({"cache_bytes": 16 << 20} | mine))
    asked = ServeSettings(str(shop.base_dir), engine=engine, **(small | settings))
    built = build(asked, print, check_settings(asked), [extend] if extend else [])

    async def begin() -> None:
        await built.start()
        await built.load()

    asyncio.run(begin())
    try:
        with (
            listening(built.app) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield Whole(shop, url, built, client, http)
    finally:
        asyncio.run(built.stop())


@contextmanager
def process(
    shop: Shop,
    home: Path,
    tenants: str,
    *options: str,
    own: Sequence[str] = ("--dtype", "float32", "--device", "cpu"),
    patience: float = 120,
    **env: str,
) -> Iterator[tuple[Forked, str]]:
    """Run `veneer serve` as a process with the shop's base and library. Yield (process, address) when ready.

    `tenants`: URL of the tenants' database. `own`: options of this server's own engine. `patience`: seconds.
    """
    port = free_port()
    settings = {"PYTHONPATH": str(ROOT / "src"), "VENEER_HOME": str(home_with_kernels(home)), "OMP_NUM_THREADS": "1"}
    command = ["-c", "from veneer.cli.main import main; main()", "serve", "--base", str(shop.base_dir)]
    command += ["--port", str(port), "--library", shop.library.location, "--tenants", tenants]
    command += [*own, *options]
    server = Forked(command, env=os.environ | settings | env, log=home / "log")
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or is_ready(address), patience)
        assert server.poll() is None, (home / "log").read_text(errors="replace")[-3000:]
        yield server, address
    finally:
        server.kill()
        server.wait()


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def slowed(engine: TextEngine, seconds: float = 0.01) -> Iterator[None]:
    """Slow down each step, so that other work can happen during a completion."""
    own: Callable[..., Any] = engine.runner.run
    waits = threading.Event()

    def run(rows: Any) -> Any:
        waits.wait(seconds)
        return own(rows)

    engine.runner.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.runner.run = own  # type: ignore[method-assign]


def held(engine: TextEngine, digest: str) -> list[weakref.ref[Any]]:
    """Return weak references to all objects that the server keeps in memory for an adapter."""
    lease = engine.residents.acquire(((digest, 1.0),), lambda result: None)
    thing = lease.parts[0][0]
    lease.release()
    things: list[Any] = [thing, thing.adapter, *(tensor for _, tensor in thing.adapter.tensors())]
    if thing.packed is not None:
        things += [thing.packed, thing.packed.records]
        for A, parts in thing.packed.groups.values():
            things += [A, *(part.B for part in parts)]
    return [weakref.ref(each) for each in things]


def alive(watched: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in watched)
