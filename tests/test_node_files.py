"""
The files of deploy/nodes, which nodes are made with: their programs can read them.
"""

from __future__ import annotations

import email
import email.policy
import subprocess
import tomllib
from email.message import EmailMessage
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml
from twisted.trial.unittest import SynchronousTestCase

from tests.documents import CHECKOUT

FILES: Final = CHECKOUT / "deploy/nodes"
CERTS: Final = "/etc/containerd/certs.d"
REGISTRIES: Final = ["123456789012.dkr.ecr.eu-west-1.amazonaws.com", "public.ecr.aws"]
PROXY: Final = "http://proxy.example:5000"


def read(name: str) -> str:
    return (FILES / name).read_text("utf-8")


def parts_of(text: str) -> list[EmailMessage]:
    """
    Take user data apart as cloud-init and nodeadm do.
    """
    message = email.message_from_string(text, policy=email.policy.default)
    assert not message.defects
    return [each for each in message.iter_parts() if isinstance(each, EmailMessage)]


class NodeFilesTests(SynchronousTestCase):
    """
    What nodes get of them.
    """

    def scripted(self, script: str) -> None:
        """
        Run a script of user data, and see what containerd has then.
        """
        with TemporaryDirectory() as home:
            certs = Path(home) / "certs.d"
            self.assertEqual(2, script.count(CERTS))
            done = subprocess.run(
                ["/bin/sh"],
                input=script.replace(CERTS, str(certs)),
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            self.assertEqual(REGISTRIES, sorted(each.name for each in certs.iterdir()))
            for each in REGISTRIES:
                told = tomllib.loads((certs / each / "hosts.toml").read_text())
                self.assertEqual({"host": {PROXY: {"capabilities": ["pull", "resolve"]}}}, told)

    def mirrors(self, settings: str) -> None:
        """
        See what Bottlerocket's settings say.
        """
        told = tomllib.loads(settings)["settings"]["container-registry"]["mirrors"]
        self.assertEqual([{"registry": each, "endpoint": [PROXY]} for each in REGISTRIES], told)

    def node_class(self, name: str, alias: str) -> str:
        """
        Give the user data of one of Karpenter's classes.
        """
        (made,) = yaml.safe_load_all(read(name))
        self.assertEqual(("karpenter.k8s.aws/v1", "EC2NodeClass"), (made["apiVersion"], made["kind"]))
        self.assertEqual([{"alias": alias}], made["spec"]["amiSelectorTerms"])
        data: str = made["spec"]["userData"]
        return data

    def test_amazon_linux_has_a_file_for_each_registry(self) -> None:
        """
        User data is in parts, to which EKS adds one of its own; a script is one that cloud-init runs.
        """
        (part,) = parts_of(read("al2023.mime"))
        self.assertEqual("text/x-shellscript", part.get_content_type())
        script = part.get_content()
        self.assertTrue(script.startswith("#!/bin/sh\n"))
        self.scripted(script)

    def test_amazon_linux_has_the_same_from_karpenter(self) -> None:
        """
        Whose user data may be a script alone.
        """
        script = self.node_class("karpenter-al2023.yaml", "al2023@latest")
        self.assertEqual(script.strip(), parts_of(read("al2023.mime"))[0].get_content().strip())
        self.scripted(script)

    def test_nodeadm_has_containerd_look_for_files(self) -> None:
        """
        In the sections of both of containerd's versions that there are.
        """
        made: dict[str, Any] = yaml.safe_load(read("node-config.yaml"))
        self.assertEqual(("node.eks.aws/v1alpha1", "NodeConfig"), (made["apiVersion"], made["kind"]))
        plugins = tomllib.loads(made["spec"]["containerd"]["config"])["plugins"]
        ours = [tomllib.loads(read(f"../containerd/{each}"))["plugins"] for each in ("config.toml", "config-2.toml")]
        self.assertEqual({name for each in ours for name in each}, set(plugins))
        for each in plugins.values():
            self.assertEqual(CERTS, each["registry"]["config_path"].split(":")[0])

    def test_bottlerocket_has_a_mirror_for_each_registry(self) -> None:
        """
        By itself, and from Karpenter.
        """
        self.mirrors(read("bottlerocket.toml"))
        self.mirrors(self.node_class("karpenter-bottlerocket.yaml", "bottlerocket@latest"))

    def test_managed_node_groups_take_the_settings(self) -> None:
        """
        EKS refuses some TOML: keys in quotes in a header, and quotes within quotes.
        """
        for line in read("bottlerocket.toml").splitlines():
            self.assertNotIn("\\", line)
            self.assertFalse(line.startswith("[") and '"' in line, line)

    def test_the_page_shows_each_file(self) -> None:
        lines = (CHECKOUT / "docs/howto/nodes.rst").read_text("utf-8").splitlines()
        shown = [each for each in FILES.iterdir() if f".. literalinclude:: ../../deploy/nodes/{each.name}" in lines]
        self.assertEqual(sorted(FILES.iterdir()), sorted(shown))
