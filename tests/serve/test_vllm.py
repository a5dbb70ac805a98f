"""The real vLLM: library names, and vLLM's own loader on an exported folder.

Tests of vLLM behind a veneer server are in the folder engines.

`make test-peers` installs vLLM into .venv-vllm; VENEER_VLLM_PYTHON names another interpreter with vLLM.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.serve.http.toy import free_port
from veneer.adapters.convert import convert_adapter
from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.formats import peft
from veneer.library.library import open_library
from veneer.models.sources import find_base
from veneer.models.text.base import TextBase, load_text
from veneer.serve.request import make_mix, served_name

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VENEER_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
TOKENS = 6
TOLERANCE = 2e-3  # maximum difference of log-probabilities; both are computed in float32
PROMPT = "The capital of France is the city of"
SPECS = {
    "plain": LoraSpec(rank=8, alpha=8, targets=("q_proj", "v_proj")),
    "stable": LoraSpec(rank=16, alpha=2, targets=("q_proj", "o_proj"), rslora=True),
    "patterns": LoraSpec(rank=8, alpha=8, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 16}),
    "dora": LoraSpec(rank=4, alpha=4, targets=("q_proj",), dora=True),
}


@dataclass
class Shop:
    """The base, a library of adapters for it, and two vLLM replicas, of which only the first has the plug-in."""

    base: TextBase
    place: Path
    adapters: dict[str, Adapter]
    urls: list[str]

    @property
    def prompt(self) -> list[int]:
        return list(self.base.tokenizer(PROMPT)["input_ids"])

    def expected(self, answer: list[int], **strengths: float) -> tuple[list[int], torch.Tensor]:
        """Return (veneer's greedy token at each position, log-probability of each token of `answer`)."""
        attachment = attach(self.base.model)
        try:
            for name in strengths:
                attachment.add(name, self.adapters[name])
            attachment.use(*strengths.items())
            with torch.no_grad():
                logits = self.base.model(torch.tensor([self.prompt + answer])).logits[0].log_softmax(-1)
        finally:
            attachment.detach()
        rows = logits[len(self.prompt) - 1 : -1]
        return rows.argmax(-1).tolist(), rows.gather(1, torch.tensor(answer)[:, None])[:, 0]

    def check(self, answer: list[int], logprobs: list[float], **strengths: float) -> None:
        greedy, expected = self.expected(answer, **strengths)
        assert answer == greedy
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=TOLERANCE)
        # the adapters have an effect: without them, some log-probability differs clearly
        _, alone = self.expected(answer)
        assert not strengths or (alone - expected).abs().max() > 20 * TOLERANCE

    def ask(self, model: str, which: int = 0) -> tuple[list[int], list[float], str]:
        """Complete greedily. Return (token ids, log-probabilities, the model name in vLLM's response)."""
        body = {"model": model, "prompt": self.prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
        answer = post(f"{self.urls[which]}/v1/completions", body | {"return_token_ids": True, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], answer.json()["model"]


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url, json=body, timeout=300)


def made(base: TextBase, spec: LoraSpec, seed: int) -> Adapter:
    adapter = create(base.model, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.B = torch.randn(pair.B.shape, generator=generator) * 0.05
    adapter.card = replace(adapter.card, base=base.name, base_fingerprint=base.fingerprint)
    return adapter


def start(model: Path, port: int, core: int, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start vLLM on one core.

    On a busy machine, two threads that spin while they wait for each other are slower than one. The tests of a
    server use fewer than 8 adapters: on a CPU, vLLM can answer a base request with an adapter if all slots are full.
    """
    settings = {"VLLM_CPU_OMP_THREADS_BIND": str(core), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    for name in ("ALLOW_RUNTIME_LORA_UPDATING", "CPU_KVCACHE_SPACE", "NO_USAGE_STATS"):
        settings[f"VLLM_{name}"] = "1"
    flags = (
        "--served-model-name base --dtype float32 --max-model-len 512 --enforce-eager --enable-lora --max-loras 8 "
        "--max-cpu-loras 8 --max-lora-rank 64 --max-num-seqs 8 --host 127.0.0.1 --enable-prompt-tokens-details"
    )
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, *flags.split()],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings, **more},
            start_new_session=True,  # vLLM's engine outlives a killed server, so kill the group
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}: make test-peers")
    place = tmp_path_factory.mktemp("shop")
    files = find_base("smollm2-135m")
    ports, cores = [free_port(), free_port()], sorted(os.sched_getaffinity(0))
    library = {"VENEER_LIBRARY": str(place / "library"), "VENEER_VLLM_CACHE": str(place / "converted")}
    servers = [
        start(files, ports[0], cores[0], place / "0.log", **library),
        start(files, ports[1], cores[-1], place / "1.log", VLLM_PLUGINS=""),
    ]
    try:
        base = load_text(str(files), dtype="float32")
        adapters = {name: made(base, spec, i + 1) for i, (name, spec) in enumerate(SPECS.items())}
        adapters["foreign"] = made(base, SPECS["plain"], 99)
        adapters["foreign"].card = replace(adapters["foreign"].card, base_fingerprint="sha256:" + "0" * 64)
        with open_library(place / "library") as opened:
            for name, adapter in adapters.items():
                peft.write_folder(adapter, place / name, base=base.model)
                opened.add(place / name, name)
            opened.alias("plain@1", "prod")
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for server, url, log in zip(servers, urls, ("0.log", "1.log"), strict=True):
            wait(server, url, place / log)
        yield Shop(base, place, adapters, urls)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=60)


def wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


# -- the plug-in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "called", "name"),
    [
        ("plain@1", "plain@1", "plain"),  # served from the library's own folder
        ("plain@prod", "plain@prod=plain@1", "plain"),
        ("stable", "stable=stable@1", "stable"),
        ("patterns", "patterns=patterns@1", "patterns"),  # served from the folder of converted copies
    ],
)
def test_vllm_serves_library_adapters_by_name_with_full_effect(shop, asked, called, name):
    ids, logprobs, model = shop.ask(asked)
    assert model == called
    shop.check(ids, logprobs, **{name: 1.0})
    shop.check(*shop.ask("base")[:2])
    roots = {m["id"]: m["root"] for m in httpx.get(f"{shop.urls[0]}/v1/models").json()["data"]}
    copied = roots[called].startswith(str(shop.place / "converted"))
    assert copied == (name == "patterns")


@pytest.mark.parametrize("name", ["nothing", "../plain", "/etc", "plain@7", "dora", "foreign"])
def test_vllm_answers_404_for_missing_foreign_and_unsupported_adapters(shop, name):
    answer = post(f"{shop.urls[0]}/v1/completions", {"model": name, "prompt": [1], "max_tokens": 1})
    assert answer.status_code == 404
    log = (shop.place / "0.log").read_text(errors="replace")
    assert f"veneer does not serve {name!r}" in log


def test_a_moved_alias_takes_effect_after_an_unload(shop):
    shop.check(*shop.ask("plain@prod")[:2], plain=1.0)
    with open_library(shop.place / "library") as library:
        library.add(shop.place / "stable", "plain")
        library.alias("plain@2", "prod")
    try:
        shop.check(*shop.ask("plain@prod")[:2], plain=1.0)  # vLLM keeps the adapter that the name first resolved to
        answer = post(f"{shop.urls[0]}/v1/unload_lora_adapter", {"lora_name": "plain@prod"})
        assert answer.status_code == 200
        ids, logprobs, model = shop.ask("plain@prod")
        assert model == "plain@prod=plain@2"
        shop.check(ids, logprobs, stable=1.0)
    finally:
        with open_library(shop.place / "library") as library:
            library.alias("plain@1", "prod")


def test_an_adapter_is_found_by_its_digest_after_an_unload(shop):
    """A veneer server asks for `veneer-` and the digest, and sends vLLM nothing in advance."""
    name = served_name(make_mix([(shop.adapters["stable"].digest(), 1.0)]))
    shop.check(*shop.ask(name)[:2], stable=1.0)
    assert post(f"{shop.urls[0]}/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200
    shop.check(*shop.ask(name)[:2], stable=1.0)


# -- the export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "patterns"])
def test_vllm_loads_an_exported_folder_as_it_is(shop, name):
    done = convert_adapter(shop.place / name, shop.place / f"exported-{name}", "vllm")
    body = {"lora_name": f"exported-{name}", "lora_path": str(done.written.path)}
    answered = post(f"{shop.urls[1]}/v1/load_lora_adapter", body)
    assert answered.status_code == 200, answered.text
    shop.check(*shop.ask(f"exported-{name}", which=1)[:2], **{name: 1.0})
