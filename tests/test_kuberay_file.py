"""Read clusters/kuberay.yaml as KubeRay and Ray's autoscaler would."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay import node_provider
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from pipelines.cli.command import parse
from pipelines.config import Run
from pipelines.config.recipes import load_recipe

_FILE = Path(__file__).parent.parent / "clusters" / "kuberay.yaml"
# Fields of KubeRay 1.5; Kubernetes drops one that it does not know without a word.
_JOB_FIELDS = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes"),
    *("ttlSecondsAfterFinished", "submitterPodTemplate", "rayClusterSpec"),
}
_CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
    *("headGroupSpec", "workerGroupSpecs"),
}
_AUTOSCALER_FIELDS = {
    *("version", "idleTimeoutSeconds", "resources", "securityContext", "volumeMounts"),
}
_HEAD_FIELDS = {"serviceType", "labels", "rayStartParams", "template"}
_GROUP_FIELDS = {
    *("groupName", "labels", "replicas", "minReplicas", "maxReplicas"),
    *("rayStartParams", "template"),
}


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """Read the file; what it makes, by kind and name."""
    return {
        f"{document['kind']}/{document['metadata']['name']}": document
        for document in yaml.safe_load_all(_FILE.read_text())
    }


@pytest.fixture(scope="module")
def job(documents: dict[str, Any]) -> dict[str, Any]:
    """Give what the RayJob asks for."""
    return documents["RayJob/sovit"]["spec"]


@pytest.fixture(scope="module")
def cluster(job: dict[str, Any]) -> dict[str, Any]:
    """Give what the RayJob's cluster is to be."""
    return job["rayClusterSpec"]


@pytest.fixture(scope="module")
def pods(job: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    """Give the templates of all pods."""
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": job["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **{name: group["template"] for name, group in groups.items()},
    }


def _containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from pod["spec"].get("initContainers", ())
    yield from pod["spec"]["containers"]


def test_kuberay_has_all_fields(job: dict[str, Any], cluster: dict[str, Any]) -> None:
    assert set(job) == _JOB_FIELDS
    assert set(cluster) == _CLUSTER_FIELDS
    assert set(cluster["autoscalerOptions"]) == _AUTOSCALER_FIELDS
    assert set(cluster["headGroupSpec"]) == _HEAD_FIELDS
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == _GROUP_FIELDS


def test_rays_autoscaler_reads_what_was_meant(cluster: dict[str, Any]) -> None:
    # As KubeRay names the cluster of a job.
    meta = {"name": "sovit-abcde", "namespace": "default"}
    told = _derive_autoscaling_config_from_ray_cr({"metadata": meta, "spec": cluster})
    types = told["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["headgroup"]["resources"]
    assert (types["gpu"]["resources"]["CPU"], types["gpu"]["resources"]["GPU"]) == (
        40,
        4,
    )
    assert types["gpu"]["resources"]["memory"] == 160 * 2**30
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 2)
    assert types["data"]["labels"] == {"role": "data"}
    assert types["data"]["max_workers"] == 0
    assert told["idle_timeout_minutes"] == 10
    configs = AutoscalingConfig(told).get_node_type_configs()
    assert configs["headgroup"].labels == {"role": "head"}


def test_the_job_goes_on_when_it_is_started_again(job: dict[str, Any]) -> None:
    python, option, module, recipe, *arguments = shlex.split(job["entrypoint"])
    assert (python, option, module) == ("python", "-m", "pipelines.train")
    resume = arguments.index("--resume")
    del arguments[resume : resume + 2]
    run = parse(Run, default=load_recipe(recipe), arguments=arguments, prog="train")
    assert run.scale.num_workers == 8
    assert run.scale.start_timeout_s >= 900
    assert all(
        place.startswith("s3://")
        for place in (run.storage, run.data.train, run.data.val)
    )
    assert job["backoffLimit"] >= 1
    assert job["shutdownAfterJobFinishes"] is True


def test_the_token_is_asked_for(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "dashboard-host" not in cluster["headGroupSpec"]["rayStartParams"]


def test_no_pod_runs_as_root_or_holds_keys(
    pods: dict[str, Any], cluster: dict[str, Any]
) -> None:
    contexts = [cluster["autoscalerOptions"]["securityContext"]]
    for pod in pods.values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in _containers(pod):
            contexts.append(container["securityContext"])
            names = {variable["name"] for variable in container.get("env", ())}
            assert not [name for name in names if "SECRET" in name or "KEY" in name]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_kubernetes_token_is_the_autoscalers_alone(
    pods: dict[str, Any], cluster: dict[str, Any], documents: dict[str, Any]
) -> None:
    (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
    folder = Path(node_provider.IN_CLUSTER_TOKEN_PATH).parent
    assert Path(mount["mountPath"]) == folder
    assert Path(node_provider.IN_CLUSTER_CA_CERT_PATH).parent == folder
    volumes = {volume["name"]: volume for volume in pods["head"]["spec"]["volumes"]}
    sources = volumes[mount["name"]]["projected"]["sources"]
    assert sources[0]["serviceAccountToken"]["path"] == "token"
    assert sources[1]["configMap"]["items"][0]["path"] == "ca.crt"
    for container in _containers(pods["head"]):
        mounts = {volume["name"] for volume in container.get("volumeMounts", ())}
        assert mount["name"] not in mounts
    for kind in ("head", "gpu", "data"):
        account = pods[kind]["spec"]["serviceAccountName"]
        assert account == ("sovit-head" if kind == "head" else "sovit-worker")
        assert documents[f"ServiceAccount/{account}"]


def test_pods_are_closed_to_all_but_each_other(
    pods: dict[str, Any], documents: dict[str, Any]
) -> None:
    policy = documents["NetworkPolicy/sovit"]["spec"]
    ours = {"podSelector": policy["podSelector"]}
    for pod in pods.values():
        labels = pod["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    among, operator = policy["ingress"]
    assert among == {"from": [ours]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert operator["from"][0].keys() == {"namespaceSelector", "podSelector"}
    within, outside = policy["egress"]
    assert within == {"to": [ours]}
    assert {port["port"] for port in outside["ports"]} == {53, 443, 6443}


def test_mlflow_is_there_before_ray_and_stays(
    pods: dict[str, Any], documents: dict[str, Any]
) -> None:
    (mlflow,) = pods["head"]["spec"]["initContainers"]
    assert mlflow["restartPolicy"] == "Always"
    assert mlflow["startupProbe"]["exec"]["command"][0] == "python"
    assert "--host=127.0.0.1" in mlflow["command"]
    (head,) = pods["head"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in head["env"]}
    assert variables["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "180"
    (mount,) = mlflow["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pods["head"]["spec"]["volumes"]}
    claim = volumes[mount["name"]]["persistentVolumeClaim"]["claimName"]
    assert documents[f"PersistentVolumeClaim/{claim}"]
    assert f"--backend-store-uri=sqlite:///{mount['mountPath']}/" in " ".join(
        mlflow["command"]
    )
