"""
How the doctor judges this machine: cache directory, disk, ports, open files, and contradictory settings.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.mounts import Mount, find_mount
from ecrproxy.command.checkup.disk import DirectoryState, judge_directory, judge_room, survey
from ecrproxy.command.checkup.findings import Finding, Verdict
from ecrproxy.command.checkup.ports import look_at_ports, try_to_bind
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.command.checkup.settings import judge_files, look_at_files, look_at_settings
from ecrproxy.endpoint_string import parse_endpoint_string
from ecrproxy.healthcheck import Place
from ecrproxy.settings.config import Config, given

GIB = 2**30
ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
WELL = DirectoryState(
    path="/var/cache/x",
    exists=True,
    is_directory=True,
    strangers=(),
    problem="",
    lacking=(),
    mount=Mount("/var", "ext4", frozenset({"rw"})),
    total=100 * GIB,
    free=60 * GIB,
    inodes=10**6,
    used=20 * GIB,
    counted=True,
)
MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw,errors=remount-ro
30 22 0:40 / /var/cache rw - xfs /dev/sdb rw
31 30 0:41 / /var/cache/a\040b ro,nosuid - nfs4 host:/x ro
32 22 0:42 / /var/cachet rw - tmpfs tmpfs rw
nonsense
"""


def config(flags: Mapping[str, str] | None = None) -> Config:
    """
    Return a configuration.
    """
    return Config.load({"ecr-endpoint": ECR, **(flags or {})}, {})


class DirectoryTests(SynchronousTestCase):
    """
    The cache directory.
    """

    def first(self, **changes: object) -> Finding:
        """
        Judge a good one with one change.
        """
        return next(iter(judge_directory(replace(WELL, **changes), 65532)))  # type: ignore[arg-type]

    def kind(self, kind: str) -> Verdict:
        """
        Judge the type of a file system.
        """
        seen = replace(WELL, mount=Mount("/var", kind, frozenset({"rw"})))
        return list(judge_directory(seen, 65532))[-1].verdict

    def test_one_that_can_be_written_is_well(self) -> None:
        """
        The user is named, for it should be the daemon's.
        """
        self.assertEqual([Verdict.OK] * 2, [each.verdict for each in judge_directory(WELL, 65532)])
        self.assertIn("by user 65532", self.first().said)
        self.assertIn("can be created", self.first(exists=False).said)

    def test_one_that_can_not_be_written_fails(self) -> None:
        """
        Because of its owner, its file system, or its type.
        """
        self.assertIn("chown", self.first(problem="Permission denied").advice)
        read_only = Mount("/var", "ext4", frozenset({"ro"}))
        self.assertIn("read-only", self.first(problem="Read-only file system", mount=read_only).said)
        self.assertIn("no directory", self.first(is_directory=False).said)
        verdicts = {self.first(problem="x").verdict, self.first(is_directory=False).verdict}
        self.assertEqual({Verdict.FAILED}, verdicts)

    def test_parts_of_it_that_belong_to_others_are_told(self) -> None:
        """
        When the doctor runs as another user than the daemon, this is the first sign.
        """
        found = self.first(strangers=(0, 1000))
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("belong to user 0, 1000", found.said)

    def test_what_does_not_work_on_its_file_system_fails(self) -> None:
        """
        With the consequences.
        """
        found = list(judge_directory(replace(WELL, lacking=[("flock", "No locks available")]), 0))[1]
        self.assertEqual(Verdict.FAILED, found.verdict)
        self.assertIn("flock does not work there: No locks available", found.said)

    def test_a_file_system_without_fallocate_is_warned_of(self) -> None:
        """
        The cache works without it.
        """
        found = list(judge_directory(replace(WELL, lacking=[("fallocate", "Operation not supported")]), 0))[1]
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("fallocate does not work there: Operation not supported", found.said)

    def test_kinds_of_file_systems_that_are_no_disk_are_warned_of(self) -> None:
        """
        Network file systems, containers' layers, memory.
        """
        odd = ("nfs4", "cifs", "fuse", "fuse.s3fs", "overlay", "fuse.overlayfs", "tmpfs")
        self.assertEqual([Verdict.WARNING] * len(odd), [self.kind(each) for each in odd])
        self.assertEqual([Verdict.OK] * 3, [self.kind(each) for each in ("ext4", "xfs", "btrfs")])

    def test_what_it_is_on_is_found(self) -> None:
        """
        The innermost of the mounts, whose names may contain escapes.
        """
        found = {path: find_mount(MOUNTS, path) for path in ("/var/cache/x", "/var/cache/a b/c", "/var/cachet", "/var")}
        kinds = {path: each.kind if each is not None else "" for path, each in found.items()}
        self.assertEqual(["xfs", "nfs4", "tmpfs", "ext4"], list(kinds.values()))
        nfs = found["/var/cache/a b/c"]
        self.assertTrue(nfs is not None and "ro" in nfs.options)
        self.assertIsNone(find_mount("", "/var"))


class RoomTests(SynchronousTestCase):
    """
    The limit and the free space.
    """

    def verdict(self, limit: int, **changes: object) -> Verdict:
        """
        Judge a limit.
        """
        return list(judge_room(replace(WELL, **changes), limit))[-1].verdict  # type: ignore[arg-type]

    def test_what_is_used_already_counts_as_room(self) -> None:
        """
        80 GiB are available here: 60 free and 20 used by the cache itself.
        """
        self.assertEqual(Verdict.OK, self.verdict(80 * GIB))
        self.assertEqual([Verdict.WARNING] * 2, [self.verdict(limit * GIB) for limit in (81, 101)])

    def test_too_many_files_are_not_counted(self) -> None:
        """
        Then the limit is compared only with the whole disk.
        """
        self.assertEqual(Verdict.OK, self.verdict(90 * GIB, counted=False))
        self.assertEqual(Verdict.WARNING, self.verdict(101 * GIB, counted=False))

    def test_few_inodes_are_warned_of(self) -> None:
        """
        Where the file system has a fixed number of them.
        """
        found = next(iter(judge_room(replace(WELL, inodes=10), GIB)))
        self.assertEqual(("inodes", Verdict.WARNING), (found.check, found.verdict))
        self.assertEqual(1, len(list(judge_room(replace(WELL, inodes=None), GIB))))

    def test_a_disk_without_inodes_is_named(self) -> None:
        seen = replace(WELL, inodes=0, problem="No space left on device")
        found = next(iter(judge_directory(seen, 0)))
        self.assertEqual(Verdict.FAILED, found.verdict)
        self.assertIn("no inodes left", found.said)


class SurveyTests(SynchronousTestCase):
    """
    A real directory.
    """

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def test_it_is_as_it_was_afterwards(self) -> None:
        """
        Probe files are removed, and a missing directory is not created.
        """
        seen = survey(str(self.folder), lambda: 0)
        self.assertEqual((True, True, "", []), (seen.exists, seen.is_directory, seen.problem, list(seen.lacking)))
        self.assertEqual([], list(self.folder.iterdir()))
        absent = survey(str(self.folder / "a" / "b"), lambda: 0)
        self.assertEqual((False, ""), (absent.exists, absent.problem))
        self.assertEqual([], list(self.folder.iterdir()))

    def test_its_files_are_counted(self) -> None:
        """
        Those of the cache; counting has a limit.
        """
        for name, size in (("content/a/x", 10), ("arriving/y", 5), ("other/z", 7)):
            (self.folder / name).parent.mkdir(parents=True)
            (self.folder / name).write_bytes(bytes(size))
        seen = survey(str(self.folder), lambda: 0)
        self.assertEqual((15, True), (seen.used, seen.counted))
        clock = iter(range(0, 1000, 100))
        self.assertFalse(survey(str(self.folder), lambda: next(clock)).counted)

    def test_a_file_in_its_place_is_none(self) -> None:
        """
        Reported whatever its permissions are.
        """
        (self.folder / "x").write_bytes(b"")
        self.assertFalse(survey(str(self.folder / "x"), lambda: 0).is_directory)


REFUSED = Contact("x", "Connection refused")


class PortTests(SynchronousTestCase):
    """
    The sockets of the daemon.
    """

    def look(self, text: str, contact: Contact = REFUSED, bound: int = 0, variable: str = "PROXY_PORT") -> Finding:
        """
        Check one endpoint.
        """
        (found,) = look_at_ports(
            [(variable, parse_endpoint_string(text))], lambda place, path: contact, lambda place: bound
        )
        return found

    def test_a_free_one_is_well(self) -> None:
        """
        So is one on which the daemon listens.
        """
        self.assertEqual((Verdict.OK, "tcp:5000 is free"), (self.look("tcp:5000").verdict, self.look("tcp:5000").said))
        ours = Contact("x", status=200, headers={"server": "ecrproxy"})
        self.assertIn("the daemon is at tcp:5000, and ready", self.look("tcp:5000", ours).said)

    def test_a_daemon_that_is_not_ready_says_why(self) -> None:
        """
        In its own words.
        """
        ours = Contact("x", status=503, headers={"server": "ecrproxy"}, body=b'{"reasons": ["no token"]}')
        found = self.look("tcp:5000", ours)
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("not ready: no token", found.said)

    def test_a_daemon_that_serves_and_can_not_fetch_says_why(self) -> None:
        body = b'{"can_serve": true, "can_fetch": false, "reasons": ["no token: AWS is down"]}'
        found = self.look("tcp:5000", Contact("x", status=200, headers={"server": "ecrproxy"}, body=body))
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("and serves, but no token: AWS is down", found.said)

    def test_one_that_somebody_else_has_fails(self) -> None:
        """
        Whatever protocol the other program speaks.
        """
        for contact in (Contact("x", status=200, headers={"server": "nginx"}), Contact("x", "no HTTP: BadStatusLine")):
            found = self.look("tcp:5000", contact, variable="PROXY_ADMIN_LISTEN")
            self.assertEqual(("admin port", Verdict.FAILED), (found.check, found.verdict))
            self.assertIn("set PROXY_ADMIN_LISTEN", found.advice)

    def test_one_that_can_not_be_had_tells_why(self) -> None:
        """
        The kernel's reasons, and what helps.
        """
        cases = {errno.EACCES: "CAP_NET_BIND_SERVICE", errno.EADDRNOTAVAIL: "to one that is", errno.EINVAL: "another"}
        for number, advice in cases.items():
            found = self.look("tcp:80", bound=number)
            self.assertEqual(Verdict.FAILED, found.verdict)
            self.assertIn(advice, found.advice)

    def test_what_can_not_be_looked_at_is_skipped(self) -> None:
        """
        A socket that systemd passes.
        """
        self.assertEqual(Verdict.SKIPPED, self.look("systemd:domain=INET:name=http").verdict)

    def test_a_socket_in_the_file_system_is_not_made(self) -> None:
        """
        The path is left alone.
        """
        self.assertEqual(0, try_to_bind(Place("/nowhere/at/all.sock")))


class SettingsTests(SynchronousTestCase):
    """
    Contradictory settings.
    """

    def test_what_the_daemon_refuses_fails_and_what_it_warns_of_is_a_warning(self) -> None:
        flags, environ = {"admin-listen": "tcp:5001", "htpasswd": "x"}, {"CACHE_MAX_SIZE": "1g"}
        found = list(look_at_settings(config(flags), given(flags, environ), environ, 2))
        verdicts = [each.verdict for each in found]
        self.assertEqual([Verdict.FAILED, Verdict.WARNING, Verdict.WARNING], verdicts)
        self.assertTrue(all(each.advice for each in found))
        self.assertEqual([Verdict.OK], [each.verdict for each in look_at_settings(config(), {}, {}, 2)])

    def test_files_that_settings_name_are_read(self) -> None:
        """
        Unusable files fail here, before the daemon is started.
        """
        flags = {"ssl-key": "/no/key", "ssl-certificate": "/no/cert", "htpasswd": "/no/passwords"}
        found = list(look_at_files(config(flags), 0))
        self.assertEqual(
            [("certificate", Verdict.FAILED), ("passwords", Verdict.FAILED)], [(e.check, e.verdict) for e in found]
        )
        self.assertEqual([], list(look_at_files(config(), 0)))

    def test_the_files_of_endpoint_strings_are_read_too(self) -> None:
        """
        Behind a balancer, and on the admin port; a path that is not absolute is left to the daemon.
        """
        flags = {
            "listen": "haproxy:ssl:1:/nowhere:/there ssl:2 tcp:3",
            "admin-listen": "ssl:4:/not:interface=127.0.0.1",
        }
        found = list(look_at_files(config(flags), 0))
        self.assertEqual([Verdict.FAILED] * 2, [each.verdict for each in found])
        self.assertEqual(
            ["haproxy:ssl:1:/nowhere:/there", "ssl:4:/not:interface=127.0.0.1"],
            [each.said.partition(": ")[0] for each in found],
        )

    def test_too_few_files_for_so_many_clients_are_warned_of(self) -> None:
        """
        Each process has its share.
        """
        self.assertEqual(Verdict.WARNING, judge_files(1024, config()).verdict)
        self.assertEqual(Verdict.OK, judge_files(65536, config()).verdict)
        self.assertEqual(Verdict.OK, judge_files(26000, config({"worker-processes": "2"})).verdict)
        self.assertEqual(Verdict.OK, judge_files(1024, config({"connections": "0"})).verdict)
