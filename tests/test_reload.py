"""
SIGHUP: registries appear, disappear and change while clients are served.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon.reloading import Reloading, Settings
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Kind, Route
from ecrproxy.reading_ahead import BEGIN_SECONDS
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.circuit import FAILURES
from ecrproxy.settings.config import Config, texts_of
from ecrproxy.settings.file import LIMIT, about_registries, parse_file, read_handed
from ecrproxy.settings.registries import parse_registries
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from ecrproxy.threads import Disk
from ecrproxy.upstreams import MOST, Upstreams
from ecrproxy.workers.messages import FromParent, Reload, decode, encode
from tests.daemon import DaemonTestCase, Hands, Reply, at_once, noise
from tests.registry import StandIn

TWO, THREE = "444455556666.dkr.ecr.us-east-1.amazonaws.com", "777788889999.dkr.ecr.us-east-1.amazonaws.com"
BUCKET = "https://prod-us-east-1-starport-layer-bucket.s3.us-east-1.amazonaws.com"
LATEST = "/v2/us/team/app/manifests/latest"


def table(name: str = TWO, **values: Any) -> RegistryTable:
    """
    Return the table of a registry in us-east-1.
    """
    return RegistryTable(name=name, protocol=Protocol.ECR, endpoint=f"https://{name}", region="us-east-1", **values)


class ReloadTests(DaemonTestCase):
    """
    A daemon with another registry beside the default one.
    """

    def setUp(self) -> None:
        super().setUp()
        self.other, self.third = (
            StandIn(self.clock, registry=f"https://{name}", bucket=BUCKET) for name in (TWO, THREE)
        )
        self.layer = noise("layer", 100_000)
        self.image = self.other.push_image("team/app", "latest", layers=[self.layer])
        self.standin.push_image("team/app", "latest")
        self.third.push_image("team/app", "latest")
        self.table = table(path_prefix="us")
        self.start(others={self.table: self.other})

    @property
    def digest(self) -> str:
        """
        Return the digest of the other registry's layer.
        """
        digest: str = json.loads(self.image.manifest)["layers"][0]["digest"]
        return digest

    def begin(self, path: str) -> Reply:
        """
        Send a request whose upstream request is not delivered before the next flush.
        """
        reply = self.daemon.send("GET", path)
        while self.daemon.front.move():
            self.clock.advance(0)
        return reply

    def test_one_appears(self) -> None:
        path = f"/v2/team/app/manifests/latest?ns={THREE}"
        self.assertRefused(self.get(path), 404, "NAME_UNKNOWN")
        self.daemon.reload({self.table: self.other, table(THREE): self.third})
        self.assertEqual(200, self.get(path).code)
        self.assertIn(THREE, self.daemon.ask_admin("/metrics").body.decode())

    def test_one_disappears(self) -> None:
        """
        It is 404 as if it had never existed, also for cached content; nothing mentions it, and no connection stays.
        """
        named = f"/v2/team/app/manifests/latest?ns={TWO}"
        self.assertWhole(self.get(named), self.image.manifest)
        asked = len(self.other.asked)
        self.daemon.reload({})
        self.assertRefused(self.get(named), 404, "NAME_UNKNOWN")
        self.assertEqual(404, self.get(LATEST).code)
        self.assertEqual(asked, len(self.other.asked))
        self.assertEqual([], self.daemon.others[TWO].back.ends)
        self.assertNotIn(f'circuit_state{{registry="{TWO}"', self.daemon.ask_admin("/metrics").body.decode())
        self.assertEqual(1, len(json.loads(self.daemon.ask_admin("/status.json").body)["registries"]))

    def test_those_of_before_are_not_kept(self) -> None:
        """
        Also after requests to them that are remembered.
        """
        self.daemon.reload({self.table: self.other})
        gone = weakref.ref(self.daemon.worlds.latest.registries)
        self.get(LATEST)
        self.daemon.reload({self.table: self.other})
        self.get(LATEST)
        gc.collect()
        self.assertIsNone(gone())

    def test_others_keep_connections_circuit_and_token(self) -> None:
        """
        If their tables are the same; a registry whose table has changed starts again.
        """
        self.other.fail("registry", status=500)
        for number in range(3 * FAILURES):
            self.daemon.send("GET", f"/v2/us/team{number}/app/manifests/latest")
        self.pass_time(30)
        before = self.daemon.askings()
        self.assertNotEqual("closed", before[1].circuit.state.value)
        self.daemon.reload({self.table: self.other, table(THREE): self.third})
        self.assertEqual(list(before), list(self.daemon.askings())[:2])
        self.assertIs(before[1].circuit, self.daemon.askings()[1].circuit)
        self.daemon.reload({replace(self.table, hosts=frozenset({"us.example"})): self.other})
        self.assertIs(before[0].circuit, self.daemon.askings()[0].circuit)
        self.assertEqual("closed", self.daemon.askings()[1].circuit.state.value)

    def begin_transfer(self) -> Reply:
        """
        Have a client receive the beginning of a blob of the other registry.
        """
        self.other.hold(self.digest)
        reply = self.daemon.send("GET", f"/v2/us/team/app/blobs/{self.digest}")
        self.flush()
        self.other.deliver(self.digest, 20_000)
        self.flush()
        return reply

    def test_a_transfer_in_progress_ends_whole(self) -> None:
        """
        Though the registry has to be asked again meanwhile. New requests don't reach it.
        """
        reply = self.begin_transfer()
        self.daemon.reload({})
        self.assertRefused(self.get(f"/v2/team/app/blobs/{self.digest}?ns={TWO}"), 404, "NAME_UNKNOWN")
        asked = self.other.count("registry")
        self.other.expire_urls()
        self.other.cut(self.digest)
        self.pass_time(5)
        self.other.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.layer, "MISS")
        self.assertGreater(self.other.count("registry"), asked)

    def test_one_that_fails_and_disappears_is_not_asked_again(self) -> None:
        """
        Nor by the daemon's own probes; a transfer in flight may ask it.
        """
        reply = self.begin_transfer()
        outage = self.other.refuse("registry")
        for number in range(3 * FAILURES):
            self.daemon.send("GET", f"/v2/us/team{number}/app/manifests/latest")
        self.pass_time(20)
        self.assertEqual("open", self.daemon.askings()[1].circuit.state.value)
        self.daemon.reload({})
        outage.remove()
        self.other.forget_asked()
        for _ in range(3):
            self.other.deliver(self.digest, 20_000)
            self.pass_time(20)
        self.assertEqual([], [each for each in self.other.asked if each.path == "/v2/"])
        self.other.expire_urls()
        self.other.cut(self.digest)
        self.pass_time(5)
        self.other.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.layer, "MISS")

    def test_a_request_ends_with_the_registries_that_it_began_with(self) -> None:
        """
        Whether the registry is gone meanwhile, or has other credentials: the second upstream request goes where the
        first went.
        """
        for number, others in enumerate(
            ({}, {replace(self.table, role="arn:aws:iam::444455556666:role/x"): self.other})
        ):
            self.daemon.reload({self.table: self.other})
            self.get(LATEST)
            moved = self.other.push_image("team/app", "latest", layers=[b"%d" % number])
            self.other.forget_asked()
            reply = self.begin(LATEST)
            self.daemon.reload(others)
            self.flush()
            self.assertWhole(reply, moved.manifest, "MISS")
            self.assertEqual(["HEAD", "GET"], [each.method for each in self.other.asked])
            self.assertEqual(1, len({each.headers["authorization"] for each in self.other.asked}))

    def test_nothing_is_read_ahead_of_one_that_disappears(self) -> None:
        """
        Also while the cache is being searched for it; read-ahead for the others goes on.
        """
        looks = Hands()
        self.start(read_ahead=True, disk=Disk(looks, *[at_once] * 5), others={self.table: self.other})
        layers = [b"one", b"two"]
        image = self.other.push_image("team/app", "ahead", layers=layers)
        self.get("/v2/us/team/app/manifests/ahead")
        self.get(f"/v2/us/team/app/blobs/{image.layers[0]}")
        self.other.forget_asked()
        looks.idle = False
        self.clock.advance(BEGIN_SECONDS)
        self.daemon.reload({})
        looks.idle = True
        looks.work(len(looks.waiting))
        self.pass_time(1)
        self.assertEqual([], self.other.asked)
        assert self.daemon.pull_through.ahead is not None
        self.assertEqual(0, self.daemon.pull_through.ahead.bytes_ahead)


class Left:
    """
    A double for an upstream.

    @ivar left: whether it sends no more requests of its own.
    """

    left = False

    def leave(self) -> None:
        """
        Record the call.
        """
        self.left = True


class UpstreamsTests(SynchronousTestCase):
    """
    Registries that match a wildcard.
    """

    WILDCARD = "*.dkr.ecr.us-east-1.amazonaws.com"

    def make(self, *names: str, before: Upstreams | None = None) -> Upstreams:
        tables, _ = parse_registries("x.toml", {THREE: {"default": True}, **{name: {} for name in names}})
        make: Callable[[Known], Any] = lambda known: (Left(), known.table.name)  # noqa: E731
        return Upstreams(Registries(tables), make, before)

    def test_stay_while_the_wildcard_does(self) -> None:
        route = Route(Kind.MANIFEST, Repository(RegistryId.of_host(TWO), "team/app"), "latest")
        first = self.make(self.WILDCARD)
        upstream = first(route)
        self.assertIs(upstream, self.make(self.WILDCARD, before=first)(route))
        self.assertEqual([THREE], list(self.make(before=first).askings()))
        self.assertRaises(LookupError, self.make(before=first), route)

    def test_what_is_forgotten_asks_no_more_by_itself(self) -> None:
        """
        Clients can make up any number of accounts.
        """
        accounts = [RegistryId(f"aws:us-east-1:{number:012}") for number in range(MOST)]
        many = self.make(self.WILDCARD)
        made: list[Any] = [many(Route(Kind.MANIFEST, Repository(each, "team/app"), "latest")) for each in accounts]
        self.assertEqual([made[0]], [each for each in made if each.left])
        self.make(before=many)
        self.assertEqual(made, [each for each in made if each.left])

    def test_a_table_of_its_own_begins_anew(self) -> None:
        """
        Unless it says the same: then it is the same registry, asked in the same way.
        """
        first = self.make(self.WILDCARD)
        self.assertEqual([THREE, TWO], list(self.make(self.WILDCARD, TWO, before=first).askings()))


class ReadingTests(SynchronousTestCase):
    """
    The file is read again with the same flags and variables.
    """

    BEGUN = f'port = 80\nregistry-aliases = "a.test"\n[registry."{THREE}"]\ndefault = true\n[registry."{TWO}"]\n'

    def setUp(self) -> None:
        self.text, self.used = self.BEGUN, list[Settings]()
        self.events: list[Any] = []
        self.environ = {"HOME": "/home/me", "PROXY_CONFIG": "x.toml", "PROXY_TAG_TTL": "3"}
        observer: Any = self.events.append
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.reloading = Reloading(self.read(), self.read, self.used.append)

    def read(self) -> Settings:
        file = parse_file("x.toml", self.text.encode())
        return Settings(file, Config.load({}, self.environ, file), texts_of({}, self.environ, file))

    def reload(self, text: str) -> list[tuple[str, str]]:
        """
        Write the file, and reload it; return what is logged.
        """
        self.text = text
        self.events.clear()
        self.reloading.use(self.reloading.read())
        return [(each["log_level"].name, formatEvent(each)) for each in self.events if "log_level" in each]

    def test_what_differs_is_used_and_told(self) -> None:
        more = "111122223333.dkr.ecr.eu-west-1.amazonaws.com"
        for text, said in (
            (f'{self.BEGUN}namespaces = "a"', f"changed {TWO}"),
            (f'{self.BEGUN}namespaces = "b"', f"changed {TWO}"),
            (f'{self.BEGUN}namespaces = "b"\n[registry."{more}"]', f"added {more}"),
            (self.BEGUN.replace("a.test", "b.test"), f"removed {more}; changed {TWO}"),
            (self.BEGUN, "aliases or the namespace pattern changed"),
        ):
            self.assertEqual([("info", f"Reloaded x.toml: {said}")], self.reload(text))
            self.assertEqual(self.read(), self.used.pop())
        self.assertEqual([("info", "Reloaded x.toml: no registry changed")], self.reload(self.BEGUN))
        self.assertEqual([], self.used)

    def test_a_bad_file_changes_nothing(self) -> None:
        """
        All errors are logged, in the words of the start. The next valid file is used.
        """
        told = self.reload(f"{self.BEGUN}moon = 1\nsun = 2")
        self.assertEqual(["error"] * 2, [level for level, _ in told])
        self.assertIn('Not reloaded: x.toml: registry."444455556666', told[0][1])
        self.assertEqual(([], 1), (self.used, len(self.reload("port = 80"))))
        self.reload(self.BEGUN.replace(TWO, TWO.replace("4", "5")))
        self.assertEqual(1, len(self.used))

    def test_other_settings_that_changed_are_named_in_one_line(self) -> None:
        """
        Each time, until the daemon is restarted; those that a variable overrides have not changed.
        """
        text = f'tag-ttl = 9\ncache-limit = "2g"\n{self.BEGUN.replace("80", "81")}'
        line = "These settings have changed; restart the daemon to use them: cache-limit, port"
        for _ in range(2):
            self.assertEqual(("warn", line), self.reload(text)[0])
        self.assertEqual([], self.used)

    def test_workers_get_all_that_is_about_registries(self) -> None:
        """
        However long it is.
        """
        text = "".join(
            f'[registry."*.dkr.ecr.us-east-{at}.amazonaws.com"]\nnamespaces = \'"{at}\\w\'\n' for at in range(500)
        )
        file = parse_file("x.toml", f"{self.BEGUN}{text}".encode()[:LIMIT])
        message = decode(encode(Reload.of(about_registries(file))), FromParent)
        handed = read_handed("".join(message.registries))
        self.assertEqual(file.registries, handed.registries)
        self.assertEqual({"registry-aliases": ("a.test", "x.toml: registry-aliases")}, handed.settings)
