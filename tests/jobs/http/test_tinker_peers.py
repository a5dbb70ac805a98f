"""Tinker's own SDK and recipes of its cookbook, unchanged, against real processes: two tenants, and kills.

pip install tinker "tinker-cookbook[math-rl]" && pytest -m peers tests/jobs/http/test_tinker_peers.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port
from tests.test_readme import blocks
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store, TrainingTerms

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@dataclass
class Process:
    """`veneer serve --train` over the tiny base with two tenants."""

    folder: Path
    port: int = field(default_factory=free_port)
    keys: dict[str, str] = field(default_factory=dict)
    running: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base(self) -> str:
        return str(tiny_base_dir(self.folder, max_position_embeddings=1024))

    def env(self, key: str = "") -> dict[str, str]:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, sys.path)])
        own = {"PYTHONPATH": path, "VENEER_HOME": str(self.folder / "home"), "TINKER_BASE_URL": self.url}
        return {**os.environ, **own, "TINKER_API_KEY": f"tml-{key}", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}

    def start(self) -> None:
        command = ["serve", "--base", self.base, "--train", "--port", str(self.port), "--dtype", "float32"]
        command += ["--tenants", str(self.folder / "tenants.sqlite"), "--library", str(self.folder / "library")]
        self.running = subprocess.Popen([sys.executable, "-m", "veneer.cli.main", *command], env=self.env(), cwd=ROOT)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert self.running.poll() is None, "the server ended"
            time.sleep(0.2)
        raise AssertionError("the server was never ready")

    def kill(self) -> None:
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    pytest.importorskip("tinker")
    made = Process(tmp_path_factory.mktemp("tinker"))
    home_with_kernels(made.folder / "home")
    store = Store(str(made.folder / "tenants.sqlite"))
    for tenant in ("acme", "globex"):
        manage.add_tenant(store, tenant, who="test")
        made.keys[tenant] = manage.make_tenant_key(store, tenant, who="test")[1]
    manage.set_training(store, "acme", TrainingTerms(price=2_000_000, budget=10**9), who="test")
    store.close()
    made.start()
    yield made
    made.running.terminate()
    made.running.wait(60)


def client(process: Process, tenant: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import tinker

    for name, value in process.env(process.keys[tenant]).items():
        if name.startswith("TINKER_"):
            monkeypatch.setenv(name, value)
    return tinker.ServiceClient(api_key=f"tml-{process.keys[tenant]}", base_url=process.url)


def datum(ids: list[int]) -> Any:
    from tinker import types

    inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)


def adam(rate: float) -> Any:
    from tinker import types

    return types.AdamParams(learning_rate=rate)


ROWS = [[5 + (7 * i + 3 * j) % 300 for j in range(20 + i)] for i in range(4)]


def test_the_primitives(process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training, a loss of the client's own, sampling from weights that nobody saved, checkpoints, downloads; and what
    the trainer says of tokens is what the sampler says of them."""
    import tinker
    from tinker import types
    from tinker_cookbook import weights

    service = client(process, "acme", monkeypatch)
    training = service.create_lora_training_client(base_model=process.base, rank=4, seed=3).result()
    assert training.get_tokenizer().decode([70]) == tiny_tokenizer().decode([70])
    data = [datum(row) for row in ROWS]
    losses = []
    for _ in range(3):
        done, stepped = training.forward_backward(data, "cross_entropy"), training.optim_step(adam(1e-2))
        losses.append(done.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    assert losses[0] > losses[1] > losses[2]

    def shorter(rows: Any, logps: Any) -> Any:
        return -logps[0].mean(), {"mine:mean": 1.0}

    assert training.forward_backward_custom(data[:1], shorter).result().metrics["mine:mean"] == 1.0
    sampler = training.save_weights_and_get_sampling_client().result()
    said = training.forward(data[:1], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    asked = sampler.compute_logprobs(types.ModelInput.from_ints(ROWS[0])).result()
    assert asked[1:] == pytest.approx(said, abs=1e-5)
    wanted = types.SamplingParams(max_tokens=6, temperature=0.8, seed=1)
    prompt = types.ModelInput.from_ints(ROWS[0][:5])
    found = sampler.sample(prompt, 2, wanted, topk_sample_logprobs=2, topk_prompt_logprobs=3).result()
    assert [len(each.tokens) for each in found.sequences] == [6, 6]
    assert len(found.topk_prompt_logprobs[1]) == 3
    path = training.save_state("one").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    both = [each.forward(data, "cross_entropy").result().metrics["loss:sum"] for each in (training, again)]
    assert both[0] == both[1] < losses[2]
    rest = tinker.RestClient(api_key=f"tml-{process.keys['acme']}", base_url=process.url)
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    export = training.save_weights_external("out").result().path
    there = weights.download(tinker_path=export, output_dir=str(tmp_path / "out"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in Path(there).iterdir()}
    stranger = tinker.RestClient(api_key=f"tml-{process.keys['globex']}", base_url=process.url)
    with pytest.raises(Exception, match="there is no training run"):
        stranger.get_training_run(training.model_id).result()


RECIPES: dict[str, list[str]] = {
    "recipes.prompt_distillation.train": ["file_path={rows}", "batch_size=2", "num_epochs=1", "max_length=256"],
    "recipes.math_rl.train": ["env=arithmetic", "group_size=4", "groups_per_batch=2", "max_tokens=4", "loss_fn=ppo"],
    "recipes.multiplayer_rl.guess_number.train": ["group_size=2", "batch_size=1", "max_tokens=2"],
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_for_some_steps(recipe: str, process: Process, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = [{"role": "user", "content": "Where is the printer?"}, {"role": "assistant", "content": "On the floor."}]
    rows.write_text((json.dumps({"messages": asked}) + "\n") * 8)
    log = tmp_path / "log"
    words = [word.format(rows=rows) for word in RECIPES[recipe]]
    words += [f"model_name={process.base}", "renderer_name=role_colon", f"log_path={log}", "max_steps=2"]
    words += ["behavior_if_log_dir_exists=delete"]
    ran = subprocess.run(
        [sys.executable, "-m", f"tinker_cookbook.{recipe}", *words], env=process.env(process.keys["globex"]),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    assert (log / "checkpoints.jsonl").exists(), ran.stderr[-3000:]


def test_kills_in_the_middle_of_futures(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tenants of unlike rank train at once while the server is killed again and again: every future comes, and both
    end where they would have ended by themselves."""

    def trained(tenant: str, rank: int, kills: bool) -> list[float]:
        training = client(process, tenant, monkeypatch).create_lora_training_client(
            base_model=process.base, rank=rank, seed=1
        ).result()  # fmt: skip
        futures = []
        for step in range(4):
            futures.append(training.forward_backward([datum(row) for row in ROWS], "cross_entropy"))
            futures.append(training.optim_step(adam(3e-3)))
            if kills and step in (0, 2):
                time.sleep(0.3)
                process.kill()
                process.start()
        said = [future.result(timeout=300) for future in futures]
        return [each.metrics["loss:sum"] for each in said[::2]]

    quiet = [trained("acme", 2, False), trained("globex", 8, False)]
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(trained, "globex", 8, False)
        killed = trained("acme", 2, True)
    assert killed == pytest.approx(quiet[0], rel=1e-5)
    assert beside.result() == pytest.approx(quiet[1], rel=1e-5)


def test_the_page(process: Process, tmp_path: Path) -> None:
    """docs/how-to/tinker.md: its Python, as it is but for the base's name."""
    (code,) = blocks((ROOT / "docs" / "how-to" / "tinker.md").read_text(encoding="utf-8"), "python")
    ran = subprocess.run(
        [sys.executable, "-c", code.replace('"smollm2-135m"', '"tiny-base"')], capture_output=True, text=True,
        env=process.env(process.keys["acme"]), cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    first, *_, last = [float(line.split()[1]) for line in ran.stdout.splitlines() if line[:1].isdigit()]
    assert last < first
    assert "/weights/first" in ran.stdout
