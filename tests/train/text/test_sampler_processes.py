"""Samplers and a trainer as processes: kills do not change the adapter, and vLLM can sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.forks import Forked
from tests.homes import home_with_kernels
from tests.serve.http.toy import wait_for
from tests.serve.test_vllm import PYTHON
from tests.serve.test_whole_kill import tenants_of
from tests.serve.whole import ROOT, process, prompt
from tests.tiny_base import tiny_base_dir
from tests.train.text.drawn_runs import REWARDED, with_prompts
from tests.train.text.test_sampler_servers import Place
from tests.train.text.tiny_runs import TENSORS, merged
from veneer.train.report.log import read_log

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = with_prompts(tmp_path_factory.mktemp("processes"), lambda i: {"team": "it" if i % 2 else "hr"})
    place = Place(folder)
    yield place
    place.library.close()


class Trainer:
    """`veneer train` as a process, and the log of its run."""

    def __init__(self, place: Place, home: Path, name: str, key: str = "", **reinforcement: Any) -> None:
        home.mkdir(exist_ok=True)
        self.home, self.output = home, home / name
        values: dict[str, Any] = {"base": {"name": str(place.base_dir), "dtype": "float32", "device": "cpu"}}
        values |= {"data": {"train": str(place.folder / "prompts.jsonl"), "split": 2}, "output": str(self.output)}
        own = {"schedule": {"steps": STEPS}, "evaluation": {"keep": "last"}, "reinforcement": reinforcement}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(merged({**values, **REWARDED}, own)))
        settings = {
            "PYTHONPATH": str(ROOT / "src"),
            "VENEER_HOME": str(home_with_kernels(home)),
            "OMP_NUM_THREADS": "1",
        }
        self.env = os.environ | settings | {"VENEER_LIBRARY": place.library.location, "VENEER_SAMPLER_KEY": key}
        self.command = ["-c", "from veneer.cli.main import main; main()", "train", str(home / f"{name}.yaml")]

    def start(self, *options: str) -> Forked:
        return Forked([*self.command, *options], env=self.env, log=self.home / "log")

    def finish(self, running: Forked) -> None:
        wait_for(lambda: running.poll() is not None, 300)
        assert running.returncode == 0, self.log()

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")[-4000:]

    def steps(self) -> int:
        return sum(record["event"] == "stepped" for record in read_log(self.output / "log.jsonl"))

    def notes(self) -> str:
        return "\n".join(r["text"] for r in read_log(self.output / "log.jsonl") if r["event"] == "note")


def test_kills_of_samplers_and_trainer_do_not_change_the_adapter(place: Place, tmp_path: Path) -> None:
    url, key = tenants_of(tmp_path)
    embedded = Trainer(place, tmp_path / "here", "run")
    embedded.finish(embedded.start())
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        process(place, tmp_path / "one", url, "--batch-invariant") as (one, first),
        process(place, tmp_path / "two", url, "--batch-invariant") as (_, second),
    ):
        trainer = Trainer(place, tmp_path / "there", "run", key, samplers=[first, second], publish="acme/policy")
        running = trainer.start()
        wait_for(lambda: trainer.steps() >= 3 or running.poll() is not None, 300)
        running.kill()
        running.wait()
        resumed = trainer.start("--resume")
        wait_for(lambda: trainer.steps() >= 6 or resumed.poll() is not None, 300)
        one.kill()
        trainer.finish(resumed)
        assert f"the sampler {first} is set aside" in trainer.notes(), trainer.log()
    assert (trainer.output / TENSORS).read_bytes() == (embedded.output / TENSORS).read_bytes()
    assert trainer.steps() == STEPS
    assert key not in trainer.log() + (trainer.output / "log.jsonl").read_text()
    assert not place.library.search(name="acme/policy", all_versions=True)


@pytest.mark.peers
def test_vllm_samples_and_each_answer_names_the_digest(tmp_path: Path) -> None:
    """The adapter changes in each step, so a stale adapter in vLLM would show as a mismatch."""
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}: make test-peers")
    tiny_base_dir(tmp_path, head_dim=32)  # the smallest heads of vLLM on a CPU
    place = Place(with_prompts(tmp_path, lambda i: {"team": "it" if i % 2 else "hr"}))
    url, key = tenants_of(tmp_path)
    env = {"VENEER_VLLM_PYTHON": str(PYTHON), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VENEER_VLLM_CACHE": str(tmp_path / "mixes")}
    vllm = ["--engine", "vllm", "--", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    own = ("--dtype", "float32")
    (tmp_path / "sampler").mkdir()
    with process(place, tmp_path / "sampler", url, *vllm, own=own, patience=900, **env) as (_, sampler):
        trainer = Trainer(place, tmp_path / "there", "run", key, samplers=[sampler], publish="acme/policy")
        trainer.finish(trainer.start())
        steps = [r["extra"] for r in read_log(trainer.output / "log.jsonl") if r["event"] == "stepped"]
        assert len(steps) == STEPS
        assert all(step["gap_max"] < 5e-3 and not step.get("dropped_answers") for step in steps)
        place.library.add(trainer.output, "acme/support")
        digest = place.library.find("acme/support").digest
        body = {"prompt": prompt(9), "max_tokens": 4, "return_token_ids": True, "logprobs": 0, "ignore_eos": True}

        def ask(model: str) -> Any:
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx.post(f"{sampler}/v1/completions", json=body | {"model": model}, headers=headers, timeout=300)
            assert answer.status_code == 200, answer.text
            return answer.json()

        tuned, plain = ask("acme/support"), ask("tiny-base")
    assert (tuned["sampled_by"]["adapters"], plain["sampled_by"]["adapters"]) == ([[digest, 1.0]], [])
    assert tuned["sampled_by"]["base"] == plain["sampled_by"]["base"] == place.base.fingerprint
    place.library.close()
