"""
The modules depend on each other as docs/internals/modules.rst says, and stay small enough to read.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import ecrproxy

PACKAGE = Path(ecrproxy.__file__).parent
OURS = "ecrproxy."

# room (a package or a module by itself): what of ours it may import, rooms or single modules.
# Anything else may import only from the same room. tap, serving and command may import everything.
ARROWS: dict[str, set[str]] = {
    "access": {
        "addresses",
        "files",
        "flights",
        "oci",
        "ordering",
        "periodic",
        "reasons",
        "shares",
        "threads",
    },
    "admin": {
        "access.browsers",
        "access.limits",
        "cache.condition",
        "cache.entries",
        "askers",
        "cache.cells",
        "cache.contents",
        "cache.inventory",
        "cache.janitor",
        "cache.repository_rows",
        "cache.store",
        "cache.upkeep",
        "endpoint_string",
        "failures",
        "files",
        "http.request",
        "http.site",
        "http.answering",
        "identity",
        "logs.repeats",
        "metrics",
        "oci",
        "periodic",
        "proxy",
        "prefetch_progress",
        "ranking",
        "readiness",
        "registry",
        "settings.config",
        "settings.registry_table",
        "threads",
        "transfer.response_body",
    },
    "answers": {"cache", "oci", "reasons", "transfer.download", "transfer.passing"},
    "cache": {"buffers", "identity", "oci", "periodic", "threads", "documents"},
    "cached": {
        "answers",
        "cache",
        "flights",
        "identity",
        "oci",
        "ordering",
        "reasons",
        "threads",
        "tracing",
        "documents",
    },
    "catalog": {
        "flights",
        "oci",
        "reasons",
        "registry.aws",
    },
    "daemon": {
        "access.limits",
        "addresses",
        "buffers",
        "endpoint_string",
        "files",
        "logs.writing",
        "periodic",
        "readiness",
        "settings.complaints",
        "settings.config",
        "settings.table",
        "settings.registry_table",
        "threads",
        "thread_pools",
    },
    "files": {"threads"},
    "healthcheck": {"endpoint_string"},
    "http": {
        "registry.tag_lists",
        "access",
        "addresses",
        "answers",
        "byte_ranges",
        "cache.cache_key",
        "cache.content",
        "cache.memory",
        "cached",
        "daemon.ending",
        "failures",
        "metrics",
        "oci",
        "proxy",
        "ranking",
        "readiness",
        "reasons",
        "registries",
        "request_id",
        "stopwatch",
        "threads",
        "transfer",
        "world",
        "tracing",
    },
    "metrics": {"askers", "failures", "ranking"},
    "lists": {
        "registry.tag_lists",
        "registry.unavailable",
        "answers",
        "cache.memory",
        "flights",
        "oci",
        "reasons",
        "registry.refusals",
        "registry.upstream",
        "stale",
    },
    "manifests": {
        "answers",
        "cache.entries",
        "cached",
        "documents",
        "flights",
        "manifest_requests",
        "oci",
        "reasons",
        "registry.race",
        "registry.unavailable",
        "registry.upstream",
        "stale",
        "threads",
    },
    "manifest_requests": {
        "answers",
        "cache.memory",
        "cached",
        "flights",
        "identity",
        "oci",
        "reasons",
        "registry.race",
        "registry.unavailable",
        "registry.upstream",
        "threads",
        "documents",
    },
    "otel": {"spans", "threads", "tracing"},
    "spans": {"tracing"},
    "flights": {"tracing"},
    "pulls": {"images", "oci", "tracing"},
    "images": {"identity", "oci", "cached", "documents"},
    "thread_pools": {"threads"},
    "documents": {"oci"},
    "platforms": {"documents", "oci"},
    "prefetching": {
        "answers",
        "cache.cache_key",
        "cache.content",
        "documents",
        "identity",
        "oci",
        "platforms",
        "prefetch_progress",
        "proxy",
        "transfer.download",
        "transfer.lane",
        "transfer.passing",
        "world",
    },
    "blobs": {
        "registry.unavailable",
        "answers",
        "byte_ranges",
        "cache",
        "cached",
        "flights",
        "identity",
        "oci",
        "reading_ahead",
        "reasons",
        "registry.bucket",
        "registry.race",
        "registry.upstream",
        "threads",
        "transfer",
        "tracing",
    },
    "proxy": {
        "answers",
        "blobs",
        "cached",
        "lists",
        "manifests",
        "oci",
        "reading_ahead",
        "registry.upstream",
        "threads",
        "transfer",
    },
    "reading_ahead": {
        "registry.unavailable",
        "answers",
        "cached",
        "identity",
        "oci",
        "threads",
        "transfer.download",
        "images",
        "pulls",
        "registry.queue",
        "tracing",
    },
    "registries": {
        "identity",
        "oci",
        "reasons",
        "settings.registry_table",
        "settings.endpoints",
    },
    "upstreams": {"admin.status", "identity", "oci", "registries", "registry.upstream"},
    "world": {
        "access.namespaces",
        "admin.status",
        "catalog",
        "identity",
        "oci",
        "registries",
        "registry.upstream",
        "upstreams",
    },
    "stale": {"registry.unavailable", "flights", "oci", "reasons"},
    "logs": {"http.access_log", "request_id"},
    "oci": {"identity", "reasons"},
    "registry": {
        "access.turns",
        "addresses",
        "cache.memory",
        "files",
        "flights",
        "identity",
        "metrics",
        "oci",
        "periodic",
        "reasons",
        "threads",
        "tracing",
        "documents",
    },
    "settings": {
        "access.limits",
        "addresses",
        "cache.cache_key",
        "cores",
        "endpoint_string",
        "files",
        "identity",
        "registry.quotas",
        "shares",
    },
    "transfer": {
        "access.limits",
        "buffers",
        "byte_ranges",
        "cache",
        "oci",
        "reasons",
        "stopwatch",
        "threads",
        "tracing",
    },
    "workers": {
        "admin.incidents",
        "admin.snapshot",
        "daemon.inherited",
        "identity",
        "metrics",
        "prefetch_progress",
        "periodic",
        "readiness",
        "threads",
        "admin.merging",
    },
}
OUTERMOST = {"tap", "process_wiring", "operator_wiring", "reload_wiring", "serving", "upstream_wiring", "command"}
TYPES_ONLY = {
    ("http.channel", "daemon.ending"),
    ("access.clients", "access.passwords"),
    ("cache.condition", "cache.store"),
    ("cache.condition", "threads"),
    ("cache.directory", "oci"),
    ("cache.proofs", "oci"),
    ("cache.directory", "cache.index"),
    ("cache.writer", "cache.claim"),
    ("cache.writer", "oci"),
    ("transfer.sources", "cache.store"),
    ("transfer.sources", "cache.verification"),
    ("cache.janitor", "cache.store"),
    ("cache.verification", "threads"),
}
# what only some modules deal with
RESERVED = {
    "treq": {"registry.wire"},
    "botocore": {"command.checkup.aws", "registry.aws"},
    "bcrypt": {"access.htpasswd"},
    "opentelemetry": {"spans"},
    "prometheus_client": {"metrics"},
    "twisted.web.resource": {"admin.port", "http.answering", "http.site"},
    "twisted.internet.reactor": {"tap"},
    "twisted.internet.task.LoopingCall": {"periodic"},  # otherwise it ends with the first call that fails
}
LONGEST = 45
LONGEST_MODULE = 400


@functools.cache
def modules() -> dict[str, ast.Module]:
    """
    Parse the package; the names are those within it, as C{cache.store}.
    """
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(name.parts): ast.parse(path.read_text("utf-8")) for name, path in paths.items()}


def room(name: str) -> str:
    """
    Return the room of a module.
    """
    return name.partition(".")[0]


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """
    Find what is imported only for the type checker.
    """
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }


def imported(tree: ast.Module, *, at_run_time: bool = False) -> Iterator[str]:
    """
    Return everything that a module imports, anywhere in it, both as the module and as the name in it.
    """
    left_out = for_types_only(tree) if at_run_time else set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{each.name}" for each in node.names)


def ours(tree: ast.Module, *, at_run_time: bool = False) -> set[str]:
    """
    Return which of our modules a module imports.
    """
    found = imported(tree, at_run_time=at_run_time)
    return {name.removeprefix(OURS) for name in found if name.startswith(OURS)} & modules().keys()


def definitions(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """
    Find all classes and functions.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def described(node: ast.Module | ast.ClassDef) -> bool:
    """
    Return True if a definition has a docstring with text.
    """
    return bool((ast.get_docstring(node) or "").strip())


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """
    Count a function's lines without its docstring.
    """
    first = function.body[0]
    described = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if described else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


class ArchitectureTests(SynchronousTestCase):
    """
    The rules for the package hold.
    """

    def setUp(self) -> None:
        self.modules = modules()

    def test_what_the_rules_speak_of_is_there(self) -> None:
        """
        Rooms and modules that the rules name exist.
        """
        there = self.modules.keys() | {room(name) for name in self.modules}
        self.assertEqual(set(), set(ARROWS).union(*ARROWS.values(), *RESERVED.values(), *TYPES_ONLY) - there)

    def test_imports_follow_the_arrows(self) -> None:
        """
        Inner rooms don't know outer ones.
        """
        wrong = {
            f"{name} -> {other}"
            for name, tree in self.modules.items()
            if room(name) not in OUTERMOST
            for other in ours(tree)
            if room(other) != room(name) and not {other, room(other)} & ARROWS.get(room(name), set())
        }
        self.assertEqual(set(), wrong)

    def test_each_arrow_is_followed_by_an_import(self) -> None:
        used = {(room(name), each) for name, tree in self.modules.items() for o in ours(tree) for each in (o, room(o))}
        self.assertEqual(set(), {(name, other) for name, others in ARROWS.items() for other in others} - used)

    def test_imports_go_in_no_circle(self) -> None:
        """
        Each module can be read after its imports, also those for types.
        """
        left = {name: ours(tree) for name, tree in self.modules.items()}
        while free := {name for name, others in left.items() if not others & left.keys()}:
            left = {name: others for name, others in left.items() if name not in free}
        self.assertEqual({}, left)

    def test_what_is_known_for_its_types_is_not_imported_at_run_time(self) -> None:
        """
        Such modules can be read, and tested, without the other.
        """
        wrong = {(name, other) for name, other in TYPES_ONLY if other in ours(self.modules[name], at_run_time=True)}
        self.assertEqual(set(), wrong)

    def test_imports_are_absolute(self) -> None:
        """
        A module has the same name everywhere.
        """
        wrong = {name for name, tree in self.modules.items() if any(each.startswith(".") for each in imported(tree))}
        self.assertEqual(set(), wrong)

    def test_each_large_dependency_is_met_in_one_place(self) -> None:
        """
        Only wire uses treq, only aws botocore, only spans OpenTelemetry, only port, answering and site resources,
        only tap the global reactor.
        """
        wrong = {
            f"{name} imports {each}"
            for name, tree in self.modules.items()
            for each in imported(tree)
            for prefix, owners in RESERVED.items()
            if name not in owners and (each == prefix or each.startswith(f"{prefix}."))
        }
        self.assertEqual(set(), wrong)

    def test_the_environment_is_read_in_one_place(self) -> None:
        """
        Only tap reads os.environ; processes passes it on; health check, entrypoint and command are separate programs.
        """
        readers = {
            name
            for name, tree in self.modules.items()
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
            or (isinstance(node, ast.ImportFrom) and node.module == "os")
        }
        self.assertEqual(set(), readers - {"tap", "workers.processes", "healthcheck", "entrypoint", "command.program"})

    def test_all_that_is_public_is_described(self) -> None:
        """
        Modules and public classes have a docstring.
        """
        wrong = [name for name, tree in self.modules.items() if not described(tree)]
        wrong += [
            f"{name}.{node.name}"
            for name, tree in self.modules.items()
            for node in definitions(tree)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not described(node)
        ]
        self.assertEqual([], wrong)

    def test_functions_are_short(self) -> None:
        """
        No function has more lines than fit a screen.
        """
        wrong = {
            f"{name}.{node.name}": lines_of_code(node)
            for name, tree in self.modules.items()
            for node in definitions(tree)
            if not isinstance(node, ast.ClassDef) and lines_of_code(node) > LONGEST
        }
        self.assertEqual({}, wrong)

    def test_modules_can_be_read_in_one_sitting(self) -> None:
        long = [
            path.name for path in PACKAGE.rglob("*.py") if len(path.read_text("utf-8").splitlines()) > LONGEST_MODULE
        ]
        self.assertEqual([], long)

    def test_one_name_means_one_class(self) -> None:
        named = Counter(
            node.name
            for tree in self.modules.values()
            for node in tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        )
        self.assertEqual([], [name for name, count in named.items() if count > 1])

    def test_modules_are_called_by_what_they_are(self) -> None:
        """
        There is no module for odds and ends.
        """
        words = {word for name in self.modules for word in name.split(".")}
        self.assertEqual(set(), words & {"utils", "util", "helpers", "common", "errors", "interfaces"})
