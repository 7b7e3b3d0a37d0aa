"""
Completion scripts: generated from the parser, for each shell.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.asking import DaemonResponse
from ecrproxy.command.completion import MOST
from ecrproxy.command.program import SUBCOMMANDS, make_parser
from ecrproxy.command.shells import SHELLS, Value, Word, for_bash, for_fish, for_zsh, words_of
from ecrproxy.command.subcommand import Subcommand
from ecrproxy.command.terminal import Terminal
from tests.caller import Caller


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add one argument of each kind.
    """
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="what [it] is: 100%% of it")
    parser.add_argument("-f", "--file", metavar="LIST", help="it's a file; or more [default: none]")
    parser.add_argument("--how", choices=["fast", "slow"], help="how")
    parser.add_argument("--number", metavar="NUMBER", help="a number")
    parser.add_argument("--json", action="store_true", help="JSON")


ONE = Subcommand(
    name="one", summary="do one's thing", description="", examples=(), add_arguments=add_arguments, run=lambda _: 0
)


def words(*subcommands: Subcommand) -> list[Word]:
    """
    Read subcommands.
    """
    caller = Caller()
    return words_of(make_parser(Terminal(caller.stdin, caller.stdout, caller.stderr), subcommands))


class WordsTests(SynchronousTestCase):
    """
    What is read from the parser.
    """

    def test_flags_choices_and_kinds_of_values_are_read(self) -> None:
        """
        From the help, without what is too long for a menu.
        """
        program, one = words(ONE)
        self.assertEqual(["-h", "--version"], [each.flags[0] for each in program.flags])
        told = {each.flags[-1]: (each.value, list(each.choices)) for each in one.flags}
        self.assertEqual(
            {
                "--help": (Value.NONE, []),
                "--file": (Value.FILE, []),
                "--how": (Value.WORD, ["fast", "slow"]),
                "--number": (Value.WORD, []),
                "--json": (Value.NONE, []),
            },
            told,
        )
        self.assertEqual(["it's a file"], [each.help for each in one.flags if "--file" in each.flags])
        self.assertIs(Value.REPOSITORY, one.rest.value if one.rest is not None else None)

    def test_all_subcommands_are_there(self) -> None:
        """
        A new subcommand is completed without further work, and settings that are paths complete as files.
        """
        found = {word.name: word for word in words(*SUBCOMMANDS)}
        self.assertEqual({"", *(each.name for each in SUBCOMMANDS)}, set(found))
        files = [each for each in found["doctor"].flags if each.value is Value.FILE]
        self.assertIn("--cache-dir", [flag for each in files for flag in each.flags])


class ScriptTests(SynchronousTestCase):
    """
    The scripts. tests/e2e/test_completion.py runs them in the shells.
    """

    def test_each_has_all_subcommands_and_flags(self) -> None:
        """
        Each comes from the command itself.
        """
        caller = Caller()
        for shell in SHELLS:
            script = caller.call("completion", shell)
            self.assertEqual(0, caller.status)
            for word in words(*SUBCOMMANDS):
                self.assertIn(word.name, script)
                for flag in (flag for each in word.flags for flag in each.flags):
                    self.assertIn(flag.lstrip("-") if shell == "fish" else flag, script)

    def test_quotes_and_brackets_of_the_help_do_no_harm(self) -> None:
        """
        Each shell has its own quoting.
        """
        one = words(replace(ONE, summary="what's [this]: it"))
        self.assertIn(r"'one:what'\''s [this]: it'", for_zsh(one))
        self.assertIn(r"[it'\''s a file]", for_zsh(one))
        self.assertIn(r"-d 'what\'s [this]: it'", for_fish(one))
        self.assertIn("'one --how') words='fast slow' ;;", for_bash(one))

    def test_another_shell_is_refused(self) -> None:
        """
        With a list of the supported ones.
        """
        caller = Caller()
        caller.call("completion", "tcsh")
        self.assertEqual(2, caller.status)
        self.assertIn("fish", caller.complaint)


class RepositoriesTests(SynchronousTestCase):
    """
    The names that the scripts ask for.
    """

    def names(self, *repositories: str) -> list[str]:
        """
        Ask a daemon that has entries of these repositories.
        """
        lines = [json.dumps({"repository": each}).encode() + b"\n" for each in repositories]

        def exchange(method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
            return DaemonResponse(200, [*lines, b'{"end": true}\n'])

        self.caller = Caller(exchange)
        return self.caller.call("completion", "repositories").splitlines()

    def test_each_is_told_once(self) -> None:
        """
        Sorted; names that would mean something to a shell are left out.
        """
        self.assertEqual(["team/a", "team/b"], self.names("team/b", "team/a", "team/b", "$(reboot)", "a b"))

    def test_nobody_waits_for_them(self) -> None:
        """
        A large cache lists only some; without a daemon there are none, and no error.
        """
        self.assertEqual(MOST, len(self.names(*(f"r{number}" for number in range(MOST * 2)))))
        caller = Caller()
        self.assertEqual("", caller.call("completion", "repositories"))
        self.assertEqual((0, ""), (caller.status, caller.complaint))
