"""
What was purged is forgotten in memory, too.
"""

from __future__ import annotations

from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.inventory import Inventory
from tests.daemon import DaemonTestCase, noise

TEAMS = ("a", "b")


class KeyedTests(DaemonTestCase):
    """
    With a PROXY_CACHE_KEY that tells clients apart.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.start(cache_key="$uri$http_x_team")
        self.image = self.standin.push_image("team/app", "latest")
        self.manifest = f"/v2/team/app/manifests/{self.image.digest}"

    def words(self, path: str) -> list[str | None]:
        """
        Tell how each team's request is answered.
        """
        return [self.get(path, X_Team=team).cache for team in TEAMS]

    def purge(self, *keys: EntryKey) -> None:
        Inventory(self.daemon.store).remove(keys, [])
        self.pass_time(1)

    def test_what_a_manifest_tells_is_forgotten_whatever_the_key(self) -> None:
        """
        Of the manifest itself, and of a small blob that it lists, which memory has read from the index.
        """
        self.get("/v2/team/app/manifests/latest", X_Team="a")
        self.start(cache_key="$uri$http_x_team")
        paths = [f"/v2/team/app/blobs/{self.image.config}", self.manifest]
        self.get(paths[0], X_Team="a")  # it is fetched
        self.assertEqual([["HIT", "HIT"]] * 2, [self.words(path) for path in paths])
        self.purge(*self.entries())
        self.assertEqual(["REVALIDATED"] * 2, [self.get(path, X_Team="b").cache for path in paths])

    def test_what_the_index_keeps_no_more_is_forgotten_with_what_it_keeps(self) -> None:
        """
        It keeps a number of keys for each digest, and who purges knows of those alone.
        """
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('blob', 1000))}"
        for _ in TEAMS:
            self.words(path)
        kept, lost = (key for key in self.entries() if key.reference in path)
        self.index.forget(lost)
        self.purge(kept)
        self.assertEqual(["REVALIDATED"] * 2, self.words(path))
