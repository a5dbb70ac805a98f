"""Files in deploy/ for Ray, Kubeflow, SkyPilot and Slurm have the fields that their readers require.

Kubernetes' own kinds are checked with kubernetes-validate in test_cluster.py; pods inside other kinds, here.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.jobs.fake_kubernetes import VERSION
from tests.test_readme import ROOT, commands, parse
from veneer.jobs.cluster import ExecutorSettings
from veneer.serve.ray import serve_settings

DEPLOY = ROOT / "deploy"
REQUIRED: dict[str, tuple[str, str, dict[str, type]]] = {
    # kubeflow/trainer: manifests/base/runtimes/torch_distributed.yaml, pkg/apis/trainer/v1alpha1/trainjob_types.go
    "kubeflow/runtime.yaml": (
        "trainer.kubeflow.org/v1alpha1",
        "ClusterTrainingRuntime",
        {
            "metadata.name": str,
            "spec.mlPolicy.numNodes": int,
            "spec.mlPolicy.torch": dict,
            "spec.template.spec.replicatedJobs.0.name": str,
            "spec.template.spec.replicatedJobs.0.template.spec.template.spec.containers": list,
        },
    ),
    "kubeflow/trainjob.yaml": (
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
        {
            "metadata.name": str,
            "spec.runtimeRef.name": str,
            "spec.trainer.numNodes": int,
            "spec.trainer.args": list,
            "spec.trainer.resourcesPerNode": dict,
        },
    ),
    # ray-project/kuberay: ray-operator/apis/ray/v1/raycluster_types.go
    "kubernetes/rayservice.yaml": (
        "ray.io/v1",
        "RayService",
        {
            "metadata.name": str,
            "spec.serveConfigV2": str,
            "spec.rayClusterConfig.headGroupSpec.rayStartParams": dict,
            "spec.rayClusterConfig.headGroupSpec.template.spec.containers": list,
            "spec.rayClusterConfig.workerGroupSpecs.0.groupName": str,
            "spec.rayClusterConfig.workerGroupSpecs.0.minReplicas": int,
            "spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas": int,
            "spec.rayClusterConfig.workerGroupSpecs.0.rayStartParams": dict,
            "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers": list,
        },
    ),
}
"""File -> version, kind, and required fields with their types."""
KNOWN: dict[str, dict[str, str]] = {
    # kubeflow/trainer pkg/apis/trainer/v1alpha1/trainingruntime_types.go; kubernetes-sigs/jobset
    # api/jobset/v1alpha2/jobset_types.go for template.spec
    "kubeflow/runtime.yaml": {
        "spec": "mlPolicy podGroupPolicy template",
        "spec.mlPolicy": "numNodes torch flux mpi",
        "spec.mlPolicy.torch": "numProcPerNode elasticPolicy",
        "spec.template": "metadata spec",
        "spec.template.spec": "replicatedJobs network successPolicy failurePolicy suspend coordinator managedBy",
    },
    # kubeflow/trainer pkg/apis/trainer/v1alpha1/trainjob_types.go
    "kubeflow/trainjob.yaml": {
        "spec": "runtimeRef initializer trainer runtimePatches suspend activeDeadlineSeconds managedBy",
        "spec.runtimeRef": "name apiGroup kind",
        "spec.trainer": "image command args env numNodes resourcesPerNode numProcPerNode",
    },
    # ray-project/kuberay ray-operator/apis/ray/v1/rayservice_types.go, raycluster_types.go
    "kubernetes/rayservice.yaml": {
        "spec": "serveConfigV2 rayClusterConfig serveService",
        "spec.rayClusterConfig": "headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions",
        "spec.rayClusterConfig.headGroupSpec": "serviceType headService enableIngress rayStartParams template",
        "spec.rayClusterConfig.workerGroupSpecs.0": "groupName replicas minReplicas maxReplicas numOfHosts "
        "rayStartParams template scaleStrategy",
    },
    # skypilot-org/skypilot sky/utils/schemas.py: get_task_schema, _get_single_resources_schema
    "skypilot/train.yaml": {
        "": "name workdir num_nodes resources file_mounts service pool setup run envs secrets config volumes",
        "resources": "cloud region zone infra cpus memory accelerators instance_type use_spot job_recovery volumes",
    },
}
"""File -> path -> fields that the project's own type has there."""


def loaded(file: str) -> Any:
    return yaml.safe_load((DEPLOY / file).read_text())


def at(body: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        body = body[int(part)] if part.isdigit() else body[part]
    return body


def pod_specs(body: Any) -> list[Any]:
    """Return every pod's spec inside a body."""
    children = body.values() if isinstance(body, dict) else body if isinstance(body, list) else []
    found = [body] if isinstance(body, dict) and "containers" in body else []
    return found + [spec for child in children for spec in pod_specs(child)]


@pytest.mark.parametrize("file", REQUIRED)
def test_custom_resource_has_its_required_fields(file: str) -> None:
    body, (version, kind, fields) = loaded(file), REQUIRED[file]
    assert (body["apiVersion"], body["kind"]) == (version, kind)
    assert {path: type(at(body, path)) for path in fields} == fields
    for spec in pod_specs(body):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("file", KNOWN)
def test_files_use_only_fields_of_the_projects_types(file: str) -> None:
    body = loaded(file)
    for path, fields in KNOWN[file].items():
        assert at(body, path).keys() <= set(fields.split()), path


def test_trainer_replaces_the_runtimes_container() -> None:
    """Kubeflow finds the container by the job's label and by the name `node` (pkg/constants/constants.go)."""
    job = at(loaded("kubeflow/runtime.yaml"), "spec.template.spec.replicatedJobs.0")
    label = job["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    (container,) = at(job, "template.spec.template.spec.containers")
    assert (job["name"], label, container["name"]) == ("node", "trainer", "node")
    args = loaded("kubeflow/trainjob.yaml")["spec"]["trainer"]["args"]
    assert container["command"][:3] == ["torchrun", "-m", "veneer.cli.main"]
    assert parse(shlex.join(["veneer", *container["command"][3:], *args])) == ["train"]
    assert (
        loaded("kubeflow/trainjob.yaml")["spec"]["runtimeRef"]["name"]
        == loaded("kubeflow/runtime.yaml")["metadata"]["name"]
    )


def test_ray_files_are_valid_for_ray_serve() -> None:
    names = []
    for body in (
        loaded("ray/serve.yaml"),
        yaml.safe_load(loaded("kubernetes/rayservice.yaml")["spec"]["serveConfigV2"]),
    ):
        (application,) = body["applications"]
        assert application["import_path"] == "veneer.serve.ray:app"
        names.append(sorted(each["name"] for each in application["deployments"]))
        assert serve_settings(application["args"]).base == "smollm2-135m"
    assert names == [["Front", "Model"]] * 2


def test_commands_of_the_ray_page_are_valid() -> None:
    """`serve run` takes a configuration file, or an application with its arguments as NAME=VALUE."""
    lines = [line.split() for page, line in commands("serve") if page == "docs/how-to/ray.md"]
    runs = [words[2:] for words in lines if words[1] == "run"]
    assert len(runs) >= 3
    for target, *values in runs:
        if target.endswith(".yaml"):
            assert (ROOT / target).is_file()
            continue
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert serve_settings(dict(value.split("=", 1) for value in values)).base


def test_executor_files_of_the_jobs_page_exist() -> None:
    lines = [line for page, line in commands("veneer") if page == "docs/how-to/jobs.md" and "--executor" in line]
    assert len(lines) == 2
    for line in lines:
        assert parse(line) == ["worker"]
        file = ROOT / shlex.split(line)[shlex.split(line).index("--executor") + 1]
        ExecutorSettings.model_validate(yaml.safe_load(file.read_text()))


@pytest.mark.fleet
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_accepts_its_files() -> None:
    from ray.serve.schema import ServeDeploySchema

    for body in (
        loaded("ray/serve.yaml"),
        yaml.safe_load(loaded("kubernetes/rayservice.yaml")["spec"]["serveConfigV2"]),
    ):
        ServeDeploySchema.model_validate(body)


def test_skypilot_task_runs_the_train_command() -> None:
    from torch.distributed.run import get_args_parser

    task = loaded("skypilot/train.yaml")
    assert set(task["secrets"].values()) == {None}  # taken from the shell
    line = re.sub(r"\$\(.*\)", "0", task["run"].replace("\\\n", " "))
    line = re.sub(r"\$SKYPILOT_NUM\w+", "2", line).replace("$SKYPILOT_NODE_RANK", "0")
    given = get_args_parser().parse_args(shlex.split(line)[1:])
    assert (given.module, given.training_script) == (True, "veneer.cli.main")
    assert parse(shlex.join(["veneer", *given.training_script_args])) == ["train"]


def test_slurm_script_is_bash_and_starts_a_worker() -> None:
    script = DEPLOY / "slurm" / "worker.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    (line,) = re.findall(r"^srun .*", text, flags=re.M)
    assert parse(line[line.index("veneer") :]) == ["worker"]
    assert "#SBATCH --export=NONE" in text


FOLDERS = ("ray", "jobs", "kubernetes", "kubeflow", "skypilot", "slurm")
FILES = sorted(file for name in FOLDERS for file in (DEPLOY / name).iterdir())


@pytest.mark.parametrize("file", [str(file.relative_to(ROOT)) for file in FILES])
def test_deploy_files_contain_no_secret(file: str) -> None:
    """URLs with passwords and values of secret variables are not in the files."""
    text = Path(ROOT / file).read_text()
    assert not re.search(r"\w+://[^\s/]*:[^\s/]*@", text)
    assert not re.search(r"(PASSWORD|TOKEN|SECRET\w*|KEY\w*|_INDEX|_TENANTS)\s*[:=]\s*(?!null)[\"']?\w", text)
