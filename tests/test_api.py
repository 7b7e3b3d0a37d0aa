"""
The API that the command uses, over HTTP on the admin port.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.inventory import Inventory
from ecrproxy.oci import Digest
from ecrproxy.transfer.response_body import LEAST_PIECE
from tests.daemon import DaemonTestCase, Hands, Reply, noise
from tests.registry_content import OCI_LAYER, OCI_MANIFEST, Image

SHOWN = {"X-Ecrproxy-Api": "1"}
MIB = 2**20


class ApiTestCase(DaemonTestCase):
    """
    A daemon with an image that a client has pulled.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "v1")
        self.pull("team/app", "v1", self.image)

    def pull(self, repository: str, tag: str, image: Image) -> None:
        self.assertEqual(200, self.get(f"/v2/{repository}/manifests/{tag}").code)
        for digest in (image.config, *image.layers):
            self.assertEqual(200, self.get(f"/v2/{repository}/blobs/{digest}").code)

    def ask(self, path: str) -> list[Any]:
        reply = self.daemon.ask_admin(f"/api/{path}", headers=SHOWN)
        self.assertEqual((200, "whole"), (reply.code, reply.ended))
        return [json.loads(line) for line in reply.body.splitlines()]

    def post(self, path: str, document: object, **headers: str) -> Reply:
        shown = {**SHOWN, "Content-Type": "application/json", **headers}
        return self.daemon.ask_admin(f"/api/{path}", "POST", body=json.dumps(document).encode(), headers=shown)

    def remove(self, **document: object) -> Any:
        reply = self.post("remove", document)
        self.assertEqual(200, reply.code, reply.body)
        return json.loads(reply.body)

    def verify(self, *digests: str, **document: object) -> list[Any]:
        reply = self.post("verify", {"digests": digests, **document})
        self.assertEqual((200, "whole"), (reply.code, reply.ended))
        return [json.loads(line) for line in reply.body.splitlines()]


class ListingTests(ApiTestCase):
    def test_entries_tell_of_repositories_and_what_they_hold(self) -> None:
        """
        A tag leads to its manifest, a manifest to what it lists; each with its last use.
        """
        self.get("/v2/team/app/manifests/v1")
        found = self.ask("entries")
        (tag,) = [each for each in found if each["reference"] == "v1"]
        self.assertEqual(("manifests", "team/app"), (tag["kind"], tag["repository"]))
        self.assertEqual([self.image.digest], [each["digest"] for each in tag["answers"]])
        self.assertEqual([sorted([self.image.config, *self.image.layers])], [each["lists"] for each in tag["answers"]])
        self.assertEqual(self.daemon.now(), tag["used"])
        self.assertEqual({str(key) for key in self.entries()}, {each["name"] for each in found})
        self.assertEqual(len(self.image.layers) + 3, len(found))

    def test_a_tag_that_moved_tells_from_where_and_when(self) -> None:
        self.get("/v2/team/app/manifests/v1")
        moved = self.standin.push_image("team/app", "v1", layers=[noise("moved", 100)])
        self.clock.advance(1000)
        self.get("/v2/team/app/manifests/v1")
        (tag,) = [each for each in self.ask("entries") if each["reference"] == "v1"]
        self.assertEqual(
            [{"from": self.image.digest, "to": moved.digest, "seen": round(self.daemon.now())}],
            [{**each, "seen": round(each["seen"])} for each in tag["moves"]],
        )
        self.assertEqual([tag], [each for each in self.ask("entries") if "moves" in each])

    def test_content_is_told_by_digest_in_order(self) -> None:
        """
        Each file once, with its size, its last use, and the time of its verification.
        """
        found = self.ask("content")
        self.assertEqual({self.daemon.now()}, {round(each[what]) for each in found for what in ("used", "verified")})
        self.assertEqual(sorted(each["digest"] for each in found), [each["digest"] for each in found])
        self.assertEqual({self.image.digest, self.image.config, *self.image.layers}, {e["digest"] for e in found})
        sizes = {path.name: path.stat().st_size for path in self.files()}
        self.assertEqual(sizes, {each["digest"].partition(":")[2]: each["bytes"] for each in found})

    def test_looking_is_no_use(self) -> None:
        """
        Listing and verifying don't change the last use, so the order of eviction stays the same.
        """
        self.clock.advance(1000)
        before = [(path, path.stat().st_mtime_ns) for path in self.files()], self.ask("content")
        self.ask("entries")
        self.verify(self.image.digest, *self.image.layers)
        self.pass_time(2)
        after = self.ask("content")
        self.assertEqual([each["used"] for each in before[1]], [each["used"] for each in after])
        self.assertEqual(before[0], [(path, path.stat().st_mtime_ns) for path in self.files()])
        verified = {each["digest"] for each in after if each["verified"] > self.daemon.now() - 10}
        self.assertEqual({self.image.digest, *self.image.layers}, verified)

    def test_what_is_no_content_is_passed_over(self) -> None:
        """
        Other programs may leave files there.
        """
        before = self.ask("entries"), self.ask("content")
        folder = self.files()[0].parent
        (folder / "notes.txt").write_text("mine")
        os.mkfifo(folder / f"{folder.name}{'0' * 62}")
        self.start()
        self.assertEqual(before, (self.ask("entries"), self.ask("content")))
        (folder / "notes.txt").unlink()  # for the invariants about content

    def test_long_documents_are_told_in_small_pieces(self) -> None:
        """
        Whatever manifests list, little of the answer waits for a reader that stops.
        """
        layers = [
            {"mediaType": OCI_LAYER, "size": 1, "digest": self.standin.push_blob("team/app", bytes([number, 1]))}
            for number in range(256)
        ]
        for number in range(20):
            manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": layers, "text": str(number)}
            digest = self.standin.push_manifest("team/app", manifest, OCI_MANIFEST, f"large-{number}")
            self.get(f"/v2/team/app/manifests/{digest}")
        hands = Hands()
        daemon = self.start(in_thread=hands)
        hands.idle = False
        daemon.ask_admin("/api/entries", headers=SHOWN)
        ((client, server),) = daemon.admin.ends
        client.reading = False
        while hands.waiting:
            hands.work()
            daemon.flush()
            self.assertLessEqual(server.waiting, 2 * LEAST_PIECE + 1000)
        self.assertGreater(server.waiting, LEAST_PIECE)
        hands.idle = client.reading = True
        daemon.flush()

    def test_a_large_directory_is_told_step_by_step(self) -> None:
        """
        A slow reader pauses the work, and only one step of it is in memory; a client that disconnects ends it.
        """
        hands = Hands()
        daemon = self.start(in_thread=hands)
        (key, entry) = next(iter(self.entries().items()))
        self.index.save([(key._replace(repository=f"team/app{number}"), entry) for number in range(2000)])
        hands.idle = False
        daemon.ask_admin("/api/entries", headers=SHOWN)
        steps = 0
        while hands.waiting:
            hands.work()
            daemon.flush()
            steps += 1
            if steps == 2:
                ((client, _),) = daemon.admin.ends
                client.reading = False
            if steps > 100:
                self.fail("it does not wait")
        self.assertLess(steps, 6)
        client.reading = True
        daemon.flush()
        self.assertTrue(hands.waiting)
        client.abortConnection()
        daemon.flush()
        hands.work_off()
        self.assertEqual([], self.flushLoggedErrors())
        hands.idle = True


class RemovingTests(ApiTestCase):
    index_in_memory = False

    def names(self, *references: str) -> list[str]:
        return [each["name"] for each in self.ask("entries") if each["reference"] in references]

    def test_what_is_named_goes_and_is_counted(self) -> None:
        """
        Files and bytes are reported, and the limit has space again.
        """
        before = self.used()
        layer = self.image.layers[0]
        data = self.file_of(layer).read_bytes()
        names = self.names("v1", layer)
        told = self.remove(entries=names, content=[layer])
        self.assertFalse(self.has(layer))
        gone = {"entries": len(names), "files": 1, "bytes": len(data), "used": 0, "stuck": 0}
        self.assertEqual(gone, told)
        self.assertEqual(on_disk(len(data)), before - self.used())
        self.assertEqual(self.used(), self.index.totals.blocks)

    def test_where_the_index_can_not_be_written_content_goes_and_the_rest_is_told(self) -> None:
        """
        On a full disk that frees the space for the index.
        """
        layer, config = self.image.layers[0], self.image.config
        self.get(f"/v2/team/app/blobs/{layer}")  # a use that is not written yet
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        for document in ({"content": [layer]}, {"entries": self.names("v1")}):
            reply = self.post("remove", document)
            self.assertEqual(503, reply.code)
            self.assertIn(b"can't be written", reply.body)
        self.assertEqual([False, True], [self.has(layer), self.has(config)])
        self.index.database.rows._writer.execute("PRAGMA query_only = 0")  # noqa: SLF001
        self.assertEqual(1, self.remove(content=[layer], entries=self.names("v1"))["entries"])

    def test_a_use_that_is_yet_to_be_written_is_one(self) -> None:
        """
        Content that was used after the caller looked stays, also if the index can't be written.
        """
        layer = self.image.layers[0]
        looked = self.daemon.now() + 1
        self.pass_time(100)
        self.get(f"/v2/team/app/blobs/{layer}")
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        self.assertEqual(1, self.remove(content=[layer], unused_since=looked)["used"])
        self.assertTrue(self.has(layer))

    def test_what_is_removed_is_asked_for_afresh(self) -> None:
        """
        Memory does not bring back what the directory has lost.
        """
        names = [each["name"] for each in self.ask("entries")]
        content = [each["digest"] for each in self.ask("content")]
        self.remove(entries=names, content=content)
        self.standin.forget_asked()
        self.assertEqual("MISS", self.get(f"/v2/team/app/manifests/{self.image.digest}").cache)
        self.assertEqual("MISS", self.get(f"/v2/team/app/blobs/{self.image.config}").cache)
        self.assertEqual(1, self.standin.count("bucket", "GET"))

    def test_a_pull_under_way_at_that_moment_brings_nothing_back(self) -> None:
        """
        What a thread has read before the removal is dropped a second later.
        """
        hands = Hands()
        self.start(in_thread=hands)
        hands.idle = False
        reply = self.daemon.send("GET", f"/v2/team/app/manifests/{self.image.digest}")
        self.flush()
        hands.work()  # already read, but not in memory yet
        content = [Digest("sha256", path.name) for path in self.files()]
        Inventory(self.daemon.store).remove(list(self.entries()), content)
        self.assertEqual([], self.files())
        hands.idle = True
        hands.work_off()
        self.flush()
        self.assertEqual("HIT", reply.cache)
        self.pass_time(3)
        self.assertEqual("MISS", self.get(f"/v2/team/app/manifests/{self.image.digest}").cache)

    def test_another_daemon_on_the_directory_forgets_it_too(self) -> None:
        """
        Within two seconds: it checks each second.
        """
        one = self.daemon
        two = self.start()
        self.pull("team/app", "v1", self.image)
        self.daemon = one
        names = [each["name"] for each in self.ask("entries")]
        self.remove(entries=names, content=[each["digest"] for each in self.ask("content")])
        self.daemon = two
        self.assertEqual("HIT", self.get(f"/v2/team/app/blobs/{self.image.config}").cache)
        self.pass_time(2)
        self.assertEqual("MISS", self.get(f"/v2/team/app/blobs/{self.image.config}").cache)

    def test_what_is_being_read_is_read_to_its_end(self) -> None:
        """
        A purge breaks off no pull.
        """
        data = noise("large", 3 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        reply.stop_reading()
        self.flush()
        self.assertEqual(1, self.remove(content=[digest])["files"])
        reply.read_on()
        self.flush()
        self.assertWhole(reply, data)

    def test_what_was_used_meanwhile_stays(self) -> None:
        """
        A person takes time between seeing the list and confirming.
        """
        since = self.daemon.now() + 1
        self.pass_time(100)
        self.get(f"/v2/team/app/blobs/{self.image.layers[0]}")
        told = self.remove(content=list(self.image.layers), unused_since=since)
        self.assertEqual((len(self.image.layers) - 1, 1), (told["files"], told["used"]))
        self.assertTrue(self.has(self.image.layers[0]))

    def test_what_is_not_there_is_no_trouble(self) -> None:
        """
        Another process was quicker.
        """
        told = self.remove(entries=["aws:x:1 manifests team/none latest "], content=[f"sha256:{'0' * 64}"])
        self.assertEqual({"entries": 0, "files": 0, "bytes": 0, "used": 0, "stuck": 0}, told)

    def test_what_can_not_go_is_told(self) -> None:
        """
        It is still counted.
        """
        path = self.file_of(self.image.config)
        path.unlink()
        path.mkdir()
        told = self.remove(content=[self.image.config])
        self.assertEqual((0, 1), (told["files"], told["stuck"]))
        path.rmdir()


class VerifyingTests(ApiTestCase):
    """
    Does content match its digest?
    """

    def damage(self, digest: str) -> None:
        path = self.file_of(digest)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        status = path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does

    def test_good_content_is_good(self) -> None:
        """
        Bytes are counted as they are hashed.
        """
        data = noise("nine", 9 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        steps = [{"hashed": 4 * MIB}, {"hashed": 4 * MIB}, {"hashed": MIB}]
        self.assertEqual([*steps, {"digest": digest, "verdict": "good"}], self.verify(digest))

    def test_bad_content_is_dropped_and_fetched_anew(self) -> None:
        """
        Even if the daemon has it in memory as verified: the disk has changed it.
        """
        data = noise("rotten", 300_000)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        self.damage(digest)
        (_, told) = self.verify(digest)
        self.assertEqual({"digest": digest, "verdict": "bad", "bytes": 300_000}, told)
        self.assertFalse(self.has(digest))
        reply = self.get(f"/v2/team/app/blobs/{digest}")
        self.assertWhole(reply, data, "MISS")

    def test_bad_content_may_be_kept_but_is_not_served(self) -> None:
        """
        For inspection.
        """
        data = noise("rotten", 300_000)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        self.damage(digest)
        (_, told) = self.verify(digest, keep=True)
        self.assertEqual("bad", told["verdict"])
        self.assertTrue(self.has(digest))
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), data, "MISS")

    def test_what_is_not_there_is_gone(self) -> None:
        """
        It may have been evicted since it was listed.
        """
        digest = f"sha512:{'0' * 128}"
        self.assertEqual([{"digest": digest, "verdict": "gone"}], self.verify(digest))

    def test_it_can_be_made_slow(self) -> None:
        """
        Steps pause, so that the disk has time for pulls.
        """
        data = noise("eight", 8 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        reply = self.post("verify", {"digests": [digest], "rate": MIB})
        self.assertEqual(1, len(reply.body.splitlines()))
        self.pass_time(3)
        self.assertEqual(1, len(reply.body.splitlines()))
        self.pass_time(1)
        self.assertEqual(2, len(reply.body.splitlines()))
        self.pass_time(4)
        self.assertEqual((3, "whole"), (len(reply.body.splitlines()), reply.ended))

    def test_pulls_have_their_turn_between_its_steps(self) -> None:
        """
        It uses at most one thread's call at a time.
        """
        data = noise("eight", 8 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        hands = Hands()
        self.start(in_thread=hands)
        hands.idle = False
        self.post("verify", {"digests": [digest]})
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{self.image.layers[0]}")
        self.flush()
        self.assertEqual(2, len(hands.waiting))
        hands.work_off()
        self.flush()
        self.assertEqual((200, "whole"), (reply.code, reply.ended))
        hands.idle = True
        hands.work_off()


class RefusalTests(ApiTestCase):
    """
    Requests that are rejected.
    """

    def assertUnchanged(self, reply: Reply, status: int, word: str) -> None:
        self.assertEqual(status, reply.code)
        (error,) = json.loads(reply.body)["errors"]
        self.assertIn(word, error["message"])
        self.assertEqual(3 + len(self.image.layers) - 1, len(self.files()))

    def test_a_web_page_can_not_ask(self) -> None:
        """
        Without the header, with an Origin, or as a form: a browser may send all these for any site.
        """
        content = {"content": [self.image.digest]}
        self.assertUnchanged(self.daemon.ask_admin("/api/entries"), 403, "X-Ecrproxy-Api")
        body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
        self.assertUnchanged(
            self.daemon.ask_admin("/api/remove", "POST", body=body, headers=kind), 403, "X-Ecrproxy-Api"
        )
        self.assertUnchanged(self.post("remove", content, Origin="http://admin.example"), 403, "web pages")
        self.assertUnchanged(self.post("remove", content, **{"Content-Type": "text/plain"}), 415, "JSON")
        self.assertUnchanged(
            self.daemon.ask_admin("/api/remove", "OPTIONS", headers={"Origin": "http://evil"}), 405, "only reads"
        )

    def test_no_answer_may_be_read_by_another_site(self) -> None:
        for path in ("/api/entries", "/api/content"):
            self.assertIsNone(self.daemon.ask_admin(path, headers=SHOWN).header("Access-Control-Allow-Origin"))
        self.assertIsNone(self.post("remove", {}).header("Access-Control-Allow-Origin"))

    def test_reading_changes_nothing(self) -> None:
        """
        Removal needs POST, listing needs GET.
        """
        reply = self.daemon.ask_admin("/api/remove", headers=SHOWN)
        self.assertUnchanged(reply, 405, "POST")
        self.assertEqual("POST", reply.header("Allow"))
        self.assertUnchanged(self.post("entries", {}), 405, "GET")
        self.assertUnchanged(self.daemon.ask_admin("/api/all", headers=SHOWN), 404, "entries, content")

    def test_clients_have_no_such_port(self) -> None:
        """
        The client port has neither the API nor request bodies.
        """
        self.assertRefused(self.get("/api/entries", **SHOWN), 404, "UNSUPPORTED")
        sent = b"POST /api/remove HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nX-Ecrproxy-Api: 1\r\n\r\n{}"
        self.assertIn(b"405 Method Not Allowed", self.daemon.raw(sent))

    def test_what_is_no_document_is_refused_whole(self) -> None:
        """
        Nothing of it is done, and the answer says what is wrong.
        """
        good = self.image.digest
        for document, word in (
            ([], "no JSON object"),
            ({"content": good}, "content is no list"),
            ({"content": [good, "sha256:../../etc"]}, "no digest"),
            ({"content": [good, 5]}, "no digest"),
            ({"entries": ["../content/x"], "content": [good]}, "no name of an entry"),
            ({"content": [good], "unused_since": "now"}, "unused_since"),
            ({"content": [good], "unused_since": True}, "unused_since"),
        ):
            self.assertUnchanged(self.post("remove", document), 400, word)
        self.assertUnchanged(self.post("verify", {"digests": [good], "rate": -1}), 400, "rate")

    def test_numbers_beyond_all_bounds_are_refused(self) -> None:
        for number in ("1e400", "-1e400", "1e308", "1" + "0" * 400, "1" + "0" * 5000, "1e-320", "0", "NaN", "Infinity"):
            for path, name in (("remove", "unused_since"), ("verify", "rate")):
                body = f'{{"content": ["{self.image.digest}"], "digests": [], "{name}": {number}}}'.encode()
                headers = {**SHOWN, "Content-Type": "application/json"}
                reply = self.daemon.ask_admin(f"/api/{path}", "POST", body=body, headers=headers)
                self.assertUnchanged(reply, 400, "no JSON object" if len(number) > 4300 else name)

    def test_a_body_that_is_large_or_of_no_told_length_is_refused_unread(self) -> None:
        """
        The daemon holds a body of the admin port in memory, so it has to be small.
        """
        head = b"POST /api/remove HTTP/1.1\r\nHost: localhost\r\nX-Ecrproxy-Api: 1\r\n"
        for length in (b"Content-Length: 65537\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):
            self.assertIn(b"413 Content Too Large", self.raw_admin(head + length))
        self.assertIn(
            b"400 Bad Request", self.raw_admin(head.replace(b"POST", b"GET") + b"Content-Length: 2\r\n\r\n{}")
        )

    def test_a_body_that_does_not_come_is_not_waited_for(self) -> None:
        """
        Its timeout is that of a head.
        """
        head = b"POST /api/remove HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{"
        self.raw_admin(head)
        self.pass_time(9)
        self.assertEqual(1, len(self.daemon.admin.ends))
        self.pass_time(2)
        self.assertEqual(0, len(self.daemon.admin.ends))

    def test_an_answer_may_take_longer_than_a_body_may(self) -> None:
        """
        Once the request has arrived, nothing limits the time for it.
        """
        data = noise("eight", 40 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.get(f"/v2/team/app/blobs/{digest}")
        reply = self.post("verify", {"digests": [digest], "rate": MIB / 10})
        self.pass_time(401)
        self.assertEqual((11, "whole"), (len(reply.body.splitlines()), reply.ended))

    def raw_admin(self, data: bytes) -> bytes:
        from tests.daemon import Raw

        client = Raw()
        self.daemon.admin.connect(client, "localhost", 80, secure=False).write(data)
        self.flush()
        return bytes(client.got)
