"""
The pages of what the cache has: of registries, repositories and images.
"""

from __future__ import annotations

import itertools
import re
import tracemalloc
from dataclasses import replace
from unittest.mock import ANY

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.template import flattenString

from ecrproxy.admin import contents
from ecrproxy.admin.contents_page import ContentsPage, ContentsShown, address
from ecrproxy.askers import EACH, REPOSITORIES, AskedFor, Askers
from ecrproxy.cache.contents import Contents, HeldImage, HeldRepository, ImagePart
from ecrproxy.cache.entry_rows import PAGE
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.repository_rows import Weight
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Descriptor, Digest, Kind
from tests.daemon import MIB, DaemonTestCase, Hands, noise
from tests.markup import Node, Reader
from tests.registry_content import Image

ECR = RegistryId("aws:eu-west-1:123456789012")
HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


class ContentsTestCase(DaemonTestCase):
    """
    A daemon with an image that a client has pulled.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "v1")
        self.pull("team/app", "v1", self.image)
        self.app = Repository(ECR, "team/app")

    def pull(self, repository: str, tag: str, image: Image) -> None:
        self.assertEqual(200, self.get(f"/v2/{repository}/manifests/{tag}").code)
        for digest in (image.config, *image.layers):
            self.assertEqual(200, self.get(f"/v2/{repository}/blobs/{digest}").code)

    def size(self, *digests: str) -> int:
        return sum(self.file_of(each).stat().st_size for each in digests)

    @property
    def contents(self) -> Contents:
        return Contents(self.daemon.store, Inventory(self.daemon.store))

    def page(self, path: str) -> Node:
        reply = self.daemon.ask_admin(f"/{path}")
        self.assertEqual((200, "text/html; charset=utf-8"), (reply.code, reply.header("Content-Type")))
        return Reader(reply.body.decode()).top

    def table(self, page: Node, name: str) -> list[list[str]]:
        (section,) = [each for each in page.all("section") if each.all("h2")[0].text == name]
        return [[cell.text for cell in row.all("th", "td")] for row in section.all("tr")][1:]

    def tiles(self, page: Node) -> dict[str, str]:
        return {each.all("dt")[0].text: each.all("dd")[0].text for each in page.all("dl")[0].all("div")}


class ReadingTests(ContentsTestCase):
    """
    What is read from the index.
    """

    def everything(self, image: Image) -> tuple[str, ...]:
        return (image.digest, image.config, *image.layers)

    def test_repositories_are_weighed_without_what_is_not_there(self) -> None:
        """
        Each file counts once, however many entries lead to it; a layer that was not pulled does not count.
        """
        other = self.standin.push_image("team/base", "v1", layers=[noise("base", 5000)])
        self.get("/v2/team/base/manifests/v1")
        found = [each for each in self.contents.repositories(None) if each is not None]
        now, whole = self.daemon.now(), self.everything(self.image)
        self.assertEqual(
            [
                HeldRepository(self.app, Weight(len(whole), self.size(*whole), ANY)),
                HeldRepository(Repository(ECR, "team/base"), Weight(1, self.size(other.digest), ANY)),
            ],
            found,
        )
        self.assertAlmostEqual(now, found[0].weight.used, places=1)

    def test_repositories_have_pages(self) -> None:
        (key, entry) = next(iter(self.entries().items()))
        names = sorted(f"many/{number}" for number in range(250))
        self.index.save([(key._replace(repository=each), entry) for each in names])
        every = [each.repository.name for each in self.contents.repositories(ECR) if each is not None]
        self.assertEqual([*names, "team/app"], every)
        after = Repository(ECR, names[100])
        later = [each.repository.name for each in self.contents.repositories(ECR, after) if each is not None]
        self.assertEqual(every[101:], later)
        self.assertEqual([], [each for each in self.contents.repositories(RegistryId("other:443")) if each])

    def test_a_repository_of_any_size_is_weighed_page_by_page(self) -> None:
        (key, entry) = next((key, entry) for key, entry in self.entries().items() if key.reference in self.image.layers)
        digests = [Digest("sha256", f"{number:064x}") for number in range(2 * PAGE + 5)]
        self.index.save([(key._replace(reference=str(each)), _about(entry, each)) for each in digests])
        self.index.settle()
        steps = list(self.contents.weigh(self.app))
        self.assertEqual(3, len(steps))
        whole = self.everything(self.image)
        total = Weight()
        for each in steps:
            total = total.plus(each)
        self.assertEqual((len(whole), self.size(*whole)), total[:2])
        self.assertEqual(sorted(whole), [str(each.digest) for each in self.contents.files(self.app)])

    def test_tags_tell_what_they_lead_to(self) -> None:
        (tag,) = self.contents.tagged(self.app)
        whole = self.everything(self.image)
        self.assertEqual(("v1", [self.image.digest]), (tag.reference, [str(each.digest) for each in tag.roots]))
        self.assertEqual((len(whole), self.size(*whole)), tag.weight[:2])
        self.assertEqual((len(whole), True), (tag.parts, tag.whole))
        self.assertEqual([], list(self.contents.tagged(self.app, "v1")))
        self.assertEqual(["v1"], [each.reference for each in self.contents.tagged(self.app, "v0")])

    def test_an_index_leads_to_the_parts_of_what_was_pulled(self) -> None:
        other = self.standin.push_image("team/multi", layers=[noise("other", 700)])
        mine = self.standin.push_image("team/multi", layers=[noise("mine", 800)])
        index = self.standin.push_index("team/multi", "v2", [mine, other])
        self.get("/v2/team/multi/manifests/v2")
        self.pull("team/multi", mine.digest, mine)
        held = self.contents.image(Repository(ECR, "team/multi"), "v2")
        assert held is not None
        self.assertEqual(self.size(index, *self.everything(mine)), held.weight.bytes)
        parts = [str(each.descriptor.digest) for each in self.contents.parts(held.roots, 100)]
        self.assertEqual([index, mine.digest, other.digest], parts[:3])
        self.assertEqual({*self.everything(mine)}, {*parts} - {index, other.digest})
        by_digest = [each for each in self.contents.manifests(Repository(ECR, "team/multi")) if each is not None]
        self.assertEqual(sorted([index, mine.digest]), [each.reference for each in by_digest])

    def test_what_lists_itself_is_read_once(self) -> None:
        held = Descriptor("application/vnd.oci.image.index.v1+json", Digest("sha256", "0" * 64), 1)
        inventory = Inventory(self.daemon.store)
        self.patch(inventory, "lists", lambda _: [(Kind.MANIFEST, held)])
        self.assertEqual(1, len(list(Contents(self.daemon.store, inventory).parts([held], 100))))

    def test_indexes_of_indexes_are_kept_in_memory_as_far_as_parts_are_wanted(self) -> None:
        """
        A tree of 1,000 indexes of 1,000 each would fill it before its first thousand parts are told.
        """
        numbers = itertools.count()

        def lists(_: object) -> list[tuple[Kind, Descriptor]]:
            some = (Digest.of(b"%d" % next(numbers)) for _ in range(1000))
            return [(Kind.MANIFEST, Descriptor("application/vnd.oci.image.index.v1+json", each, 1)) for each in some]

        inventory = Inventory(self.daemon.store)
        self.patch(inventory, "lists", lists)
        parts = Contents(self.daemon.store, inventory).parts([lists(None)[0][1]], 50)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(51, sum(1 for _ in parts))
        self.assertLess(tracemalloc.get_traced_memory()[1], 2 * MIB)


def _about(entry, digest):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    ((accept, known),) = entry.answers.items()
    return replace(entry, answers={accept: replace(known, descriptor=replace(known.descriptor, digest=digest))})


class PageTests(ContentsTestCase):
    """
    The pages as the daemon serves them.
    """

    def test_all_repositories_lead_to_their_pages(self) -> None:
        page = self.page("contents")
        self.assertEqual([f"team/app {HOST}", "4"], self.table(page, "Repositories")[0][:2])
        links = [each.attributes["href"] for each in page.all("a")]
        here = address(repository=self.app)
        self.assertIn(here, links)
        self.assertIn(address(ECR), links)
        self.assertEqual("team/app", self.page(here).all("h1")[0].text)
        self.assertEqual(HOST, self.page(address(ECR)).all("h1")[0].text)

    def test_the_status_page_leads_there(self) -> None:
        self.assertIn("contents", [each.attributes["href"] for each in self.page("").all("a")])

    def test_a_repository_shows_its_tags_and_who_asked(self) -> None:
        self.clock.advance(60)
        page = self.page(address(repository=self.app))
        ((name, files, *_),) = self.table(page, "Tags")
        self.assertEqual((f"v1 {self.image.digest[:17]}…", "4"), (name, files))
        self.assertEqual([["192.0.2.7", "v1", "1", "1 min ago"]], self.table(page, "Who asked lately"))
        self.assertEqual("4", self.tiles(page)["Files"])

    def test_a_repository_shows_what_it_saved(self) -> None:
        self.pull("team/app", "v1", self.image)
        self.assertIn("Saved since the start", self.tiles(self.page(address(repository=self.app))))

    def test_a_repository_shows_manifests_by_digest(self) -> None:
        page = self.page(address(repository=self.app, by="digest"))
        self.assertEqual(f"{self.image.digest[:17]}…", self.table(page, "Manifests by digest")[0][0])

    def test_an_image_shows_its_parts_and_which_are_there(self) -> None:
        missing = self.standin.push_image("team/app", "v2", layers=[noise("not pulled", 900)])
        self.get("/v2/team/app/manifests/v2")
        page = self.page(address(repository=self.app, reference="v2"))
        rows = {row[0]: row[2] for row in self.table(page, "What it consists of")}
        self.assertEqual("yes", rows[f"{missing.digest[:17]}… manifest"])
        self.assertEqual("no", rows[f"{missing.layers[0][:17]}… config or layer"])
        self.assertEqual("team/app:v2", page.all("h1")[0].text)
        links = [each.attributes["href"] for each in page.all("a")]
        by_digest = address(repository=self.app, reference=missing.digest)
        self.assertIn(by_digest, links)
        self.assertIn("Size in the cache", self.tiles(self.page(by_digest)))

    def test_an_image_shows_where_its_tag_led_before(self) -> None:
        self.standin.push_image("team/app", "v1", layers=[noise("moved", 100)])
        self.clock.advance(1000)
        self.get("/v2/team/app/manifests/v1")
        page = self.page(address(repository=self.app, reference="v1"))
        self.assertEqual(f"{self.image.digest[:17]}…", self.table(page, "Where the tag led before")[0][0])

    def test_long_lists_have_pages(self) -> None:
        self.patch(contents, "ROWS", 3)
        for number in range(7):
            self.standin.push_image("team/app", f"w{number}")
            self.get(f"/v2/team/app/manifests/w{number}")
        self.clock.advance(1)
        seen, path, pages = list[str](), address(repository=self.app), 0
        while path:
            page = self.page(path)
            seen += [row[0].partition(" ")[0] for row in self.table(page, "Tags")]
            pages += 1
            (path,) = [each.attributes["href"] for each in page.all("a") if each.text == "Next page"] or [""]
        self.assertEqual((["v1", *(f"w{number}" for number in range(7))], 3), (seen, pages))

    def test_all_repositories_have_pages(self) -> None:
        self.patch(contents, "ROWS", 2)
        (key, entry) = next(iter(self.entries().items()))
        for registry in ("a.test:443", "z.test:443"):
            names = [f"r{number}" for number in range(3)]
            self.index.save([(key._replace(repository=each, registry=RegistryId(registry)), entry) for each in names])
        seen, path = list[str](), "contents"
        while path:
            page = self.page(path)
            seen += [row[0] for row in self.table(page, "Repositories")]
            (path,) = [each.attributes["href"] for each in page.all("a") if each.text == "Next page"] or [""]
        of_a, of_z = ([f"r{number} {host}" for number in range(3)] for host in ("a.test", "z.test"))
        self.assertEqual([*of_a, f"team/app {HOST}", *of_z], seen)

    def test_what_is_not_there_is_told(self) -> None:
        nobody = Repository(ECR, "team/none")
        self.assertIn("Nothing of it is in the cache.", self.page(address(repository=nobody)).text)
        self.assertIn("Nothing of it is in the cache.", self.page(address(RegistryId("other.test:443"))).text)
        for reference, status in (("none", 404), (f"sha256:{'0' * 64}", 404), ("sha256:0", 400), ("a b", 404)):
            reply = self.daemon.ask_admin(f"/{address(repository=self.app, reference=reference)}")
            self.assertEqual(status, reply.code)
        for query in ("repository=team/app", "image=v1", "registry=%FF&repository=%00", "after=x", "of=x"):
            self.assertEqual(200, self.daemon.ask_admin(f"/contents?{query}").code)

    def test_an_empty_name_is_none(self) -> None:
        """
        The buttons would mean the whole registry on a page that shows nothing.
        """
        page = self.page(f"contents?registry={ECR}&repository=&image=")
        self.assertEqual(["team/app"], [row[0].split()[0] for row in self.table(page, "Repositories")])
        (work,) = [each for each in page.all("div") if each.attributes.get("id") == "work"]
        self.assertEqual(HOST, work.attributes["data-what"])

    def test_questions_name_the_registry(self) -> None:
        page = self.page(address(repository=self.app, reference="v1"))
        (work,) = [each for each in page.all("div") if each.attributes.get("id") == "work"]
        self.assertEqual(f"{HOST}/team/app:v1", work.attributes["data-what"])

    def test_types_of_other_versions_are_no_trouble(self) -> None:
        rows = self.index.database.rows
        for table in ("tag", "holds"):
            rows._writer.execute(f"UPDATE {table} SET media_type = 'application/new' WHERE media_type IS NOT NULL")  # noqa: SLF001
        self.page(address(repository=self.app))
        self.page(address(repository=self.app, by="digest"))

    def test_strangers_names_and_ports_have_no_such_pages(self) -> None:
        self.assertEqual(403, self.daemon.ask_admin("/contents", host="evil.example").code)
        self.assertIn(self.daemon.ask_admin("/contents", port=self.daemon.scraped).code, (403, 404))
        self.assertRefused(self.get("/contents"), 404, "UNSUPPORTED")

    def test_an_index_that_can_not_be_read_is_told(self) -> None:
        def fail(*_: object) -> None:
            raise OSError(5, "the disk fails")

        self.patch(self.daemon.store.index.database, "ask", fail)
        self.assertEqual(503, self.daemon.ask_admin("/contents").code)

    def test_looking_is_no_use(self) -> None:
        self.pass_time(2)
        before = list(self.contents.files(self.app))
        self.clock.advance(1000)
        for path in ("contents", address(repository=self.app), address(repository=self.app, reference="v1")):
            self.page(path)
        self.pass_time(2)
        self.assertEqual(before, list(self.contents.files(self.app)))

    def test_a_client_that_leaves_ends_the_work(self) -> None:
        hands = Hands()
        daemon = self.start(in_thread=hands)
        (key, entry) = next(iter(self.entries().items()))
        self.index.save([(key._replace(repository=f"team/app{number}"), entry) for number in range(2000)])
        hands.idle = False
        daemon.ask_admin("/contents")
        hands.work()
        ((client, _),) = daemon.admin.ends
        client.abortConnection()
        daemon.flush()
        self.assertLessEqual(len(hands.waiting), 1)
        hands.work_off()
        daemon.flush()
        self.assertFalse(hands.waiting)
        hands.idle = True


DIGEST = Digest("sha256", "0123456789abcdef" * 4)
DESCRIPTOR = Descriptor("application/vnd.oci.image.manifest.v1+json", DIGEST, 1000)
FULL = ContentsShown(
    when=1_800_000_000.0,
    registry=ECR,
    repository=Repository(ECR, "team/app"),
    image=HeldImage("v1", (DESCRIPTOR,), 1_799_999_000.0, Weight(2, 2**20, 1_799_990_000.0), 2, whole=True),
    parts=[(ImagePart(Kind.MANIFEST, DESCRIPTOR), None)],
    askers=[AskedFor("192.0.2.7", "v1", 1_799_999_999.0, 3)],
    next={"after": "v1"},
)


class MarkupTests(SynchronousTestCase):
    """
    The elements of the pages.
    """

    def read(self, shown: ContentsShown) -> Node:
        self.html = self.successResultOf(flattenString(None, ContentsPage(shown))).decode()
        return Reader(self.html).top

    def test_hostile_names_have_no_effect(self) -> None:
        evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u202e\0"
        repository = Repository(RegistryId(f"{evil}:443"), evil)
        held = HeldImage(evil, (DESCRIPTOR,), 1.0, Weight(1, 1, 1.0), 1, whole=True)
        asked = [AskedFor(evil, evil, 1.0, 1)]
        for shown in (
            replace(FULL, registry=repository.registry, repository=repository, image=held, askers=asked),
            replace(FULL, registry=repository.registry, repository=repository, image=None, images=[held], parts=()),
            ContentsShown(when=1.0, registry=repository.registry, repositories=[HeldRepository(repository, Weight())]),
            ContentsShown(
                when=1.0, repositories=[HeldRepository(repository, Weight())], next={"after": evil, "of": evil}
            ),
        ):
            page = self.read(shown)
            self.assertEqual(["contents.js"], [each.attributes["src"] for each in page.all("script")])
            self.assertEqual([], page.all("img"))
            seen = [value for each in page.all() for name, value in each.attributes.items() if name[:5] != "data-"]
            self.assertNotIn("\u202e", page.text + "".join(seen))
            for each in page.all("a"):
                self.assertRegex(each.attributes["href"], r"^(\./|#figures|contents(\?[A-Za-z0-9._~%&=+-]*)?)$")

    def test_nothing_is_inline_or_from_elsewhere(self) -> None:
        page = self.read(FULL)
        self.assertEqual(([], []), (page.all("style"), page.all("form")))
        names = {name for each in page.all() for name in each.attributes}
        self.assertEqual(set(), {name for name in names if name == "style" or name.startswith("on")})
        self.assertEqual([], re.findall(r"https?://(?!www\.w3\.org)", self.html))

    def test_can_be_read_out(self) -> None:
        """
        One of each landmark, sections named by headings, tables with heads, and an empty place for announcements.
        """
        for shown in (FULL, replace(FULL, image=None, images=[FULL.image], parts=()), ContentsShown(when=1.0)):  # type: ignore[list-item]
            page = self.read(shown)
            for tag in ("header", "main", "footer", "h1", "dialog"):
                self.assertEqual(1, len(page.all(tag)), tag)
            ids = [each.attributes["id"] for each in page.all() if "id" in each.attributes]
            self.assertEqual(len(ids), len(set(ids)))
            for section in page.all("section", "dialog"):
                self.assertEqual(section.attributes["aria-labelledby"], section.all("h2")[0].attributes["id"])
            for table in page.all("table"):
                head, body = table.all("thead")[0], table.all("tbody")[0]
                for row in body.all("tr"):
                    self.assertEqual(["row"], [each.attributes["scope"] for each in row.all("th")])
                    self.assertEqual(len(head.all("th")), len(row.all("th", "td")))
            for each in page.all("input"):
                self.assertIn(each.attributes["id"], [label.attributes["for"] for label in page.all("label")])
            names = [each.attributes["aria-label"] for each in page.all("nav")]
            self.assertEqual(len(names), len(set(names)))

    def test_more_parts_than_fit_are_told(self) -> None:
        self.assertIn("7 more are not shown.", self.read(replace(FULL, left_out=7)).text)
        self.assertIn("More parts than these are not shown.", self.read(replace(FULL, left_out=None)).text)


class AskersTests(SynchronousTestCase):
    """
    Who asked lately.
    """

    def setUp(self) -> None:
        self.time = 1000.0
        self.askers = Askers(lambda: self.time)

    def test_the_latest_come_first_and_repeats_are_counted(self) -> None:
        for client in ("one", "two", "one"):
            self.time += 1
            self.askers.note("team/app", client, "v1")
        expected = [AskedFor("one", "v1", 1003.0, 2), AskedFor("two", "v1", 1002.0, 1)]
        self.assertEqual(expected, self.askers.of("team/app"))
        self.assertEqual([], self.askers.of("team/none"))

    def test_does_not_grow_with_what_clients_ask_for(self) -> None:
        for number in range(3 * REPOSITORIES):
            for client in range(3 * EACH):
                self.askers.note(f"team/app{number}", f"{client}", "x" * 10_000)
        rows = list(self.askers._rows.values())  # noqa: SLF001
        self.assertEqual((REPOSITORIES, {EACH}), (len(rows), {len(each) for each in rows}))
        self.assertEqual(f"{3 * EACH - 1}", self.askers.of(f"team/app{3 * REPOSITORIES - 1}")[0].client)

    def test_what_was_taken_can_be_added_elsewhere(self) -> None:
        other = Askers(lambda: 0.0)
        for _ in range(2):
            self.askers.note("team/app", "one", "v1")
            self.askers.note("team/base", "two", "v2")
            other.add(self.askers.take())
            self.time += 1
        self.assertEqual([AskedFor("one", "v1", 1001.0, 2)], other.of("team/app"))
        self.assertEqual([], self.askers.take())
