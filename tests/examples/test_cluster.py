"""Cluster files are valid for their readers; torchrun commands that need only two processes are run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_readme import ROOT, parse
from tests.tiny_base import tiny_base_dir
from tests.train.text.tiny_runs import write_rows

FOLDER = ROOT / "examples" / "cluster"
PAGE = ROOT / "docs" / "how-to" / "several-devices.md"


def torchrun_lines() -> list[tuple[str, str]]:
    """Return (file, line) for each torchrun command in the example files and on the docs page."""
    job = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))[1]
    pod = job["spec"]["template"]["spec"]["containers"][0]["args"][0].replace("$([", "$(test").replace("] &&", "&&")
    sources = {"slurm.sbatch": (FOLDER / "slurm.sbatch").read_text(), "kubernetes.yaml": pod}
    sources["several-devices.md"] = PAGE.read_text()
    out = []
    for name, text in sources.items():
        for line in re.findall(r"^(?:srun |exec )?torchrun +--.*", text.replace("\\\n", " "), flags=re.M):
            out.append(
                (name, re.sub(r"\$\(.*?\)", "0", line.split("   #")[0]).removeprefix("srun ").removeprefix("exec "))
            )
    return out


@pytest.mark.parametrize(("name", "line"), torchrun_lines())
def test_torchrun_and_veneer_accept_every_line(name: str, line: str) -> None:
    from torch.distributed.run import get_args_parser

    words = shlex.split(line.replace('"$@"', "support.yaml"))[1:]
    given = get_args_parser().parse_args(words)
    assert given.module
    assert given.training_script == "veneer.cli.main"
    rest = given.training_script_args
    assert parse(shlex.join(["veneer", *rest])) == ["train"]
    if name != "several-devices.md":
        assert "--resume" in rest, "a job that is started again must go on"


def test_every_file_has_a_torchrun_line() -> None:
    assert [name for name, _ in torchrun_lines()] == ["slurm.sbatch", "kubernetes.yaml"] + ["several-devices.md"] * 2


def test_the_job_and_the_rendezvous_share_pod_names() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    args = pod["containers"][0]["args"][0]
    assert f"--rdzv-endpoint {name}-0.{pod['subdomain']}:" in args
    assert f"--nnodes {job['spec']['completions']} " in args
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed"
    mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_the_batch_file_is_valid_bash_for_slurm() -> None:
    text = (FOLDER / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", str(FOLDER / "slurm.sbatch")], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.M))
    assert options["ntasks-per-node"] == "1", "one torchrun a node"
    assert options["signal"].startswith("TERM@")


def test_the_ray_file_calls_an_existing_function() -> None:
    import inspect

    import veneer

    calls = [n for n in ast.walk(ast.parse((FOLDER / "ray_train.py").read_text())) if isinstance(n, ast.Call)]
    call = next(c for c in calls if ast.unparse(c.func) == "veneer.train_text")
    inspect.signature(veneer.train_text).bind("support.yaml", **{str(k.arg): None for k in call.keywords})


@pytest.mark.slow
def test_torchrun_trains_on_two_processes_of_the_cpu(tmp_path: Path) -> None:
    tiny_base_dir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "support.yaml").write_text(
        "base: {name: ./tiny-base, device: cpu}\ndata: {train: rows.jsonl, split: 4}\noutput: out\n"
        "batching: {rows: 4}\nschedule: {steps: 3}\n"
    )
    line = next(line for name, line in torchrun_lines() if "--nproc-per-node 2" in line)
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("try it") == 1
    assert "2 devices share each step" in ran.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
