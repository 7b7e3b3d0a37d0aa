"""
The manifests of deploy/kubernetes: rendered by kubectl, checked against the published schemas of Kubernetes, and
against what the daemon needs. test_container.py starts the pod's container.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from ecrproxy.settings.config import Config
from ecrproxy.settings.values import parse_size
from tests.documents import blocks

from .installing import CHECKOUT
from .kustomize import KUBERNETES, LABEL, Manifest, Rendered, overlay
from .processes import PATIENCE

COMPONENTS = sorted(each.name for each in (KUBERNETES / "components").iterdir())
# HAProxy knows pods by their names, which those with a volume keep.
EVERY = [
    *(("volume", name) if name == "haproxy" else (name,) for name in COMPONENTS),
    (),
    ("volume", "irsa", "haproxy", "load-balancer", "service-monitor", "nodes"),
    ("volume", "tls"),
    ("volume", "irsa", "load-balancer", "service-monitor", "tls"),
    ("volume", "pod-identity", "load-balancer", "service-monitor", "tls"),
]
# The oldest that has what the manifests use, preStop's sleep above all, and the newest.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
# Of the Prometheus Operator; Kubernetes publishes no schemas of these.
OPERATORS = {"ServiceMonitor", "PrometheusRule"}
NAME = {LABEL: "ecrproxy"}
NODES = "ecrproxy-nodes"
HAPROXY = "ecrproxy-haproxy"
GIB = 2**30


@pytest.fixture(params=[*EVERY, "example"], ids=lambda each: "+".join(each) if isinstance(each, tuple) else each)
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> Rendered:
    """
    Render the example, and the base with components.
    """
    if request.param == "example":
        return Rendered(KUBERNETES / "example")
    return overlay(tmp_path / "overlay", request.param)


def gibibytes(quantity: str) -> int:
    """
    Parse a size of the manifests.
    """
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) * GIB


def ports_named(rendered: Rendered) -> set[str]:
    """
    Return the names of the container's ports.
    """
    return {each["name"] for each in rendered.container["ports"]}


def test_schemas_find_what_is_wrong() -> None:
    """
    The tests below rely on it.
    """
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}}
    for version in VERSIONS:
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


def test_all_is_as_kubernetes_publishes_it(rendered: Rendered) -> None:
    """
    Each object is valid by its schema, without unknown fields; the Prometheus Operator's have none.
    """
    for version, manifest in itertools.product(VERSIONS, rendered.manifests):
        if manifest["kind"] not in OPERATORS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_pods_are_confined(rendered: Rendered) -> None:
    """
    By the restricted standard for pods, which the namespace enforces, and with a read-only root.
    """
    namespace = rendered.one("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod, container = rendered.pod["spec"]["securityContext"], rendered.container["securityContext"]
    assert (pod["runAsNonRoot"], pod["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kinds = {kind for volume in rendered.pod["spec"]["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "secret"}
    assert rendered.one("ServiceAccount")["automountServiceAccountToken"] is False


def test_selectors_find_the_pods(rendered: Rendered) -> None:
    """
    Of everything that has one, and the ports that they refer to exist.
    """
    assert rendered.pod["metadata"]["labels"].items() >= NAME.items()
    before = [{LABEL: HAPROXY}] if rendered.all_of("Deployment", HAPROXY) else []
    selectors = [
        each["spec"]["selector"] for each in rendered.all_of("Service") if each["spec"]["selector"] not in before
    ]
    policy, budget = rendered.one("NetworkPolicy")["spec"], rendered.one("PodDisruptionBudget")["spec"]
    chosen = [rendered.workload["spec"]["selector"], budget["selector"], policy["podSelector"]]
    spread = [each["labelSelector"] for each in rendered.pod["spec"]["topologySpreadConstraints"]]
    assert [*selectors, *(each["matchLabels"] for each in chosen + spread)] == [NAME] * (len(selectors) + 5)
    assert selectors or before
    named = {port["targetPort"] for service in rendered.all_of("Service") for port in service["spec"]["ports"]}
    named |= {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert named <= ports_named(rendered)


def test_the_daemon_understands_its_settings(rendered: Rendered) -> None:
    """
    All variables are settings, and related ones fit: ports, sizes, times, files.
    """
    endpoint = {"PROXY_ECR_ENDPOINT": "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"}
    image = {"PROXY_CACHE_DIR": "/cache"}  # set by the Dockerfile
    config = Config.load({}, {**endpoint, **image, **rendered.settings})
    ports = {each["name"]: each["containerPort"] for each in rendered.container["ports"]}
    assert ports == {"registry": config.port, "metrics": 5002}
    spec = rendered.pod["spec"]
    pause = rendered.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert config.drain_seconds >= 600, "a rollout lets large layers come to their end"
    assert spec["terminationGracePeriodSeconds"] >= pause + config.drain_seconds + 5
    mounts = {each["name"]: each["mountPath"] for each in rendered.container["volumeMounts"]}
    claims = {
        each["metadata"]["name"]: each["spec"] for each in rendered.workload["spec"].get("volumeClaimTemplates", [])
    }
    assert set(mounts) == {each["name"] for each in spec["volumes"]} | set(claims)
    assert {mounts["cache"], mounts["tmp"]} == {config.cache_dir, "/tmp"}
    if config.ssl_key is not None and config.ssl_certificate is not None:
        assert {str(Path(each).parent) for each in (config.ssl_key, config.ssl_certificate)} == {mounts["tls"]}
    if claims:
        room = claims["cache"]["resources"]["requests"]["storage"]
    else:
        room = next(each["emptyDir"]["sizeLimit"] for each in spec["volumes"] if each["name"] == "cache")
        assert rendered.container["resources"]["requests"]["ephemeral-storage"] == room
    assert gibibytes(room) >= parse_size(rendered.settings["PROXY_CACHE_LIMIT"]) * 1.05


def test_probes_speak_what_the_daemon_speaks(rendered: Rendered) -> None:
    """
    On a port that has neither TLS nor PROXY headers; /readyz is for the first client, /healthz for later.
    """
    container = rendered.container
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: each["path"] for name, each in asked.items()} == {
        "startup": "/readyz",
        "readiness": "/healthz",
        "liveness": "/healthz",
    }
    assert {(each["port"], each.get("scheme", "HTTP")) for each in asked.values()} == {("metrics", "HTTP")}
    assert rendered.settings["PROXY_METRICS_LISTEN"] == "tcp:5002"


def ways_out(rendered: Rendered) -> Iterable[tuple[str, int]]:
    """
    Return the networks and ports that pods may connect to.
    """
    for rule in rendered.one("NetworkPolicy")["spec"]["egress"]:
        for to, port in itertools.product(rule.get("to", [{"ipBlock": {"cidr": "any"}}]), rule["ports"]):
            yield to["ipBlock"]["cidr"], port["port"]


def test_roles_come_from_where_they_are_given(tmp_path: Path) -> None:
    """
    With either way to a role other keys are ignored; only Pod Identity's agent may be used over HTTP.
    """
    irsa, pod_identity = (overlay(tmp_path / name, [name]) for name in ("irsa", "pod-identity"))
    assert [each.settings["AWS_INSTANCE_AUTH"] for each in (irsa, pod_identity)] == ["true", "true"]
    assert "eks.amazonaws.com/role-arn" in irsa.one("ServiceAccount")["metadata"]["annotations"]
    assert set(ways_out(pod_identity)) - set(ways_out(irsa)) == {("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)}


def test_prometheus_reaches_metrics_and_nobody_the_operators_port(tmp_path: Path) -> None:
    """
    The admin port is on loopback by default. The ServiceMonitor finds the Service, and the alerts know the job.
    """
    plain, watched = overlay(tmp_path / "plain", []), overlay(tmp_path / "watched", ["service-monitor"])
    for each in (plain, watched):
        assert "PROXY_ADMIN_LISTEN" not in each.settings
    monitor: Manifest = watched.one("ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"jobLabel", "selector", "endpoints"}
    (service,) = (
        each
        for each in watched.all_of("Service")
        if each["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    )
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {each["port"] for each in monitor["spec"]["endpoints"]} == ports == {"metrics"}
    assert [rule.get("from") for rule in watched.one("NetworkPolicy")["spec"]["ingress"]] == [
        None,
        [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    ]
    alerts = (CHECKOUT / "deploy/prometheus/alerts.yaml").read_text()
    assert watched.one("PrometheusRule")["spec"] == yaml.safe_load(alerts)
    assert f'job="{service["metadata"]["labels"][monitor["spec"]["jobLabel"]]}"' in alerts


def test_a_load_balancer_hides_addresses_and_is_waited_for(tmp_path: Path) -> None:
    """
    A node that pulls through its own pod would hang with its own address; all of its clients share a few.
    """
    balanced = overlay(tmp_path / "balanced", ["load-balancer"])
    (service,) = balanced.all_of("Service")
    told = service["metadata"]["annotations"]["service.beta.kubernetes.io/aws-load-balancer-target-group-attributes"]
    assert "preserve_client_ip.enabled=false" in told.split(",")
    assert balanced.settings["PROXY_CONNECTIONS_PER_ADDRESS"] == "0"
    assert balanced.container["lifecycle"]["preStop"]["sleep"]["seconds"] >= 60


def test_what_everything_else_is_pulled_through_is_not_evicted_for_it(rendered: Rendered) -> None:
    """
    Pods are spread over zones and nodes, have a priority, fit a default node, and keep none from being drained.
    """
    spec = rendered.pod["spec"]
    assert spec["priorityClassName"] == "system-cluster-critical"
    keys = [each["topologyKey"] for each in spec["topologySpreadConstraints"]]
    assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert rendered.one("PodDisruptionBudget")["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    room = rendered.container["resources"]["requests"].get("ephemeral-storage", "0Gi")
    assert gibibytes(room) < 17 * GIB, "what a disk of 20 GiB leaves to pods"


def test_nodes_give_an_installer_one_directory_and_nothing_else(tmp_path: Path) -> None:
    """
    In a namespace of its own, for the daemon's stays restricted. It runs on each node, whatever its taints.
    """
    rendered = overlay(tmp_path / "nodes", ["nodes"])
    namespace = rendered.one("Namespace", NODES)
    installer, settings = rendered.one("DaemonSet", NODES), rendered.one("ConfigMap", NODES)
    policy = rendered.one("NetworkPolicy", NODES)["spec"]
    every = (installer, settings, rendered.one("NetworkPolicy", NODES))
    assert {each["metadata"]["namespace"] for each in every} == {namespace["metadata"]["name"]}
    template = installer["spec"]["template"]
    for selector in (installer["spec"]["selector"], policy["podSelector"]):
        assert selector["matchLabels"] == template["metadata"]["labels"] == {LABEL: NODES}
    assert policy == {"podSelector": policy["podSelector"], "policyTypes": ["Ingress", "Egress"]}

    pod = template["spec"]
    (container,) = pod["containers"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod)
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    directory = {"path": "/etc/containerd/certs.d", "type": "DirectoryOrCreate"}
    assert [each["hostPath"] for each in pod["volumes"] if "hostPath" in each] == [directory]
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert installer["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": "100%", "maxUnavailable": 0}

    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    files = {f"{mounts['installer']}/{each}" for each in settings["data"]}
    (map_,) = (each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each)
    assert map_ == settings["metadata"]["name"] == "ecr-proxy-nodes", "no suffix: pods see what is new in it"
    python, isolated, *words = container["command"]
    assert (python, isolated) == ("/opt/ecrproxy/bin/python", "-I")
    assert {*words} == {*files, mounts["certs"]}
    assert container["readinessProbe"]["exec"]["command"] == [*container["command"], "--check"]
    assert container["image"] == rendered.container["image"]


def test_nodes_understand_the_settings_that_they_are_given(tmp_path: Path) -> None:
    """
    The component's own, and those of an overlay, by the installer itself.
    """
    page = blocks(CHECKOUT / "docs/howto/kubernetes.rst")
    (patches,) = (yaml.safe_load(each.text) for each in page if each.language == "yaml" and "nodes.toml" in each.text)
    for more, registries in (({}, 1), (patches, 2)):
        told = overlay(tmp_path / f"overlay-{registries}", ["nodes"], **more).one("ConfigMap", NODES)["data"]
        home = tmp_path / str(registries)
        home.mkdir()
        for name, text in told.items():
            (home / name).write_text(text)
        argv = [sys.executable, "-I", str(home / "hosts.py"), str(home / "nodes.toml"), str(home), "--check"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stdout.count("is not as it should be")) == (1, registries), done


def test_haproxy_stands_before_all_pods_by_their_names(tmp_path: Path) -> None:
    """
    The Service leads to it, and it alone reaches the daemons, for it says whose addresses they see.
    """
    rendered = overlay(tmp_path / "haproxy", ["volume", "haproxy", "load-balancer"])
    balancer, budget = rendered.one("Deployment", HAPROXY), rendered.one("PodDisruptionBudget", HAPROXY)
    policy, configuration = rendered.one("NetworkPolicy", HAPROXY)["spec"], rendered.one("ConfigMap", HAPROXY)
    template = balancer["spec"]["template"]
    label = template["metadata"]["labels"]
    services = {each["metadata"]["name"]: each["spec"] for each in rendered.all_of("Service")}
    assert label == services["ecr-proxy"]["selector"] == {LABEL: HAPROXY}
    assert services["ecr-proxy"]["type"] == "LoadBalancer"
    for selector in (balancer["spec"]["selector"], budget["spec"]["selector"], policy["podSelector"]):
        assert selector["matchLabels"] == label
    assert [each["to"] for each in policy["egress"] if "to" in each] == [[{"podSelector": {"matchLabels": NAME}}]]
    (ingress,) = rendered.one("NetworkPolicy")["spec"]["ingress"]
    assert ingress == {"from": [{"podSelector": {"matchLabels": label}}], "ports": [{"port": "registry"}]}

    settings = rendered.settings
    text = configuration["data"]["haproxy.cfg"]
    assert settings["PROXY_LISTEN"] == "haproxy:tcp:5000"
    assert "default-server send-proxy-v2 check-send-proxy\n" in text
    assert settings["PROXY_READ_AHEAD"] == "false"
    (container,) = template["spec"]["containers"]
    (variable,) = container["env"]
    headless = rendered.workload["spec"]["serviceName"]
    assert variable == {"name": "DAEMONS", "value": f"{headless}.ecr-proxy.svc.cluster.local"}
    assert services[headless]["publishNotReadyAddresses"] is True, "HAProxy checks by itself which pods are ready"
    assert f"{rendered.workload['metadata']['name']}-0.${{DAEMONS}}:5000" in text

    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert all(f"    bind :{port}\n" in text for port in ports.values())
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {each["port"] for each in probes.values()} == {"health"}
    assert [probes[each]["path"] for each in probes] == ["/readyz", "/healthz", "/healthz"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert template["spec"]["terminationGracePeriodSeconds"] >= pause + 600 + 5
    assert "hard-stop-after 600s\n" in text
    assert container["securityContext"] == rendered.container["securityContext"]
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True


def test_haproxy_is_refused_where_pods_have_no_names(tmp_path: Path) -> None:
    """
    A Deployment's pods have others each time.
    """
    with pytest.raises(AssertionError, match="StatefulSet"):
        overlay(tmp_path / "haproxy", ["haproxy"])


def test_a_volume_makes_it_a_stateful_set(tmp_path: Path) -> None:
    """
    Its pods are the Deployment's, except for the location of the cache.
    """
    plain, kept = overlay(tmp_path / "plain", []), overlay(tmp_path / "kept", ["volume"])
    assert (plain.workload["kind"], kept.workload["kind"]) == ("Deployment", "StatefulSet")
    claims = kept.workload["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert claims == {"whenDeleted": "Delete", "whenScaled": "Retain"}
    names = {each["metadata"]["name"]: each["spec"].get("clusterIP") for each in kept.all_of("Service")}
    assert names[kept.workload["spec"]["serviceName"]] == "None"
    (plain.container["resources"]["requests"]).pop("ephemeral-storage")
    plain.pod["spec"]["volumes"] = [each for each in plain.pod["spec"]["volumes"] if each["name"] != "cache"]
    assert kept.settings.items() - plain.settings.items() == {("PROXY_CACHE_LIMIT", "50g")}
    texts = [yaml.safe_dump(each.pod).replace(each.one("ConfigMap")["metadata"]["name"], "") for each in (plain, kept)]
    assert texts[0] == texts[1]
