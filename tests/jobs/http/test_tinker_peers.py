"""Tinker's unchanged SDK and cookbook against a server process with two tenants.

`make test-peers` installs the cookbook into .venv-tinker, because the cookbook needs another version of
transformers. VENEER_TINKER_PYTHON can name another interpreter that has the cookbook."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.homes import home_with_kernels
from tests.serve.http.toy import free_port, wait_for
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import is_ready
from tests.test_readme import blocks
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from veneer.jobs.account import trained_name
from veneer.library.database import reading
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(os.environ.get("VENEER_TINKER_PYTHON") or ROOT / ".venv-tinker" / "bin" / "python")
MODEL = "Qwen/Qwen3-8B-Base"
"""The tiny base's name, from which recipes choose the chat format."""
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@dataclass
class Process:
    """`veneer serve --train` with the tiny base and two tenants.

    A client of rank 32 uses 0.7 MB of the server's 1 MB of adapter memory."""

    folder: Path
    port: int = field(default_factory=free_port)
    keys: dict[str, str] = field(default_factory=dict)
    running: Any = None
    clients: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client_folder(self) -> Path:
        """The recipes' working folder, which contains a base and data sets under their hub names."""
        return self.folder / "client"

    @property
    def base(self) -> str:
        return str(self.client_folder / MODEL)

    def env(self, key: str) -> dict[str, str]:
        settings = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": f"tml-{key}", "TINKER_TELEMETRY": "0"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hub"), "WANDB_MODE": "disabled"}
        return {**os.environ, **settings, **offline}

    def start(self) -> None:
        command = ["serve", "--base", self.base, "--train", "--port", str(self.port), "--dtype", "float32"]
        command += ["--adapter-memory", "1M", "--library", str(self.folder / "library")]
        command += ["--tenants", str(self.folder / "tenants.sqlite")]
        path = os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": path, "VENEER_HOME": str(self.folder / "home")}
        self.running = subprocess.Popen([sys.executable, "-m", "veneer.cli.main", *command], env=env, cwd=ROOT)
        wait_for(lambda: self.running.poll() is not None or is_ready(self.url), 300)
        assert self.running.poll() is None, "the server ended"

    def kill(self) -> None:
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    pytest.importorskip("tinker")
    server = Process(tmp_path_factory.mktemp("tinker"))
    home_with_kernels(server.folder / "home")
    _offline(server.client_folder)
    store = Store(str(server.folder / "tenants.sqlite"))
    server.keys = {tenant: new_tenant(store, tenant) for tenant in ("acme", "globex")}
    manage.change_settings(store, "acme", {"training_price": 2_000_000, "training_budget": 10**9}, actor="test")
    store.close()
    server.start()
    yield server
    for each in server.clients:  # its connections
        each.holder.run_coroutine_threadsafe(each.holder.aclose()).result()
    server.running.terminate()
    server.running.wait(60)


def _offline(folder: Path) -> None:
    """Create the base, and small replacements for the data sets of the recipes."""
    base = tiny_base_dir(folder, max_position_embeddings=4096)
    (folder / MODEL).parent.mkdir()
    base.rename(folder / MODEL)
    talk = [{"role": "user", "content": "Where is the printer?"}, {"role": "assistant", "content": "On the floor."}]
    dialog = "\n\nHuman: Where is the printer?\n\nAssistant: On the third floor."
    sets: dict[str, tuple[str, dict[str, Any]]] = {
        "HuggingFaceH4/no_robots": ("default", {"messages": talk}),
        "openai/gsm8k": ("main", {"question": "What is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"}),
        "Anthropic/hh-rlhf": ("default", {"chosen": dialog, "rejected": dialog.replace("third", "first")}),
    }
    for name, (config, row) in sets.items():
        (folder / name).mkdir(parents=True)
        files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (folder / name / "README.md").write_text(f"---\n{card}---\n")
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 256)
    (folder / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)


def client(process: Process, tenant: str) -> Any:
    import tinker

    process.clients.append(tinker.ServiceClient(api_key=f"tml-{process.keys[tenant]}", base_url=process.url))
    return process.clients[-1]


def rest(process: Process, tenant: str) -> Any:
    import tinker

    process.clients.append(tinker.RestClient(api_key=f"tml-{process.keys[tenant]}", base_url=process.url))
    return process.clients[-1]


def datum(ids: list[int]) -> Any:
    from tinker import types

    inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)


def adam(rate: float) -> Any:
    from tinker import types

    return types.AdamParams(learning_rate=rate)


ROWS = [[5 + (7 * i + 3 * j) % 300 for j in range(20 + i)] for i in range(4)]


def test_sdk_primitives(process: Process) -> None:
    """Covers training, custom losses, sampling and checkpoints.

    Trainer and sampler agree on log-probabilities."""
    from tinker import types

    service = client(process, "acme")
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
    trained = training.forward(data[:1], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    prompt_logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(ROWS[0])).result()
    assert prompt_logprobs[1:] == pytest.approx(trained, abs=1e-5)
    parameters = types.SamplingParams(max_tokens=6, temperature=0.8, seed=1)
    prompt = types.ModelInput.from_ints(ROWS[0][:5])
    samples = sampler.sample(prompt, 2, parameters).result()
    assert [len(each.tokens) for each in samples.sequences] == [6, 6]
    path = training.save_state("one").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    both = [each.forward(data, "cross_entropy").result().metrics["loss:sum"] for each in (training, again)]
    assert both[0] == both[1] < losses[2]
    assert rest(process, "acme").get_weights_info_by_tinker_path(path).result().lora_rank == 4
    with pytest.raises(Exception, match="there is no training run"):
        rest(process, "globex").get_training_run(training.model_id).result()


RECIPES: dict[str, list[str]] = {
    "recipes.sl_basic": ["eval_every=0"],
    "recipes.sl_loop": ["batch_size=2", "max_length=512"],
    "recipes.prompt_distillation.train": ["file_path=rows.jsonl", "batch_size=2", "num_epochs=1", "max_length=256"],
    "recipes.rl_loop": ["batch_size=2", "group_size=2", "max_tokens=8"],
    "recipes.math_rl.train": ["env=arithmetic", "group_size=4", "groups_per_batch=2", "max_tokens=4", "loss_fn=ppo"],
    "recipes.multiplayer_rl.guess_number.train": ["group_size=2", "batch_size=1", "max_tokens=2", "eval_every=0"],
    "recipes.preference.dpo.train": ["dataset=hhh", "batch_size=2", "max_length=256"],
}
_ROLE_COLON = {f"recipes.{name}.train" for name in ("prompt_distillation", "math_rl", "multiplayer_rl.guess_number")}
"""Recipes that need another renderer, because their default is for another base."""


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_cookbook_recipe_runs_for_two_steps(recipe: str, process: Process, tmp_path: Path) -> None:
    """The recipe runs from its own command line and saves a final checkpoint."""
    if not PYTHON.is_file():
        pytest.skip(f"no {PYTHON}")
    log = tmp_path / "log"
    words = [*RECIPES[recipe], f"model_name={MODEL}", f"log_path={log}", "max_steps=2"]
    words += ["renderer_name=role_colon"] if recipe in _ROLE_COLON else []
    command, env = [PYTHON, "-m", f"tinker_cookbook.{recipe}", *words], process.env(process.keys["globex"])
    ran = subprocess.run(command, env=env, cwd=process.client_folder, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    saved = [json.loads(line) for line in (log / "checkpoints.jsonl").read_text().splitlines()]
    assert saved[-1]["state_path"].startswith("tinker://")
    steps = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) >= 2


def _bad(**inputs: Any) -> Any:
    """Return a row of three tokens; `inputs` can make the row invalid."""
    from tinker import types

    tokens = inputs.pop("tokens", [5, 6, 7])
    arrays = {name: np.asarray(value) for name, value in ({"target_tokens": [6, 7, 8]} | inputs).items()}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=arrays)


_ONES = np.ones(3, np.float32)


def _row_error(
    message: str, rows: Callable[[], Any], loss: str = "cross_entropy", options: Any = None
) -> tuple[Any, str]:
    return lambda s, t: t.forward_backward(rows(), loss, options), message


MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "another base": (lambda s, t: s.create_lora_training_client("gpt-9", rank=4), "'gpt-9' is not served here"),
    "short weights": _row_error(
        r"data\[1\].*weights has the shape \(2,\)", lambda: [datum(ROWS[0]), _bad(weights=_ONES[:2])]
    ),
    "no advantages": _row_error("ppo needs advantages", lambda: [_bad(logprobs=_ONES)], loss="ppo"),
    "step without a gradient": (lambda s, t: t.optim_step(adam(1e-3)), "there is no gradient"),
    "NaN rate": (lambda s, t: t.optim_step(adam(math.nan)), "learning_rate"),
    "path as a name": (lambda s, t: t.save_state("../../x"), "is not a valid checkpoint name"),
    "missing state": (lambda s, t: t.load_state(f"tinker://{t.model_id}/weights/none"), "has no checkpoint"),
    "empty prompt": (lambda s, t: _sampled(s, []), "prompt"),
    "prompt beyond the context": (lambda s, t: _sampled(s, [5] * 5000), "4,?096|context"),
    "negative temperature": (lambda s, t: _sampled(s, [5], temperature=-1.0), "temperature"),
}


def _sampled(service: Any, prompt: list[int], **params: Any) -> Any:
    from tinker import types

    sampler = service.create_sampling_client(base_model=MODEL)
    params = {"max_tokens": 4} | params
    return sampler.sample(types.ModelInput.from_ints(prompt), 1, types.SamplingParams(**params))


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_sdk_reports_a_mistake_and_continues(mistake: str, process: Process, clumsy: Any) -> None:
    """The error names the mistake, and the client's next request works."""
    service, training = clumsy
    do, message = MISTAKES[mistake]
    with pytest.raises(Exception, match=f"(?s){message}"):
        do(service, training).result(timeout=120)
    assert training.forward([datum(ROWS[0])], "cross_entropy").result(timeout=120).metrics["loss:sum"] > 0


def test_body_of_40_mb_is_refused(process: Process) -> None:
    wide = {"target_tokens": np.full((3, 1_200_000), 6), "weights": np.ones((3, 1_200_000), np.float32)}
    training = client(process, "globex").create_lora_training_client(base_model=MODEL, rank=2).result()
    with pytest.raises(Exception, match="the body has more than 8,388,608 bytes"):
        training.forward_backward([_bad(**wide)], "cross_entropy").result(timeout=120)


@pytest.fixture(scope="module")
def clumsy(process: Process) -> Any:
    service = client(process, "globex")
    return service, service.create_lora_training_client(base_model=MODEL, rank=2, seed=1).result()


@pytest.mark.parametrize("ranks", [(2, 16), (24, 32)], ids=["in one batch", "with room for one of them"])
def test_tenants_of_different_rank_get_their_own_results(process: Process, ranks: tuple[int, int]) -> None:
    """Concurrent runs equal separate runs, even if only one client fits in memory."""

    def trained(tenant: str, rank: int) -> list[float]:
        service = client(process, tenant)
        training = service.create_lora_training_client(base_model=MODEL, rank=rank, seed=1).result()
        losses = []
        for _ in range(6):
            done = training.forward_backward([datum(row) for row in ROWS], "cross_entropy")
            training.optim_step(adam(3e-3))
            losses.append(done.result(timeout=300).metrics["loss:sum"])
        return losses

    alone = [trained(tenant, rank) for tenant, rank in zip(("acme", "globex"), ranks, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(trained, ("acme", "globex"), ranks))
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert alone[0] != alone[1]


def test_restart_ends_clients_and_keeps_checkpoints(process: Process) -> None:
    """After a kill, the SDK's error says how to continue.

    Training from a saved checkpoint continues bit for bit."""
    data = [datum(row) for row in ROWS]

    def step(training: Any) -> float:
        gradient = training.forward_backward(data, "cross_entropy")
        training.optim_step(adam(3e-3)).result(timeout=300)
        return float(gradient.result(timeout=300).metrics["loss:sum"])

    training = client(process, "acme").create_lora_training_client(base_model=process.base, rank=2, seed=1).result()
    step(training)
    path = training.save_state("saved").result().path
    losses = [step(training), step(training)]
    process.kill()
    process.start()
    with pytest.raises(Exception, match="create_training_client_from_state continues from a saved checkpoint"):
        training.forward(data, "cross_entropy").result(timeout=120)
    again = client(process, "acme").create_training_client_from_state_with_optimizer(path).result()
    assert [step(again), step(again)] == losses
    name = f"acme/tinker-{again.model_id.replace(':train:', '-')}"
    wait_for(lambda: billed(process, name) == 2 * sum(len(row) - 1 for row in ROWS))


def billed(process: Process, run: str) -> int:
    """Return the number of a run's trained tokens in the ledger."""
    store = Store(str(process.folder / "tenants.sqlite"))
    with reading(store.engine) as c:
        rows = usage(c, by=("adapter",), tenant="acme", adapter=trained_name(run))
    store.close()
    return sum(row["prompt"] for row in rows)


def test_code_of_the_tinker_page_runs(process: Process) -> None:
    """Runs the Python code of docs/how-to/tinker.md with the tiny base's name."""
    (code,) = blocks((ROOT / "docs" / "how-to" / "tinker.md").read_text(encoding="utf-8"), "python")
    command = [PYTHON, "-c", code.replace('"smollm2-135m"', f'"{MODEL}"')]
    env = process.env(process.keys["acme"])
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=process.client_folder, timeout=600)
    assert ran.returncode == 0, ran.stderr[-5000:]
    first, *_, last = [float(line.split()[1]) for line in ran.stdout.splitlines() if line[:1].isdigit()]
    assert last < first
    assert "/weights/first" in ran.stdout
