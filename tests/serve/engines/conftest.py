"""A server with each engine, over one library and one set of tenants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.engines.capabilities import CAPABILITIES, ENGINES
from tests.serve.http.toy import TOOL_TEMPLATE, free_port, wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.test_vllm import PYTHON, start
from tests.serve.whole import Shop, make_shop, process
from tests.tiny_base import tiny_tokenizer
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

ADMIN = "an admin key of the tests"
VLLM = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
ROUTER = """
import sys, types
sys.modules.setdefault("setproctitle", types.SimpleNamespace(setproctitle=lambda title: None))
from vllm_router.launch_router import main
main()
"""


@dataclass
class Site:
    """A server. `keys`: tenant -> key. acme sees every adapter, globex only `rs`, and tight has small limits."""

    engine: str
    shop: Shop
    url: str
    keys: dict[str, str]
    log: Path
    tenants: str

    def post(self, path: str, body: dict[str, Any], tenant: str = "acme") -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=self.bearer(tenant), timeout=120)

    def get(self, path: str, tenant: str = "acme") -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.bearer(tenant), timeout=120)

    def bearer(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {ADMIN if tenant == 'admin' else self.keys[tenant]}"}

    def complete(self, model: str, prompt: Any = "The printer", tenant: str = "acme", **more: Any) -> Any:
        answer = self.ask(model, prompt, tenant, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, model: str, prompt: Any = "The printer", tenant: str = "acme", **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
        return self.post("/v1/completions", body, tenant)

    def unless(self, capability: str, answer: httpx.Response) -> bool:
        """Return whether the engine has a capability. Otherwise, assert that it refused as documented."""
        lacks = CAPABILITIES[capability].lacks.get(self.engine)
        if lacks is None:
            assert answer.status_code == 200, answer.text
            return True
        assert answer.status_code == lacks[0], answer.text
        # vLLM's own routes repeat the status as `code`
        assert answer.json()["error"]["code"] in lacks
        return False


def add_other_kinds(shop: Shop) -> None:
    """Write PEFT folders that change what low-rank pairs cannot, and add these to the library, except aLoRA.

    The library refuses aLoRA."""
    shop.make("wide", 11, rank=80, alpha=80.0, targets=("q_proj", "v_proj"))
    shop.library.add(shop.adapters / "wide", "wide")
    tensors, random = load_file(shop.adapters / "plain" / "adapter_model.safetensors"), torch.Generator().manual_seed(7)
    hidden, vocabulary = shop.base.model.config.hidden_size, shop.base.model.config.vocab_size
    sizes = {k.removesuffix("weight") + "bias": (t.shape[0],) for k, t in tensors.items() if "lora_B" in k}
    score, task = {"base_model.model.score.weight": (5, hidden)}, {"task_type": "SEQ_CLS"}
    for kind, config, shapes in (
        ("copies", {"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": (vocabulary, hidden)}),
        ("biases", {"lora_bias": True}, sizes),
        ("heads", task | {"modules_to_save": ["classifier", "score"]}, score),
        ("alora", {"alora_invocation_tokens": [40, 41]}, {}),
    ):
        (folder := shop.adapters / kind).mkdir()
        old = json.loads((shop.adapters / "plain" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(old | config))
        more = {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
        save_file(tensors | more, folder / "adapter_model.safetensors")
        if kind != "alora":
            shop.library.add(folder, kind)


@contextmanager
def fleet(shop: Shop, folder: Path) -> Iterator[str]:
    """Run two vLLM servers behind vllm-router. Yield the router's URL."""
    ports, router = [free_port(), free_port()], free_port()
    cores = sorted(os.sched_getaffinity(0))
    more = {"VENEER_LIBRARY": shop.library.location, "VENEER_VLLM_CACHE": str(folder / "mixes")}
    with ExitStack() as running:
        for port, core in zip(ports, (cores[0], cores[-1]), strict=True):
            server = start(shop.base_dir, port, core, folder / f"vllm-{port}", **more)
            running.callback(server.wait, 60)
            running.callback(server.terminate)
        for port in ports:
            wait_for(lambda port=port: answers(f"http://127.0.0.1:{port}/health"), 600)
        command = [sys.executable, "-c", ROUTER, "--host", "127.0.0.1", "--port", str(router), "--worker-urls"]
        command += [f"http://127.0.0.1:{port}" for port in ports] + ["--policy", "round_robin"]
        with (folder / "router").open("wb") as out:
            balancer = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        running.callback(balancer.wait, 60)
        running.callback(balancer.kill)
        wait_for(lambda: answers(f"http://127.0.0.1:{router}/health"), 120)
        yield f"http://127.0.0.1:{router}"


def vllm_processes(shop: Shop) -> list[int]:
    """Return the running vLLM servers of a shop's base."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and str(shop.base_dir) in words:
                found.append(int(path.parent.name))
    return found


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(
    scope="module",
    params=[e if e == "embedded" else pytest.param(e, marks=pytest.mark.peers) for e in ENGINES],
)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    engine, folder = request.param, tmp_path_factory.mktemp(request.param)
    shop = make_shop(folder, head_dim=32)  # the smallest heads of vLLM on a CPU
    add_other_kinds(shop)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(shop.base_dir)
    tenants = str(folder / "tenants.sqlite")
    store = Store(tenants)
    keys = {"acme": new_tenant(store, "acme", ["*", "sha256:*"]), "globex": new_tenant(store, "globex", ["rs"])}
    keys["tight"] = new_tenant(store, "tight", ["*"])
    manage.change_settings(store, "tight", {"requests_per_minute": 1}, actor="test")
    manage.change_settings(
        store, "acme", {"prompt_price": 1_000_000, "cached_price": 0, "completion_price": 2_000_000}, actor="test"
    )
    store.close()
    env = {"VENEER_ADMIN_KEY": ADMIN, "VENEER_VLLM_CACHE": str(folder / "mixes")}
    options, device = ["--engine", "embedded"], ("--device", "cpu")
    with ExitStack() as running:
        if engine != "embedded" and not PYTHON.exists():
            pytest.skip(f"no vLLM at {PYTHON}: make test-peers")
        if engine == "vllm":
            env |= {"VENEER_VLLM_PYTHON": str(PYTHON), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
            options, device = ["--engine", "vllm", "--", *VLLM], ()
        elif engine == "fleet":
            options, device = ["--upstream", running.enter_context(fleet(shop, folder))], ()
        dtype = () if engine == "fleet" else ("--dtype", "float32")
        home = folder / "home"
        server = process(shop, home, tenants, *options, own=(*dtype, *device), patience=600, **env)
        _, url = running.enter_context(server)
        yield Site(engine, shop, url, keys, home / "log", tenants)
    wait_for(lambda: not vllm_processes(shop), 60)  # vLLM ends with a server that is killed
