"""
When ECR denies the proxy everything, and what does not count as that.
"""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.registry.denials import DENIALS, KEPT, REPOSITORIES, Denials
from tests.daemon import DaemonTestCase


class DenialsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.denials = Denials()

    def test_of_repositories_that_were_never_granted_say_nothing_once_any_was(self) -> None:
        self.denials.granted("team/app")
        for number in range(100):
            self.denials.denied(f"guessed/{number}")
        self.assertIsNone(self.denials.problem())

    def test_of_all_that_was_granted_are_a_problem_until_an_answer(self) -> None:
        for granted in (["a"], ["a", "b"], list("abcdef")):
            for name in granted:
                self.denials.granted(name)
            for name in granted[:REPOSITORIES]:
                self.assertIsNone(self.denials.problem())
                self.denials.denied(name)
            self.assertIn("about a", str(self.denials.problem()))
            self.denials.granted("a")
            self.assertIsNone(self.denials.problem())

    def test_of_one_repository_again_and_again_are_no_problem(self) -> None:
        for name in "abc":
            self.denials.granted(name)
        for _ in range(100):
            self.denials.denied("a")
        self.assertIsNone(self.denials.problem())

    def test_in_a_row_are_a_problem_if_nothing_was_ever_granted(self) -> None:
        for number in range(DENIALS):
            self.assertIsNone(self.denials.problem())
            self.denials.denied("ab"[number % 2])
        self.assertIn("denies every question about a and b: HTTP 403", str(self.denials.problem()))

    def test_of_one_repository_are_no_problem_before_others_are_asked_for(self) -> None:
        """
        After a start, with everything else in the cache: one Deployment with a forbidden image is no outage.
        """
        for _ in range(100):
            self.denials.denied("forbidden/app")
        self.assertIsNone(self.denials.problem())
        self.denials.denied("team/app")
        self.assertIn("forbidden/app and team/app", str(self.denials.problem()))

    def test_what_is_remembered_is_bounded(self) -> None:
        for number in range(KEPT + 10):
            self.denials.granted(str(number))
        for number in range(10):
            self.denials.denied(str(number))
        self.assertIsNone(self.denials.problem())


class DeniedTests(DaemonTestCase):
    def test_readyz_says_that_nothing_can_be_fetched_while_iam_denies_everything(self) -> None:
        """
        And again that it can, once ECR has granted something.
        """
        paths = [f"/v2/team/app{number}/manifests/latest" for number in range(5)]
        for path in paths:
            self.standin.push_image(path.split("/manifests")[0].removeprefix("/v2/"), "latest")
            self.assertEqual(200, self.get(path).code)
        denial = self.standin.deny()
        self.assertEqual({403}, {self.get(path).code for path in paths})
        self.pass_time(FRESH_SECONDS)
        said = json.loads(self.get("/readyz").body)
        self.assertEqual((True, False), (said["can_serve"], said["can_fetch"]))
        self.assertIn("check the IAM policy", said["reasons"][0])
        denial.remove()
        self.assertEqual(200, self.get(paths[0]).code)
        self.assertTrue(json.loads(self.get("/readyz").body)["can_fetch"])

    def test_what_iam_says_of_lists_says_nothing_about_pulls(self) -> None:
        """
        The documented policy for pulls has no ListImages, and registries of others may deny it: a program that lists
        the tags of many repositories is no outage, nor does a list that is granted hide one.
        """
        names = [f"team/app{number}" for number in range(DENIALS)]
        for name in names:
            self.standin.push_image(name, "latest")
        for pulled in (False, True):
            denial = self.standin.deny("ecr:ListImages", path_contains="/tags/list")
            self.assertEqual({403}, {self.get(f"/v2/{name}/tags/list").code for name in names})
            self.assertIsNone(self.daemon.circuit.problem(), f"pulled before: {pulled}")
            denial.remove()
            self.assertEqual({200}, {self.get(f"/v2/{name}/manifests/latest").code for name in names})
            self.pass_time(1)
        self.standin.deny(path_contains="/manifests/")
        for name in names:
            self.assertEqual(403, self.get(f"/v2/{name}/manifests/latest").code)
            self.assertEqual(200, self.get(f"/v2/{name}/tags/list").code)
        self.assertIn("ECR denies every question", str(self.daemon.circuit.problem()))
