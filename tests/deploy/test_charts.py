"""The Helm chart renders to manifests that Kubernetes accepts, without secrets in them.

Helm itself is not on the package index; `helm lint` and `helm template` run where helm is installed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.charts import render, rendered, values_of
from tests.test_readme import parse

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "veneer"
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "autoscaling": {"engine": {"autoscaling": {"enabled": True}}},
    "an upstream elsewhere": {"door": {"upstream": "http://gateway"}, "engine": {"enabled": False}},
    "no worker": {"worker": {"enabled": False}, "networkPolicy": {"enabled": False}},
}


@pytest.fixture(params=SETTINGS)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(CHART, SETTINGS[request.param])


def test_kubernetes_accepts_every_manifest(manifests: list[dict[str, Any]]) -> None:
    kinds = [each["kind"] for each in manifests]
    assert kinds.count("Deployment") >= 2
    for each in manifests:
        if each["apiVersion"] != "keda.sh/v1alpha1":
            kubernetes_validate.validate(each, "1.34", strict=True)


def test_the_scaler_has_what_keda_requires() -> None:
    """KEDA's CRD, v2 (docs: scaling deployments; scalers, prometheus)."""
    (scaler,) = (each for each in rendered(CHART, SETTINGS["autoscaling"]) if each["kind"] == "ScaledObject")
    assert set(scaler["spec"]["scaleTargetRef"]) >= {"name"}
    assert 0 < scaler["spec"]["minReplicaCount"] <= scaler["spec"]["maxReplicaCount"]
    for trigger in scaler["spec"]["triggers"]:
        assert trigger["type"] == "prometheus"
        assert {"serverAddress", "query", "threshold"} <= set(trigger["metadata"])
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
    engine = next(
        each for each in rendered(CHART, SETTINGS["autoscaling"]) if each["metadata"]["name"] == "shop-engine"
    )
    assert "replicas" not in engine["spec"]  # otherwise, each upgrade would reset what the autoscaler chose


def test_services_and_policies_select_existing_pods(manifests: list[dict[str, Any]]) -> None:
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in manifests if each["kind"] == "Deployment"]
    selectors = [each["spec"]["selector"] for each in manifests if each["kind"] == "Service"]
    selectors += [
        each["spec"]["selector"]["matchLabels"] for each in manifests if each["kind"] == "PodDisruptionBudget"
    ]
    for selector in selectors:
        assert sum(selector.items() <= pod.items() for pod in pods) == 1, selector


def test_commands_have_options_that_exist(manifests: list[dict[str, Any]]) -> None:
    commands = [each["args"] for each in containers(manifests) if each["name"] != "router"]
    assert {tuple(parse(shlex.join(["veneer", *words]))) for words in commands} >= {("serve",)}


def test_secrets_come_by_reference(manifests: list[dict[str, Any]]) -> None:
    """No manifest has a value for a variable that holds a secret, and no Secret is in the chart."""
    assert not [each for each in manifests if each["kind"] == "Secret"]
    for container in containers(manifests):
        assert all("valueFrom" in each for each in container.get("env", []))


def test_engines_do_not_get_the_tenants_database(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        if container["name"] == "engine":
            assert "envFrom" not in container
            assert not {each["name"] for each in container["env"]} & {"VENEER_TENANTS", "VENEER_ADMIN_KEY_HASH"}


def test_pods_run_without_rights(manifests: list[dict[str, Any]]) -> None:
    for each in manifests:
        if each["kind"] == "Deployment":
            pod = each["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["automountServiceAccountToken"] is False
    for container in containers(manifests):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_schema_accepts_the_values(setting: str) -> None:
    from tests.deploy.charts import merged

    jsonschema.Draft202012Validator(schema()).validate(merged(values_of(CHART), SETTINGS[setting]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bases": "smollm2-135m"},
        {"door": {"replica": 3}},
        {"door": {"upstream": "gateway:80"}},
        {"engine": {"autoscaling": {"waiting": 0}}},
        {"engine": {"cacheMemory": "a lot"}},
    ],
)
def test_the_schema_refuses_wrong_values(wrong: dict[str, Any]) -> None:
    from tests.deploy.charts import merged

    assert not jsonschema.Draft202012Validator(schema()).is_valid(merged(values_of(CHART), wrong))


def test_the_renderer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="range"):
        render("{{ range .Values.x }}", {"Values": {"x": [1]}})
    with pytest.raises(ValueError, match="without an end"):
        render("{{ if .Values.x }}", {"Values": {"x": 1}})
    assert render("a\n{{- if .Values.x }}\nb\n{{- end }}\nc", {"Values": {"x": 0}}) == "a\nc"


@pytest.mark.fleet
@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_renders_the_same_manifests(tmp_path: Path) -> None:
    subprocess.run(["helm", "lint", CHART], check=True)
    for name, values in SETTINGS.items():
        (tmp_path / "values.yaml").write_text(json.dumps(values))
        command = ["helm", "template", "shop", CHART, "--values", tmp_path / "values.yaml"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        theirs = [each for each in yaml.safe_load_all(text) if each]
        key = json.dumps
        assert sorted(map(key, theirs)) == sorted(map(key, rendered(CHART, values))), name


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return found


def containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pods = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]
    return [container for pod in pods for container in pod["containers"]]
