"""Compose, Kubernetes and KServe files against their schemas, against each other, and against the image."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KINDS = {
    "common": {"Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "Kustomization"},
    "cpu": {"Deployment", "Kustomization"},
    "gpu": {"Deployment", "Kustomization"},
    "kserve": {"ServingRuntime", "InferenceService"},
}
# Their schemas are not Kubernetes' own.
FOREIGN = {"Kustomization", "ServingRuntime", "InferenceService"}


@pytest.fixture(scope="module")
def objects(docker: Path) -> dict[str, dict[str, Any]]:
    """By folder and kind."""
    return {
        folder: {
            document["kind"]: document
            for path in (docker / "k8s" / folder).glob("*.yaml")
            for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        }
        for folder in KINDS
    }


def arguments(container: dict[str, Any]) -> dict[str, str]:
    """The options of `serve` and their values."""
    assert container["args"][0] == "serve"
    return dict(zip(container["args"][2::2], container["args"][3::2], strict=True))


def test_the_folders_hold_these_kinds(objects: dict) -> None:
    assert {folder: set(kinds) for folder, kinds in objects.items()} == KINDS


@pytest.mark.parametrize("folder", KINDS)
def test_kubernetes_objects_fit_their_schema(folder: str, objects: dict) -> None:
    for kind, document in objects[folder].items():
        if kind not in FOREIGN:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_serving_runtime_is_a_pod(objects: dict) -> None:
    # A ServingRuntime's containers and volumes are Kubernetes'; its own fields are few.
    spec = dict(objects["kserve"]["ServingRuntime"]["spec"])
    assert spec.pop("supportedModelFormats") == [{"name": "qdm-bundle", "version": "1", "autoSelect": True}]
    assert spec.pop("protocolVersions") == ["v2"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    model = objects["kserve"]["InferenceService"]["spec"]["predictor"]["model"]
    assert model["runtime"] == objects["kserve"]["ServingRuntime"]["metadata"]["name"]
    assert model["modelFormat"]["name"] == "qdm-bundle"


@pytest.mark.parametrize("folder", ["common", "cpu", "gpu"])
def test_a_kustomization_names_what_lies_there(folder: str, docker: Path) -> None:
    root = docker / "k8s" / folder
    resources = yaml.safe_load((root / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert {(root / name).resolve() for name in resources} | {root / "kustomization.yaml"} == {
        *root.glob("*.yaml"),
        *([] if folder == "common" else [docker / "k8s/common"]),
    }


@pytest.mark.parametrize("folder", ["cpu", "gpu"])
def test_the_objects_find_each_other(folder: str, objects: dict) -> None:
    common, deployment = objects["common"], objects[folder]["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert common["Service"]["spec"]["selector"] == labels
    assert common["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert common["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    autoscaler = common["HorizontalPodAutoscaler"]["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert [metric["pods"]["metric"]["name"] for metric in autoscaler["metrics"]] == ["qdm_requests_waiting"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert common["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert str(port["containerPort"]) == arguments(container)["--port"]


def containers(objects: dict) -> list[dict[str, Any]]:
    """Every container that serves."""
    pods = [objects[folder]["Deployment"]["spec"]["template"]["spec"] for folder in ("cpu", "gpu")]
    return [pod["containers"][0] for pod in [*pods, objects["kserve"]["ServingRuntime"]["spec"]]]


def test_containers_are_confined_and_probed(objects: dict) -> None:
    for container in containers(objects):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/run/secrets/qdm"}  # noqa: S108
        probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
        assert probes == {
            "startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/v2/health/live",
        }  # fmt: skip
        assert "--allow-unauthenticated" not in container["args"]


def test_containers_give_options_that_serve_has(objects: dict) -> None:
    from qdm_deploy.cli.main import cli

    known = {name for parameter in cli.commands["serve"].params for name in parameter.opts}
    for container in containers(objects):
        assert set(arguments(container)) <= known


@pytest.mark.parametrize("folder", ["cpu", "gpu"])
def test_a_pod_may_finish_what_it_has_begun(folder: str, objects: dict) -> None:
    from qdm_deploy.cli.main import cli

    (drain,) = [item.default for item in cli.commands["serve"].params if "--drain-timeout" in item.opts]
    pod = objects[folder]["Deployment"]["spec"]["template"]["spec"]
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + drain


@pytest.fixture(scope="module")
def compose(docker: Path) -> dict[str, Any]:
    return yaml.safe_load((docker / "compose.yaml").read_text(encoding="utf-8"))


def test_compose_fits_its_schema(compose: dict) -> None:
    # schema/compose-spec.json of github.com/compose-spec/compose-spec (Apache-2.0), as it was on 2026-06-23.
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(compose)


def test_compose_services_are_confined(compose: dict) -> None:
    assert {name: service["profiles"] for name, service in compose["services"].items()} == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
    }
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        # Where the image's own command looks for the key.
        assert service["secrets"] == ["qdm_api_key"]


def test_mounts_are_where_the_image_looks(docker: Path, compose: dict, objects: dict) -> None:
    dockerfile = (docker / "Dockerfile").read_text(encoding="utf-8")
    commands = [
        json.loads(text.replace("\\\n", "")) for text in re.findall(r"^CMD (\[(?:.|\\\n)*?\])$", dockerfile, re.M)
    ]
    serving = [command for command in commands if command[0] == "serve"]
    assert len(serving) == 3
    for command in serving:
        assert command[1] == "/models/model.qdm"
        assert command[command.index("--api-key-file") + 1] == "/run/secrets/qdm_api_key"
    assert "VOLUME /var/cache/qdm" in dockerfile
    assert "engines:/var/cache/qdm" in compose["services"]["gpu"]["volumes"]
    mounts = objects["gpu"]["Deployment"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "engines", "mountPath": "/var/cache/qdm"} in mounts
