"""
Three daemons behind a real HAProxy are one cache: deploy/haproxy, and deploy/kubernetes/components/haproxy.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import re
import shutil
import socketserver
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.registry_server import noise

from .asking import answers, ask
from .certificates import make_certificates
from .chain import Chain, Daemon, Equipment, standard_settings
from .clients import Docker, Skopeo
from .conftest import Figures, MakeChain
from .images import LAYER, MANIFEST, Layout, accept, layer, push
from .installing import CHECKOUT
from .processes import PATH, PATIENCE, Process, environment, eventually, free_port

RECIPE = CHECKOUT / "deploy/haproxy/haproxy.cfg"
OF_PODS = CHECKOUT / "deploy/kubernetes/components/haproxy/haproxy.cfg"
DAEMONS = "ecr-proxy-pods.ecr-proxy.svc.cluster.local"
REPOSITORY, TAG = "team/spread", "1"
LAYERS = 24
LAYER_BYTES = 256 * 1024
CLIENTS = 6
TRIES = 6
"""Attempts of a client to download a blob, resuming each time: Docker's retries, and the first attempt."""


class Member(Daemon):
    """
    One of several daemons: it serves the load balancer on one port, and the tests on another.
    """

    def __init__(self, equipment: Equipment, home: Path, settings: Mapping[str, str | None]) -> None:
        self.inner, plain = free_port(), free_port()
        endpoints = f"haproxy:tcp:{self.inner}:interface=127.0.0.1 tcp:{plain}:interface=127.0.0.1"
        super().__init__(equipment, home, {**settings, "PROXY_LISTEN": endpoints, "PROXY_READ_AHEAD": "false"})
        self.port, self.address = plain, f"127.0.0.1:{plain}"
        self.url = f"http://{self.address}"

    def kept(self) -> set[str]:
        """
        Return the content that it has.
        """
        return {each.name for each in (self.cache / "content").rglob("*") if each.is_file()}


def recipe_for(members: list[Member], port: int) -> str:
    """
    Fill in the recipe as an operator does: the load balancer's address, and those of the daemons.

    A daemon that answers late on a busy machine must not be taken for one that died.
    """
    text = re.sub(r"bind :5000\n", f"bind 127.0.0.1:{port}\n", RECIPE.read_text())
    text = text.replace("    timeout queue", f"    timeout check {PATIENCE:.0f}s\n    timeout queue")
    ports = itertools.cycle(members)
    return re.sub(r"(server \w+\s+)192\.0\.2\.\d:5000", lambda found: f"{found[1]}127.0.0.1:{next(ports).inner}", text)


class Names(socketserver.ThreadingUDPServer):
    """
    A cluster's name server, which knows of some pods.

    @ivar known: their names, all at 127.0.0.1.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.known: set[str] = set()
        super().__init__(("127.0.0.1", 0), Asked)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Asked(socketserver.BaseRequestHandler):
    """
    One question for the addresses of a name.
    """

    def handle(self) -> None:
        query, socket = self.request
        at, labels = 12, []
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        question, kind = query[12 : at + 5], int.from_bytes(query[at + 1 : at + 3])
        assert isinstance(self.server, Names)
        there = ".".join(labels) in self.server.known
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if there and kind == 1 else b""
        flags = 0x8580 if there else 0x8583
        head = query[:2] + struct.pack(">HHHHH", flags, 1, bool(answer), 0, 0)
        socket.sendto(head + question + answer, self.client_address)


def of_pods(members: list[Member], port: int, names: Names) -> str:
    """
    Fill in what a cluster gives: its name server. Here each pod has a port of its own, for all are at one address.
    """
    text = OF_PODS.read_text().replace("parse-resolv-conf", f"nameserver local 127.0.0.1:{names.server_address[1]}")
    for shown, here in (("bind :5000\n", port), ("bind :8404\n", free_port())):
        assert shown in text
        text = text.replace(shown, f"bind 127.0.0.1:{here}\n")
    text = text.replace("    timeout queue", f"    timeout check {PATIENCE:.0f}s\n    timeout queue")

    def ported(found: re.Match[str]) -> str:
        return f"{found[1]}:{members[int(found[2]) % len(members)].inner}"

    return re.sub(r"(ecr-proxy-(\d)\.\$\{DAEMONS\}):5000", ported, text)


class Group:
    """
    Three daemons, the load balancer before them, and the chain behind them.

    @param recipe: gives HAProxy's configuration for daemons and a port to listen on.
    """

    def __init__(
        self,
        chain: Chain,
        equipment: Equipment,
        home: Path,
        recipe_for: Callable[[list[Member], int], str] = recipe_for,
    ) -> None:
        self.chain, self.members, self.port = chain, list[Member](), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.running: list[Process] = []
        try:
            for name in ("one", "two", "three"):
                member = Member(equipment, home / name, standard_settings(chain.front_url))
                self.members.append(member)
                member.wait()
            recipe = home / "haproxy.cfg"
            recipe.write_text(recipe_for(self.members, self.port))
            variables = {**environment(home), "DAEMONS": DAEMONS}
            self.balancer = Process(["haproxy", "-db", "-f", recipe], variables, home / "haproxy.log", home)
            self.running.append(self.balancer)
            self.balancer.wait_until(answers(f"{self.url}/readyz"))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """
        Stop everything that was started here.
        """
        for process in [*self.running, *(member.process for member in self.members)]:
            process.stop()

    def bucket_bytes(self) -> int:
        """
        Return how many bytes of blobs came from upstream so far.
        """
        counted: int = self.chain.counters()["bucket"]["bytes"]
        return counted

    def up(self, name: str, where: str = "daemons") -> bool:
        """
        Return True if the load balancer reports this one as up: among C{daemons}, which are ready, or C{living}.
        """
        said = re.findall(rf"Server {where}/{name} is (UP|DOWN)", self.balancer.output.read_text())
        return not said or said[-1] == "UP"


@pytest.fixture
def filled(make_chain: MakeChain, skopeo: Skopeo, tmp_path: Path) -> Chain:
    """
    Give a chain whose registry has an image of many layers.
    """
    chain: Chain = make_chain()
    layout = Layout(tmp_path / "layout")
    # The same bytes each time: by their digests each daemon has a share.
    layers = [(LAYER, layer(f"part-{number}", noise(f"part-{number}", LAYER_BYTES))) for number in range(LAYERS)]
    push(skopeo, layout.finish(layout.image("amd64", layers)), f"{chain.plain}/{REPOSITORY}:{TAG}")
    return chain


@pytest.fixture
def group(filled: Chain, equipment: Equipment, tmp_path: Path) -> Iterator[Group]:
    """
    Give a group before that.
    """
    made = Group(filled, equipment, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def names() -> Iterator[Names]:
    """
    Run a name server.
    """
    with Names() as running:
        yield running
        running.shutdown()


def fetch(url: str, digest: str, path: str) -> int:
    """
    Fetch a blob as Docker does: a connection that breaks off is resumed where it was.

    @return: how many bytes it has.
    """
    got, broken = bytearray(), 0
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
        try:
            connection.request("GET", path, headers={"Range": f"bytes={len(got)}-"} if got else {})
            response = connection.getresponse()
            assert response.status == (206 if got else 200), response.read()
            while piece := response.read1():
                got += piece
            if response.length == 0 or response.length is None:
                break
            raise http.client.IncompleteRead(bytes(got))
        except (OSError, http.client.HTTPException):
            broken += 1
            if broken == TRIES:
                raise
        finally:
            connection.close()
    assert f"sha256:{hashlib.sha256(got).hexdigest()}" == digest
    return len(got)


def pull(url: str) -> int:
    """
    Pull the image, and return how many bytes its blobs have.
    """
    manifest = ask(f"{url}/v2/{REPOSITORY}/manifests/{TAG}", headers=accept(MANIFEST))
    assert manifest.status == 200, manifest
    described = json.loads(manifest.body)
    digests = [each["digest"] for each in (described["config"], *described["layers"])]
    return sum(fetch(url, digest, f"/v2/{REPOSITORY}/blobs/{digest}") for digest in digests)


def under_load(url: str, happens: Callable[[], None]) -> int:
    """
    Have clients pull again and again while something happens, and until it has.

    @return: the number of pulls; each was complete.
    """
    over = threading.Event()

    def client() -> int:
        pulls = 0
        while not over.is_set() or not pulls:
            pull(url)
            pulls += 1
        return pulls

    with ThreadPoolExecutor(CLIENTS) as pool:
        pulling = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            happens()
        finally:
            over.set()
        return sum(each.result(timeout=2 * PATIENCE) for each in pulling)


def test_three_daemons_are_one_cache(group: Group, figures: Figures) -> None:
    """
    Each blob is fetched and kept once for all; one that dies or is added under load costs no pull, only its share.
    """
    total = pull(group.url)
    assert group.bucket_bytes() == total, "each blob came from upstream once"
    for member in group.members:
        member.settle()
    kept = [member.kept() for member in group.members]
    assert all(kept), "each has a share"
    assert sum(map(len, kept)) == len(set.union(*kept)), "nothing is kept twice"

    victim = group.members[1]
    share = sum((next((victim.cache / "content").rglob(name))).stat().st_size for name in victim.kept())

    def dies() -> None:
        victim.process.kill()
        eventually(lambda: not group.up("two"), "the load balancer notices")

    while_dying = under_load(group.url, dies)
    after_death = group.bucket_bytes()
    # Requests while its end is being noticed may go to another daemon than later ones.
    under_way = CLIENTS * (LAYER_BYTES + 1024)
    assert after_death - total <= share + under_way, "what it had is fetched again, and nothing else"

    def comes_new() -> None:
        shutil.rmtree(victim.cache)
        victim.restart()
        eventually(lambda: group.up("two"), "the load balancer notices")

    while_coming = under_load(group.url, comes_new)
    pull(group.url)
    assert group.bucket_bytes() - after_death <= share + under_way
    assert victim.kept(), "it has its share again"
    figures.append(
        f"behind HAProxy: {while_dying} pulls while one of three died, {while_coming} while it came back, none failed;"
        f" its share was {share / total:.0%}, fetched again {(after_death - total) / total:.0%}"
    )


def test_an_orderly_end_of_one_is_noticed_before_it_is_gone(group: Group, docker: Docker) -> None:
    """
    A daemon that shuts down is removed from the group, and Docker pulls on.
    """
    pull(group.url)
    under_load(group.url, lambda: (group.members[2].process.terminate(), None)[1])
    docker.pull(f"{group.url.removeprefix('http://')}/{REPOSITORY}:{TAG}")


def test_what_the_group_has_is_served_when_none_has_a_token(group: Group) -> None:
    """
    Machines that start while ECR is down have no token. They can serve what they have, and keep their shares.
    """
    total = pull(group.url)
    for member in group.members:
        member.settle()
    group.chain.cut()
    for member in group.members:
        member.process.kill()
        member.process = member.start()
        member.process.wait_until(answers(f"{member.url}/healthz"))
    eventually(lambda: all(map(group.up, ("one", "two", "three"))), "the load balancer finds that all can serve")
    assert pull(group.url) == total


def test_daemons_see_the_addresses_of_clients(group: Group) -> None:
    """
    The PROXY protocol provides them.
    """
    connection = http.client.HTTPConnection("127.0.0.1", group.port, timeout=PATIENCE, source_address=("127.0.0.9", 0))
    connection.request("GET", f"/v2/{REPOSITORY}/manifests/{TAG}", headers=accept(MANIFEST))
    assert connection.getresponse().status == 200
    connection.close()
    eventually(
        lambda: any("127.0.0.9 GET" in member.process.output.read_text() for member in group.members),
        "one of them has logged the client",
    )


def test_pods_are_one_cache_by_their_names(filled: Chain, equipment: Equipment, names: Names, tmp_path: Path) -> None:
    """
    Those that the name server knows have a share each; one that comes is found, and one that goes is done without.
    """
    pods = [f"ecr-proxy-{number}.{DAEMONS}" for number in range(3)]
    names.known.update(pods[:2])
    group = Group(filled, equipment, tmp_path, lambda members, port: of_pods(members, port, names))
    try:
        said = group.balancer.output

        def found(pod: int) -> bool:
            return re.search(rf"Server daemons/ecr-proxy-{pod} .*is UP", said.read_text()) is not None

        eventually(lambda: found(0) and found(1), "both pods are found")
        total = pull(group.url)
        assert group.bucket_bytes() == total, "each blob came from upstream once"
        for member in group.members:
            member.settle()
        first, second, third = (member.kept() for member in group.members)
        assert first
        assert second
        assert not first & second
        assert not third, "the name server does not know it"

        names.known.add(pods[2])
        eventually(lambda: found(2), "the third one is found")
        under_load(group.url, lambda: None)
        group.members[2].settle()
        assert group.members[2].kept()

        names.known.remove(pods[0])
        group.members[0].process.kill()
        assert under_load(group.url, lambda: None) >= CLIENTS
    finally:
        group.stop()


def test_what_pods_have_is_what_machines_have() -> None:
    """
    The two configurations say the same of how requests are sent, and the one of pods is one that HAProxy takes.
    """

    def lines(path: Path, *sections: str) -> list[list[str]]:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
        found = (re.search(rf"^{section}.*\n((?:    .*\n)+)", text, re.MULTILINE) for section in sections)
        return [[each.strip() for each in section[1].splitlines()] for section in found if section]

    shared = ("defaults common", "frontend registry", "defaults spread", "backend daemons", "backend living")
    machines, pods = lines(RECIPE, *shared), lines(OF_PODS, *shared)
    assert [len(machines), len(pods)] == [len(shared)] * 2
    for ours, theirs in zip(pods, machines, strict=True):
        # default-server and server lines say where and how daemons are, which is what differs.
        assert [each for each in ours if "server " not in each] == [each for each in theirs if "server " not in each]
    checks = "default-server check inter 2s fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down"
    assert checks in pods[2]
    assert checks in machines[2]
    assert [each for each in pods[3] if "server " in each] == [each for each in pods[4] if "server " in each]
    assert checked(OF_PODS) == (0, "")


def checked(recipe: Path) -> tuple[int, str]:
    """
    Have HAProxy look at a configuration.
    """
    variables = {"PATH": PATH, "DAEMONS": DAEMONS}
    argv = ["haproxy", "-c", "-f", str(recipe)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False, env=variables)
    return done.returncode, done.stderr


def test_pods_may_have_tls_by_a_secret_of_kubernetes(tmp_path: Path) -> None:
    """
    With the line that the configuration has for that, and the two files that such a secret has.
    """
    (tmp_path / "made").mkdir()
    made = make_certificates(tmp_path / "made")
    shutil.copy(made.chain, tmp_path / "tls.crt")
    shutil.copy(made.key, tmp_path / "tls.key")
    text = OF_PODS.read_text().replace("    bind :5000\n", "").replace("    # bind :5000 ssl", "    bind :5000 ssl")
    (tmp_path / "haproxy.cfg").write_text(text.replace("/tls/tls.crt", str(tmp_path / "tls.crt")))
    assert checked(tmp_path / "haproxy.cfg") == (0, "")
    (tmp_path / "tls.key").unlink()
    assert checked(tmp_path / "haproxy.cfg")[0] == 1
