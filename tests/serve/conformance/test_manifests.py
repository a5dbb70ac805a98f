"""The manifests in deploy/kubernetes: core kinds against Kubernetes' schemas, other kinds against a table.

No API server is available to these tests, so the custom resources are not validated by their own schemas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.serve.whole import Whole
from veneer.cli.vllm_flags import from_vllm
from veneer.serve.config import server_config

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = [file for file in sorted(FOLDER.glob("*.yaml")) if file.name != "rayservice.yaml"]
"""rayservice.yaml is checked in tests/jobs/test_deploy.py."""
CORE = ("v1", "apps/v1", "networking.k8s.io/v1")

CUSTOM: dict[str, tuple[str, dict[str, type]]] = {
    # kubernetes-sigs/gateway-api-inference-extension api/v1/inferencepool_types.go
    "InferencePool": (
        "inference.networking.k8s.io/v1",
        {
            "spec.selector.matchLabels": dict,
            "spec.targetPorts.0.number": int,
            "spec.endpointPickerRef.name": str,
            "spec.endpointPickerRef.port.number": int,  # required for a Service, the default kind
        },
    ),
    # kubernetes-sigs/gateway-api apis/v1/httproute_types.go; names: object_reference_types.go, which requires a
    # port only for a Service
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        {"spec.parentRefs.0.name": str, "spec.rules.0.backendRefs.0.name": str},
    ),
    # kserve/kserve pkg/apis/serving/v1alpha2/llm_inference_service_types.go
    "LLMInferenceService": (
        "serving.kserve.io/v1alpha2",
        {"spec.model.uri": str, "spec.model.lora.adapters.0.name": str, "spec.model.lora.adapters.0.uri": str},
    ),
    # vllm-project/aibrix api/model/v1alpha1/modeladapter_types.go
    "ModelAdapter": (
        "model.aibrix.ai/v1alpha1",
        {"spec.podSelector.matchLabels": dict, "spec.artifactURL": str},
    ),
    # vllm-project/production-stack operator/api/v1alpha1/loraadapter_types.go
    "LoraAdapter": (
        "production-stack.vllm.ai/v1alpha1",
        {
            "spec.baseModel": str,
            "spec.adapterSource.type": str,
            "spec.adapterSource.adapterName": str,
            "spec.loraAdapterDeploymentConfig.algorithm": str,
        },
    ),
    # kedacore/keda apis/keda/v1alpha1/scaledobject_types.go, scaletriggers_types.go
    "ScaledObject": (
        "keda.sh/v1alpha1",
        {
            "spec.scaleTargetRef.name": str,
            "spec.triggers.0.type": str,
            "spec.triggers.0.metadata.serverAddress": str,
            "spec.triggers.0.metadata.query": str,
            "spec.triggers.0.metadata.threshold": str,  # metadata's values are texts
        },
    ),
}
"""Kind -> (version, path of each required field -> type)."""


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{file.name}:{document['kind']}", document)
        for file in FILES
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))
    ]


def at(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document[int(part)] if part.isdigit() else document.get(part)
    return document


@pytest.mark.parametrize(("name", "document"), documents(), ids=[name for name, _ in documents()])
def test_a_manifest_is_valid(name: str, document: dict[str, Any]) -> None:
    if document["apiVersion"] in CORE:
        kubernetes_validate.validate(document, "1.34", strict=True)
        return
    version, fields = CUSTOM[document["kind"]]
    assert document["apiVersion"] == version
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    for path, kind in fields.items():
        assert isinstance(at(document, path), kind), path


def test_pod_templates_of_custom_resources_are_valid() -> None:
    template = dict(documents())["kserve.yaml:LLMInferenceService"]["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template}
    kubernetes_validate.validate(pod, "1.34", strict=True)


def test_every_consumer_has_a_manifest() -> None:
    kinds = {document["kind"] for _, document in documents()}
    assert kinds >= CUSTOM.keys()


def test_selectors_match_the_engines_labels() -> None:
    found = dict(documents())
    labels = at(found["engine.yaml:Deployment"], "spec.template.metadata.labels").items()
    for name, path in {
        "engine.yaml:Deployment": "spec.selector.matchLabels",
        "engine.yaml:Service": "spec.selector",
        "engine.yaml:NetworkPolicy": "spec.podSelector.matchLabels",
        "inferencepool.yaml:InferencePool": "spec.selector.matchLabels",
        "aibrix.yaml:ModelAdapter": "spec.podSelector.matchLabels",
    }.items():
        assert at(found[name], path).items() <= labels, name
    assert at(found["production-stack.yaml:LoraAdapter"], "spec.baseModel") == dict(labels)["model"]
    assert at(found["keda.yaml:ScaledObject"], "spec.scaleTargetRef.name") == "veneer"


def test_route_leads_to_the_pool() -> None:
    """A backend without a group and a kind is a Service, which needs a port (object_reference_types.go)."""
    found = dict(documents())
    pool = found["inferencepool.yaml:InferencePool"]
    backend = at(found["inferencepool.yaml:HTTPRoute"], "spec.rules.0.backendRefs.0")
    assert f"{backend['group']}/v1" == pool["apiVersion"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])


def test_arguments_and_configuration_are_veneers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import inspect

    from veneer.cli.serve import serve

    found = dict(documents())
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}
    engine = at(found["engine.yaml:Deployment"], "spec.template.spec.containers.0.args")
    kserve = at(found["kserve.yaml:LLMInferenceService"], "spec.template.containers.0.args")
    assert engine[0] == "serve"
    for arguments in (engine[1:], list(from_vllm(kserve))):
        assert {each.partition("=")[0] for each in arguments if each.startswith("-")} <= options
    text = found["engine.yaml:ConfigMap"]["data"]["server.yaml"]
    config = server_config(yaml.safe_load(text), tmp_path / "server.yaml")
    assert (config.kv_events, config.kv_replay) == ("tcp://*:5557", "tcp://*:5558")


def test_probes_and_queries_exist(whole: Whole) -> None:
    found = dict(documents())
    container = at(found["engine.yaml:Deployment"], "spec.template.spec.containers.0")
    for probe in ("livenessProbe", "readinessProbe"):
        assert whole.http.get(container[probe]["httpGet"]["path"]).status_code == 200
    query = at(found["keda.yaml:ScaledObject"], "spec.triggers.0.metadata.query")
    (series,) = re.findall(r"vllm:\w+", query)
    assert f"\n{series}{{" in whole.http.get("/metrics").text


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs/how-to/kubernetes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z-]+\.yaml", page))
    assert named == {file.name for file in FILES}
