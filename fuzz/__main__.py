"""
Run one target: C{python -m fuzz TARGET [CORPUS...] [libFuzzer's options]}.

- C{front}: a client's bytes on a connection to the whole daemon, in memory.
- C{back}: upstream's bytes as the answer to the daemon, in memory.
- C{ways}: a story of requests and of what happens between them, with the hot path and without.
- C{parsers}: all other parsers of text or bytes: routes, ranges, settings, manifests, entries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import atheris

with atheris.instrument_imports(include=["ecrproxy"]):
    from fuzz.parsers import parse
    from fuzz.wires import answer, ask
    from tests.both_ways import compare


def ways(data: bytes) -> None:
    """
    Run a story both ways.
    """
    compare(data)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"front": ask, "back": answer, "parsers": parse, "ways": ways}


def main() -> None:
    """
    Pass the rest of the command line to libFuzzer.
    """
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
