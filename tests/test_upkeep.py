"""
Purge and verify what the cache has of a registry, a repository or an image, as the pages' buttons do.
"""

from __future__ import annotations

import json
import os
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.browsers import is_own_page
from ecrproxy.cache import upkeep
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Digest
from tests.daemon import Hands, Reply, noise
from tests.registry_content import Image
from tests.test_api import MIB, ApiTestCase

ECR = "aws:eu-west-1:123456789012"
OWN = {"Origin": "http://localhost:5001", "Sec-Fetch-Site": "same-origin"}


class UpkeepTestCase(ApiTestCase):
    """
    A daemon with an image that a client has pulled.
    """

    def told(self, path: str, **document: object) -> list[Any]:
        reply = self.post(path, {"registry": ECR, **document})
        self.assertEqual((200, "whole"), (reply.code, reply.ended), reply.body)
        return [json.loads(line) for line in reply.body.splitlines()]

    def purge(self, **document: object) -> dict[str, int]:
        told = self.told("purge", **document)
        return {name: sum(each[name] for each in told) for name in ("entries", "files", "bytes", "stuck")}

    def there(self, image: Image) -> set[str]:
        return {each for each in (image.digest, image.config, *image.layers) if self.has(each)}

    def names(self, repository: str = "team/app") -> set[str]:
        return {each.reference for each in self.entries() if each.repository == repository}


class PurgeTests(UpkeepTestCase):
    index_in_memory = False

    def test_a_repository_goes_with_all_its_content(self) -> None:
        size = sum(path.stat().st_size for path in self.files())
        count = len(self.entries())
        self.assertEqual({"entries": count, "files": 4, "bytes": size, "stuck": 0}, self.purge(repository="team/app"))
        self.assertEqual(([], {}), (self.files(), self.entries()))
        self.assertEqual("MISS", self.get(f"/v2/team/app/manifests/{self.image.digest}").cache)
        self.assertEqual("MISS", self.get(f"/v2/team/app/blobs/{self.image.config}").cache)

    def test_what_another_repository_holds_stays(self) -> None:
        layer = noise("shared", 3000)
        mine = self.standin.push_image("team/app", "v2", layers=[layer, noise("mine", 200)])
        others = self.standin.push_image("team/base", "v1", layers=[layer])
        self.pull("team/app", "v2", mine)
        self.pull("team/base", "v1", others)
        self.purge(repository="team/app")
        self.assertEqual({*self.there(others)}, {others.digest, others.config, *others.layers})
        self.assertEqual(4 - 1, len(self.files()))
        self.assertEqual("HIT", self.get(f"/v2/team/base/blobs/{others.layers[0]}").cache)

    def test_a_tag_goes_with_what_only_it_leads_to(self) -> None:
        layer = noise("shared", 3000)
        one = self.standin.push_image("team/app", "one", layers=[layer, noise("one", 200)])
        two = self.standin.push_image("team/app", "two", layers=[layer, noise("two", 200)])
        self.pull("team/app", "one", one)
        self.pull("team/app", "two", two)
        self.assertEqual(3, self.purge(repository="team/app", reference="one")["files"])
        self.assertEqual({one.layers[0]}, self.there(one))
        self.assertEqual(4, len(self.there(two)))
        self.assertEqual(4, len(self.there(self.image)))
        self.assertEqual(set(), self.names() & {"one", one.digest, one.config, one.layers[1]})
        self.assertIn(two.digest, self.names())

    def test_an_image_that_another_tag_leads_to_stays(self) -> None:
        self.standin.repositories["team/app"].tags["v2"] = self.image.digest
        self.get("/v2/team/app/manifests/v2")
        self.assertEqual(
            {"entries": 1, "files": 0, "bytes": 0, "stuck": 0}, self.purge(repository="team/app", reference="v1")
        )
        self.assertEqual(4, len(self.there(self.image)))
        self.assertNotIn("v1", self.names())

    def test_an_index_goes_without_what_another_index_lists(self) -> None:
        common = self.standin.push_image("team/app", layers=[noise("common", 300)])
        mine = self.standin.push_image("team/app", layers=[noise("mine", 300)])
        self.standin.push_index("team/app", "one", [common, mine])
        other = self.standin.push_index("team/app", "two", [common])
        for tag in ("one", "two"):
            self.get(f"/v2/team/app/manifests/{tag}")
        self.pull("team/app", common.digest, common)
        self.pull("team/app", mine.digest, mine)
        self.purge(repository="team/app", reference="one")
        self.assertEqual(3, len(self.there(common)))
        self.assertEqual(set(), self.there(mine))
        self.assertTrue(self.has(other))

    def test_a_digest_goes_with_the_tags_that_lead_to_it(self) -> None:
        self.purge(repository="team/app", reference=self.image.digest)
        self.assertEqual((set(), set()), (self.there(self.image), self.names()))

    def test_a_registry_goes_without_others(self) -> None:
        self.pull("team/base", "v1", self.standin.push_image("team/base", "v1", layers=[noise("base", 200)]))
        key, entry = next(iter(self.entries().items()))
        theirs = key._replace(registry=RegistryId("other.test:443"))
        self.index.save([(theirs, entry)])
        self.purge()
        self.assertEqual([theirs], list(self.entries()))

    def test_more_than_one_page_goes(self) -> None:
        self.patch(upkeep, "_TOGETHER", 2)
        for number in range(5):
            self.pull(
                "team/app",
                f"w{number}",
                self.standin.push_image("team/app", f"w{number}", layers=[noise(f"{number}", 9)]),
            )
        self.purge(repository="team/app")
        self.assertEqual(([], {}), (self.files(), self.entries()))

    def test_what_is_not_there_is_no_trouble(self) -> None:
        for meant in ({"repository": "team/none"}, {"repository": "team/app", "reference": "none"}):
            self.assertEqual(0, self.purge(**meant)["entries"])
        self.assertEqual(4, len(self.files()))

    def test_an_index_that_can_not_be_written_is_told(self) -> None:
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        told = self.told("purge", repository="team/app")
        self.assertIn("can't be used", told[-1]["problem"])
        self.index.database.rows._writer.execute("PRAGMA query_only = 0")  # noqa: SLF001

    def test_an_image_of_too_many_parts_is_refused(self) -> None:
        self.patch(upkeep, "PARTS", 3)
        self.assertIn("more than 3 parts", self.told("purge", repository="team/app", reference="v1")[-1]["problem"])
        self.assertEqual(4, len(self.files()))

    def test_what_is_purged_is_in_the_log(self) -> None:
        self.purge(repository="team/app")
        self.assertIn("Purged 123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/app: ", "\n".join(self.lines()))

    def lines(self) -> list[str]:
        from twisted.logger import formatEvent

        return [formatEvent(each) for each in self.events]

    def test_a_client_that_leaves_ends_the_work(self) -> None:
        hands = Hands()
        daemon = self.start(in_thread=hands)
        key = next(iter(self.entries()))
        entry = self.entries()[key]
        self.index.save([(key._replace(reference=f"t{number}"), entry) for number in range(2000)])
        hands.idle = False
        body, shown = (
            json.dumps({"registry": ECR}).encode(),
            {"X-Ecrproxy-Api": "1", "Content-Type": "application/json"},
        )
        daemon.ask_admin("/api/purge", "POST", body=body, headers=shown)
        hands.work()
        ((client, _),) = daemon.admin.ends
        client.abortConnection()
        daemon.flush()
        hands.work_off()
        daemon.flush()
        self.assertTrue(self.entries())
        hands.idle = True


class VerifyTests(UpkeepTestCase):
    """
    Does the content of a repository or an image match its digests?
    """

    def damage(self, digest: str) -> None:
        path = self.file_of(digest)
        data, status = bytearray(path.read_bytes()), path.stat()
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def verdicts(self, told: list[Any]) -> dict[str, str]:
        return {each["digest"]: each["verdict"] for each in told if "verdict" in each}

    def test_a_repository_is_verified_and_what_is_corrupt_is_dropped(self) -> None:
        self.clock.advance(100)
        whole = {self.image.digest, self.image.config, *self.image.layers}
        self.damage(self.image.layers[0])
        told = self.told("verify", repository="team/app")
        self.assertEqual({**dict.fromkeys(whole, "good"), self.image.layers[0]: "bad"}, self.verdicts(told))
        self.assertFalse(self.has(self.image.layers[0]))
        self.assertEqual(sum(each.get("of", 0) for each in told), sum(each.get("hashed", 0) for each in told))

    def test_an_image_is_verified_without_others(self) -> None:
        self.pull("team/app", "v2", self.standin.push_image("team/app", "v2", layers=[noise("v2", 200)]))
        self.clock.advance(100)
        told = self.told("verify", repository="team/app", reference="v1")
        self.assertEqual({self.image.digest, self.image.config, *self.image.layers}, {*self.verdicts(told)})

    def test_a_registry_is_verified_each_file_once(self) -> None:
        shared = noise("shared", 5 * MIB)
        for name in ("team/one", "team/two"):
            self.pull(name, "v1", image := self.standin.push_image(name, "v1", layers=[shared]))
        self.clock.advance(100)
        told = self.told("verify")
        digests = [each["digest"] for each in told if each.get("verdict") == "good"]
        self.assertEqual(sorted(path.name for path in self.files()), sorted(each[7:] for each in digests))
        self.assertIn(image.layers[0], digests)
        self.assertEqual(sum(each.get("of", 0) for each in told), sum(each.get("hashed", 0) for each in told))


class RefusalTests(UpkeepTestCase):
    """
    Which pages may ask.
    """

    def send(self, host: str = "localhost", **headers: str) -> Reply:
        shown = {"X-Ecrproxy-Api": "1", "Content-Type": "application/json", **headers}
        body = json.dumps({"registry": ECR, "repository": "team/none"}).encode()
        return self.daemon.ask_admin("/api/purge", "POST", host=host, body=body, headers=shown)

    def test_our_own_page_may_ask(self) -> None:
        self.assertEqual(200, self.send(**OWN).code)
        self.assertEqual(200, self.send(Origin="http://localhost:5001").code)
        self.assertEqual(200, self.send("192.0.2.1", Origin="http://192.0.2.1:5001").code)

    def test_other_pages_may_not(self) -> None:
        for origin in (
            *("http://evil.example", "http://localhost", "http://localhost:3000", "http://localhost:5001.evil.example"),
            *("null", "", "http://localhost:5001/", "ftp://localhost:5001", "https://localhost:5001"),
        ):
            self.assertEqual(403, self.send(Origin=origin).code, origin)
        for site in ("cross-site", "same-site", "none", "", "same-origin, same-origin"):
            self.assertEqual(403, self.send(**{**OWN, "Sec-Fetch-Site": site}).code, site)

    def test_a_name_that_was_made_to_lead_here_is_refused(self) -> None:
        for host in ("evil.example", "evil"):
            reply = self.send(host, Origin=f"http://{host}:5001", **{"Sec-Fetch-Site": "same-origin"})
            self.assertIn(reply.code, (403, 405))

    def test_our_own_page_must_ask_as_programs_do(self) -> None:
        """
        Without that, a browser would send it for any page, with no preflight.
        """
        body = b"{}"
        for headers in ({"Content-Type": "application/json"}, {"X-Ecrproxy-Api": "1", "Content-Type": "text/plain"}):
            reply = self.daemon.ask_admin("/api/purge", "POST", body=body, headers={**OWN, **headers})
            self.assertIn(reply.code, (403, 415))

    def test_reading_changes_nothing(self) -> None:
        reply = self.daemon.ask_admin("/api/purge", headers={"X-Ecrproxy-Api": "1"})
        self.assertEqual((405, "POST"), (reply.code, reply.header("Allow")))

    def test_what_is_meant_must_be_clear(self) -> None:
        for document in (
            *(
                {},
                {"registry": ""},
                {"registry": 1},
                {"registry": ECR, "repository": 1},
                {"registry": ECR, "reference": "v1"},
            ),
            *(
                {"registry": ECR, "repository": ""},
                {"registry": ECR, "repository": "team/app", "reference": "sha256:1"},
            ),
            *({"registry": ECR, "repository": "team/app", "reference": ""}, {"registry": ECR, "repository": "\ud800"}),
        ):
            for path in ("purge", "verify"):
                self.assertEqual(400, self.post(path, document).code, document)
        self.assertEqual(4, len(self.files()))

    def test_scrapers_have_no_such_port(self) -> None:
        shown = {"X-Ecrproxy-Api": "1", "Content-Type": "application/json"}
        for path in ("/api/purge", "/api/verify", "/contents", "/contents.js"):
            reply = self.daemon.ask_admin(path, "POST", body=b"{}", headers=shown, port=self.daemon.scraped)
            self.assertIn(reply.code, (403, 404, 405))


class OwnPageTests(SynchronousTestCase):
    def test_behind_something_that_ends_tls_the_browser_must_tell(self) -> None:
        self.assertTrue(is_own_page("https://admin.example", "same-origin", "admin.example", secure=False))
        self.assertFalse(is_own_page("https://admin.example", None, "admin.example", secure=False))
        self.assertTrue(is_own_page("https://admin.example", None, "admin.example", secure=True))
        self.assertFalse(is_own_page("http://admin.example", None, "admin.example", secure=True))
        self.assertFalse(is_own_page("http://", None, "", secure=False))


class KeyTests(SynchronousTestCase):
    def test_what_is_meant_has_a_name(self) -> None:
        registry = RegistryId(ECR)
        host = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
        digest = str(Digest.of(b""))
        self.assertEqual(host, str(upkeep.Meant(registry)))
        self.assertEqual(f"{host}/a", str(upkeep.Meant(registry, "a")))
        self.assertEqual(f"{host}/a:v1", str(upkeep.Meant(registry, "a", "v1")))
        self.assertEqual(f"{host}/a@{digest}", str(upkeep.Meant(registry, "a", digest)))
