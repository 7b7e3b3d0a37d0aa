"""
The chart of deploy/helm: rendered by Helm 4, compared with the manifests of deploy/kubernetes, and checked against the
published schemas of Kubernetes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ecrproxy.settings.config import Config

from .installing import CHECKOUT
from .kustomize import Manifest, Rendered, overlay
from .processes import PATIENCE
from .test_kubernetes import OPERATORS, VERSIONS

CHART = CHECKOUT / "deploy/helm/ecr-proxy"
ENDPOINT = "settings.PROXY_ECR_ENDPOINT=https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
ROLE = "arn:aws:iam::123456789012:role/ecr-proxy"
# The components of deploy/kubernetes, and the values that mean the same.
VALUES = {
    "volume": ("mode=statefulset", "cache.limit=50g", "cache.space=55Gi"),
    "irsa": (f"credentials.roleArn={ROLE}",),
    "pod-identity": ("credentials.podIdentity=true",),
    "load-balancer": ("loadBalancer.enabled=true",),
    "service-monitor": ("monitoring.enabled=true",),
    "tls": ("tls.secret=ecr-proxy-tls",),
    "files": ("files.secret=ecr-proxy-files",),
    "nodes": ("nodes.enabled=true", "nodes.proxy=http://proxy.example:5000"),
}


def run(helm: Path, home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """
    Run Helm, with a home in a folder of its own.
    """
    return subprocess.run(
        [helm, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
    )


def render(helm: Path, home: Path, *values: str) -> list[Manifest]:
    """
    Return what the chart renders for values.
    """
    settings = [word for value in (ENDPOINT, *values) for word in ("--set", value)]
    done = run(helm, home, "template", "ecr-proxy", CHART, "--namespace", "ecr-proxy", *settings)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def without_origin(manifests: Iterable[Manifest]) -> dict[str, Any]:
    """
    Return manifests by kind and name, without what distinguishes kustomize's from Helm's.
    """
    found = {}
    for manifest in copy.deepcopy([each for each in manifests if each["kind"] != "Namespace"]):
        metadata, spec = manifest["metadata"], manifest.get("spec", {})
        for name in ("labels", "namespace"):
            metadata.pop(name, None)
        if manifest["kind"] == "ConfigMap" and "nodes.toml" in manifest["data"]:
            manifest["data"]["nodes.toml"] = tomllib.loads(manifest["data"]["nodes.toml"])
        elif manifest["kind"] == "ConfigMap":
            metadata["name"] = "ecr-proxy"
            manifest["data"].pop("PROXY_ECR_ENDPOINT", None)
        template = spec.get("template")
        if template:
            template["metadata"] = {}
            for each in spec.get("volumeClaimTemplates", []):
                each["metadata"].pop("labels", None)
            (container,) = template["spec"]["containers"]
            container["image"] = container["image"].partition(":")[0]
            container.pop("imagePullPolicy", None)
            if "envFrom" in container:
                container["envFrom"][0]["configMapRef"]["name"] = "ecr-proxy"
        found[f"{manifest['kind']} {metadata['name']}"] = manifest
    return found


@pytest.mark.parametrize(
    "components",
    [
        (),
        *((each,) for each in VALUES),
        ("volume", "irsa", "load-balancer", "service-monitor", "tls", "files", "nodes"),
    ],
    ids="+".join,
)
def test_makes_what_kustomize_makes(helm: Path, tmp_path: Path, components: Sequence[str]) -> None:
    """
    The same objects, for each component and for all that go together.
    """
    values = [value for each in components for value in VALUES[each]]
    rendered = render(helm, tmp_path, *values)
    kustomized: Rendered = overlay(tmp_path / "overlay", components)
    ours, theirs = without_origin(rendered), without_origin(kustomized.manifests)
    assert ours.keys() == theirs.keys()
    for name, manifest in theirs.items():
        assert ours[name] == manifest, name


@pytest.mark.parametrize("copied", ["prometheus/alerts.yaml", "kubernetes/components/nodes/hosts.py"])
def test_the_charts_files_are_those_of_all_others(copied: str) -> None:
    """
    A chart can't reach beyond its folder, so it has copies.
    """
    original = CHECKOUT / "deploy" / copied
    assert (CHART / original.name).read_text() == original.read_text()


def nodes_of(helm: Path, home: Path, *values: str) -> dict[str, Any]:
    """
    Give what nodes are told by the chart.
    """
    every = render(helm, home, "nodes.enabled=true", *values)
    (told,) = (each["data"]["nodes.toml"] for each in every if "nodes.toml" in each.get("data", {}))
    return tomllib.loads(told)


def test_nodes_are_told_what_the_values_say(helm: Path, tmp_path: Path) -> None:
    """
    Their own daemon and the registry of the settings, where nothing else is said.
    """
    told = nodes_of(helm, tmp_path, "mode=daemonset", "hostPort=5005")
    registry = ENDPOINT.partition("https://")[2]
    nothing = {"fallback": True, "keep": False, "ca": ""}
    assert told == {"proxy": "http://127.0.0.1:5005", "registries": [registry], **nothing}
    said = ("nodes.proxy=https://p.example", "nodes.registries={docker.io,_default}", "nodes.ca=/ca.crt")
    told = nodes_of(helm, tmp_path, *said, "nodes.fallback=false", "nodes.keep=true")
    expected = {"proxy": "https://p.example", "registries": ["docker.io", "_default"], "ca": "/ca.crt"}
    assert told == expected | {"fallback": False, "keep": True}
    directory = "/var/lib/rancher/k3s/certs.d"
    every = render(
        helm,
        tmp_path,
        "nodes.enabled=true",
        "nodes.proxy=http://p",
        f"nodes.directory={directory}",
        "nodes.namespace=ours",
    )
    beside = [each for each in every if each["metadata"].get("namespace") == "ours"]
    assert sorted(each["kind"] for each in beside) == ["ConfigMap", "DaemonSet", "NetworkPolicy"]
    assert directory in yaml.safe_dump(beside)


def test_an_address_for_nodes_is_asked_for(helm: Path, tmp_path: Path) -> None:
    """
    Nodes are no pods: the cluster's own names lead them nowhere.
    """
    done = run(helm, tmp_path, "template", CHART, "--set", ENDPOINT, "--set", "nodes.enabled=true")
    assert done.returncode != 0
    assert "nodes.proxy: give the address" in done.stderr


def test_a_label_of_the_operators_release_is_set(helm: Path, tmp_path: Path) -> None:
    """
    kube-prometheus-stack selects by it.
    """
    rendered = render(helm, tmp_path, "monitoring.enabled=true", "monitoring.release=stack")
    selected = [each["kind"] for each in rendered if each["metadata"]["labels"].get("release") == "stack"]
    assert sorted(selected) == ["PrometheusRule", "ServiceMonitor"]


@pytest.mark.parametrize("mode", ["deployment", "statefulset", "daemonset"])
def test_all_is_as_kubernetes_publishes_it(helm: Path, tmp_path: Path, mode: str) -> None:
    """
    Each object is valid by its schema, with everything enabled.
    """
    every = (
        "tls.secret=x",
        "files.secret=x",
        "monitoring.enabled=true",
        "loadBalancer.enabled=true",
        "nodes.enabled=true",
        "nodes.proxy=http://proxy.example:5000",
        f"credentials.roleArn={ROLE}",
    )
    for manifest in render(helm, tmp_path, f"mode={mode}", *every):
        if manifest["kind"] not in OPERATORS:
            for version in VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)


def test_a_daemon_on_every_node_is_asked_by_that_node_alone(helm: Path, tmp_path: Path) -> None:
    """
    It listens on the node's own loopback, and needs neither a Service nor a load balancer.
    """
    found = {each["kind"]: each for each in render(helm, tmp_path, "mode=daemonset", "hostPort=5005")}
    assert {"Service", "PodDisruptionBudget", "Deployment"}.isdisjoint(found)
    (container,) = found["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    registry = next(each for each in container["ports"] if each["name"] == "registry")
    assert (registry["hostIP"], registry["hostPort"], registry["containerPort"]) == ("127.0.0.1", 5005, 5000)
    settings = found["ConfigMap"]["data"]
    assert Config.load({}, {**settings, "PROXY_CACHE_DIR": "/cache"}).port == 5000


def test_numbers_and_flags_are_settings_as_they_stand(helm: Path, tmp_path: Path) -> None:
    """
    In a file of values nobody quotes them.
    """
    told = {"PROXY_CONNECTIONS": 1000000, "PROXY_TAG_TTL": 0.5, "PROXY_READ_AHEAD": False, "PROXY_DRAIN_SECONDS": 0}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"settings": told}))
    done = run(helm, tmp_path, "template", CHART, "--set", ENDPOINT, "--values", values)
    assert done.returncode == 0, done.stderr
    (settings,) = (each["data"] for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "ConfigMap")
    expected = {"PROXY_CONNECTIONS": "1000000", "PROXY_TAG_TTL": "0.5", "PROXY_READ_AHEAD": "false"}
    assert {name: settings[name] for name in told} == expected | {"PROXY_DRAIN_SECONDS": "0"}
    config = Config.load({}, {**settings, "PROXY_CACHE_DIR": "/cache"})
    assert config.tag_ttl == 0.5


@pytest.mark.parametrize("value", ["false", ""])
def test_what_is_said_counts_where_the_chart_says_something_else(helm: Path, tmp_path: Path, value: str) -> None:
    """
    Also no, 0 and empty values, which Helm's merge takes for unset.
    """
    rendered = render(helm, tmp_path, f"credentials.roleArn={ROLE}", f"settings.AWS_INSTANCE_AUTH={value}")
    (settings,) = (each["data"] for each in rendered if each["kind"] == "ConfigMap")
    assert settings["AWS_INSTANCE_AUTH"] == value


def test_a_setting_that_changes_makes_new_pods(helm: Path, tmp_path: Path) -> None:
    def told(*values: str) -> str:
        rendered = render(helm, tmp_path, *values)
        (workload,) = (each for each in rendered if each["kind"] == "Deployment")
        checksum: str = workload["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]
        return checksum

    assert told() == told()
    assert told() != told("settings.PROXY_TAG_TTL=5")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("mode=pod", "mode"),
        ("settings.PROXY_CACHE_LIMIT=5g", "PROXY_CACHE_LIMIT"),
        ("settings.AWS_SECRET_ACCESS_KEY=x", "AWS_SECRET_ACCESS_KEY"),
        ("replica=3", "replica"),
        ("cache.limit=much", "limit"),
        ("nodes.proxy=proxy.example:5000", "proxy"),
        ("nodes.registries={a/b}", "registries"),
    ],
)
def test_wrong_values_are_refused(helm: Path, tmp_path: Path, value: str, word: str) -> None:
    """
    By the schema: what the chart decides itself, secrets, misspelt names.
    """
    done = run(helm, tmp_path, "template", CHART, "--set", ENDPOINT, "--set", value)
    assert done.returncode != 0
    assert word in done.stderr


@pytest.mark.parametrize("mode", ["deployment", "statefulset", "daemonset"])
@pytest.mark.parametrize(("limit", "space", "fits"), [("50g", "53760Mi", True), ("50g", "53759Mi", False)])
def test_a_cache_has_the_space_for_its_limit(
    helm: Path, tmp_path: Path, mode: str, limit: str, space: str, *, fits: bool
) -> None:
    """
    Kubernetes evicts a pod that uses more than it has, and its cache is gone.
    """
    values = (ENDPOINT, f"mode={mode}", f"cache.limit={limit}", f"cache.space={space}")
    done = run(helm, tmp_path, "template", CHART, *(word for each in values for word in ("--set", each)))
    assert (done.returncode == 0) is fits, done.stderr
    assert fits or f"cache.space={space} is too little for cache.limit={limit}: give 53760Mi" in done.stderr


def test_an_endpoint_is_asked_for(helm: Path, tmp_path: Path) -> None:
    done = run(helm, tmp_path, "template", CHART)
    assert done.returncode != 0
    assert "PROXY_ECR_ENDPOINT" in done.stderr


def test_lint_finds_nothing(helm: Path, tmp_path: Path) -> None:
    done = run(helm, tmp_path, "lint", "--strict", CHART, "--set", ENDPOINT)
    assert done.returncode == 0, done.stdout
    assert json.loads((CHART / "values.schema.json").read_text())["required"]
