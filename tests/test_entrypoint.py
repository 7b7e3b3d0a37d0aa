"""
How a container starts the daemon: as root it drops its privileges first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.entrypoint import System, main

START = "/bin/twistd -n --pidfile= ecr-proxy"


class ExecutedError(Exception):
    """
    Another program runs in this process's place.
    """


class EntrypointTests(SynchronousTestCase):
    """
    The steps and their order.
    """

    def setUp(self) -> None:
        home = TemporaryDirectory()
        self.addCleanup(home.cleanup)
        self.cache = Path(home.name) / "cache"
        self.done: list[str] = []
        self.refused: OSError | None = None
        self.about_to: Callable[[], object] = lambda: None

    def chown(self, file: int) -> None:
        if self.refused is not None:
            raise self.refused
        self.about_to()
        self.done.append(self.name_of(os.fstat(file)))

    def name_of(self, status: os.stat_result) -> str:
        """
        Find the name of a file.
        """
        every = (self.cache.parent, *self.cache.parent.rglob("*"))
        return next(str(each) for each in every if os.path.samestat(each.lstat(), status))

    def execute(self, program: str, words: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
        self.done.append(" ".join(words))
        raise ExecutedError

    def start(self, *arguments: str, uid: int = 0) -> None:
        system = System(uid, self.chown, lambda: self.done.append("became another"), self.execute)
        main(arguments, {"PROXY_CACHE_DIR": str(self.cache)}, "/bin/twistd", system)

    def test_as_root_the_directory_is_given_away_then_all_rights_then_the_daemon_starts(self) -> None:
        """
        The directory itself after its content: an interrupted run starts again.
        """
        (self.cache / "content").mkdir(parents=True)
        (self.cache / "content" / "file").touch()
        with self.assertRaises(ExecutedError):
            self.start("--port=80")
        cache = str(self.cache)
        self.assertEqual(
            [f"{cache}/content/file", f"{cache}/content", cache, "became another", f"{START} --port=80"],
            self.done,
        )

    def test_a_directory_that_is_not_there_is_made(self) -> None:
        with self.assertRaises(ExecutedError):
            self.start()
        self.assertTrue(self.cache.is_dir())

    def test_links_and_files_that_have_other_names_are_left_alone(self) -> None:
        """
        A user with write access there could have other files given away.
        """
        self.cache.mkdir()
        elsewhere = self.cache.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "private").touch()
        os.link(elsewhere / "private", self.cache / "hard")
        (self.cache / "soft").symlink_to(elsewhere / "private")
        (self.cache / "folder").symlink_to(elsewhere)
        os.mkfifo(self.cache / "pipe")
        with self.assertRaises(ExecutedError):
            self.start()
        self.assertEqual([str(self.cache), "became another"], self.done[:-1])

    def test_a_file_that_is_replaced_by_a_link_meanwhile_is_left_alone(self) -> None:
        """
        The inspected file is the one whose owner changes, wherever it is by then.
        """
        self.cache.mkdir()
        file, elsewhere = self.cache / "file", self.cache.parent / "elsewhere"
        file.touch()
        elsewhere.touch()

        def replace() -> None:
            if file.exists():
                file.rename(self.cache / "moved")
                os.link(elsewhere, file)
                self.about_to = lambda: None

        self.about_to = replace
        with self.assertRaises(ExecutedError):
            self.start()
        self.assertEqual([str(self.cache / "moved"), str(self.cache), "became another"], self.done[:-1])

    def test_without_the_right_to_it_root_is_told_what_to_do(self) -> None:
        """
        As with C{--cap-drop ALL}: one line, and no daemon that runs as root.
        """
        self.refused = PermissionError(1, "Operation not permitted")
        with self.assertRaises(SystemExit) as ended:
            self.start()
        self.assertIn("add --user 65532:65532", str(ended.exception.code))
        self.assertEqual([], self.done)

    def test_anybody_else_only_starts_the_daemon(self) -> None:
        with self.assertRaises(ExecutedError):
            self.start(uid=1000)
        self.assertEqual([START], self.done)
        self.assertFalse(self.cache.exists())
