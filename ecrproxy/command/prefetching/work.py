"""
One run of C{ecr-proxy prefetch}: which images, through which daemon, and the results.
"""

from __future__ import annotations

import platform
import random
import re
import ssl
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ecrproxy.command.prefetching import PASSWORD
from ecrproxy.command.prefetching.crew import Crew
from ecrproxy.command.prefetching.documents import images_in
from ecrproxy.command.prefetching.door import Ask, Door, docker_login, own_context, place_of
from ecrproxy.command.prefetching.images import ForeignImageError, WantedImage, listed_images, parse_image
from ecrproxy.command.prefetching.pulling import MOST_TOLD, Hands, Plan, Puller, PullError
from ecrproxy.command.subcommand import FINE, MISUSED, WRONG, CommandError, Invocation
from ecrproxy.command.terminal import Progress, Terminal, counted, size_in_words
from ecrproxy.healthcheck import place_from
from ecrproxy.oci import Route
from ecrproxy.platforms import Platform
from ecrproxy.registries import Registries
from ecrproxy.settings.config import registries_of

MOST_JOBS: Final = 64


@dataclass
class Work:
    """
    One image, and its result.

    @ivar problem: why it could not be pulled; None if it was.
    @ivar waiting: its blobs that have not been pulled yet.
    """

    image: WantedImage
    plan: Plan | None = None
    problem: str = ""
    brought: int = 0
    there: int = 0
    waiting: set[Route] = field(default_factory=set)


def run(call: Invocation, ask_of: Callable[[Door], Ask] = lambda door: door.ask) -> int:
    """
    Run the subcommand; return the exit status.
    """
    options, terminal = call.options, call.terminal
    platforms = _platforms(options)
    jobs = int(options.jobs) if re.fullmatch(r"[0-9]{1,9}", options.jobs) else 0
    if not 0 < jobs <= MOST_JOBS:
        raise CommandError(f"--jobs={options.jobs!r}: give a number from 1 to {MOST_JOBS}", MISUSED)
    door, hosts = _door(call)
    works = _works(call, hosts, _registries(call))
    crew, seconds = Crew(jobs), call.world.seconds
    began = seconds()
    with Progress(terminal, "prefetch", None, seconds) as progress:
        hands = Hands(
            ask_of(door), seconds, call.world.sleep, random.random, lambda line: crew.tell(lambda: progress.say(line))
        )
        puller = Puller(hands, platforms, lambda size: crew.tell(lambda: progress.advance(size)))
        _plan(works, crew, puller, progress)
        brought, there = _bring(works, crew, puller, progress)
    if options.json:
        terminal.tell(_document(works))
    else:
        sizes = f"{size_in_words(brought)} downloaded, {size_in_words(there)} cached"
        _report(works, terminal, f"{sizes}; {seconds() - began:.0f} s")
    return WRONG if any(each.problem for each in works) else FINE


def _platforms(options: Namespace) -> Sequence[Platform]:
    """
    Return the requested platforms; empty for all.
    """
    if options.all_platforms:
        if options.platform:
            raise CommandError("--platform and --all-platforms contradict each other; give one of them", MISUSED)
        return []
    try:
        return [Platform.parse(text) for text in options.platform] or [Platform.of_machine(platform.machine())]
    except ValueError as problem:
        raise CommandError(f"--platform: {problem}", MISUSED) from None


def _door(call: Invocation) -> tuple[Door, set[str]]:
    """
    Return the daemon to use, and the host names of the proxy.
    """
    options, settings = call.options, call.settings
    hosts = {each.lower() for each in options.host}
    try:
        if options.proxy_url is not None:
            place, name = place_of(options.proxy_url)
            hosts.add(name)
        else:
            place = place_from(_as_variables(settings))
            port = "" if isinstance(place.address, str) else f":{place.address[1]}"
            name = f"localhost{port}"
            hosts |= {f"{host}{port}" for host in ("localhost", "127.0.0.1", "[::1]")}
    except (ValueError, IndexError) as problem:
        raise CommandError(f"{problem}; give --proxy-url", MISUSED) from None
    context = _context(options, settings["ssl_certificate"]) if place.secure else None
    return Door(place, name, context, _login(call, name)), hosts


def _as_variables(settings: Any) -> dict[str, str]:  # noqa: ANN401
    """
    Convert settings to variables for L{healthcheck}.
    """
    return {
        "PROXY_LISTEN": " ".join(map(str, settings["listen"])),
        "PROXY_PORT": str(settings["port"]),
        "PROXY_SSL_KEY": settings["ssl_certificate"] or "",
    }


def _context(options: Namespace, certificate: str | None) -> ssl.SSLContext:
    """
    Make the TLS context: it trusts a CA, or on the daemon's machine its own certificate.
    """
    own = options.proxy_url is None and options.ca is None and certificate is not None
    try:
        context = own_context(certificate or "") if own else ssl.create_default_context(cafile=options.ca)
        if options.client_certificate is not None:
            context.load_cert_chain(options.client_certificate)
    except OSError as problem:
        named = options.client_certificate if "chain" in str(problem) else options.ca or certificate
        raise CommandError(f"{named}: {problem.strerror or 'holds no certificate that can be used'}", MISUSED) from None
    return context


def _login(call: Invocation, host: str) -> tuple[str, str] | None:
    variables = call.world.variables
    if call.options.user is not None:
        if not variables.get(PASSWORD):
            raise CommandError(f"--user needs a password: set {PASSWORD}", MISUSED)
        return call.options.user, variables[PASSWORD]
    folder = variables.get("DOCKER_CONFIG") or f"{variables.get('HOME', '')}/.docker"
    try:
        return docker_login(Path(folder, "config.json").read_text("utf-8"), host)
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None
    except OSError:
        return None


def _registries(call: Invocation) -> Registries | None:
    """
    Return the registries that the daemon serves, as far as they are configured.
    """
    tables = registries_of(call.flags, call.world.variables, call.file)
    return Registries(tables, call.settings["registry_aliases"] or ()) if tables else None


def _works(call: Invocation, hosts: set[str], registries: Registries | None) -> list[Work]:
    """
    Return the requested images, without duplicates.
    """
    works: dict[Route, Work] = {}
    named, wrong = list(_named(call)), []
    if not named:
        raise CommandError("no images given; see ecr-proxy prefetch --help", MISUSED)
    for text, bare in named:
        try:
            image = parse_image(text, hosts, registries, bare=bare)
            works.setdefault(image.route, Work(image))
        except ForeignImageError as problem:
            if bare:
                wrong.append(f"{text}: {problem}")
            else:
                call.terminal.say(f"{text}: skipped: {problem}")
        except ValueError as problem:
            wrong.append(f"{text}: {problem}")
    if wrong:
        raise CommandError("; ".join(wrong), MISUSED)
    return list(works.values())


def _named(call: Invocation) -> Iterator[tuple[str, bool]]:
    """
    Yield image names, each with True if a name without a host belongs to the default registry.
    """
    yield from ((text, True) for text in call.options.images)
    for path in call.options.file:
        yield from ((text, True) for text in listed_images(_read(call, path)))
    for path in call.options.manifest:
        try:
            yield from ((text, False) for text in images_in(_read(call, path), call.world.variables))
        except ValueError as problem:
            raise CommandError(f"{path}: {problem}", MISUSED) from None


def _read(call: Invocation, path: str) -> str:
    if path == "-":
        return call.terminal.stdin.read()
    try:
        return Path(path).read_text("utf-8")
    except OSError as problem:
        raise CommandError(f"{path}: {problem.strerror}", MISUSED) from None
    except ValueError:
        raise CommandError(f"{path}: not a text file", MISUSED) from None


def _plan(works: Sequence[Work], crew: Crew, puller: Puller, progress: Progress) -> None:
    """
    Pull all manifests, which determines what else to pull.
    """
    for work, outcome in crew.each(works, lambda work: puller.plan(work.image)):
        if isinstance(outcome, Exception):
            _fail(work, outcome, progress)
        else:
            work.plan, work.waiting = outcome, set(outcome.blobs)
            if outcome.missing:
                _fail(work, PullError(_incomplete(outcome)), progress)


def _bring(works: Sequence[Work], crew: Crew, puller: Puller, progress: Progress) -> tuple[int, int]:
    """
    Pull all blobs, those of the first image first. A blob that several images of a repository share is pulled once.

    @return: bytes transferred, and bytes that were cached.
    """
    brought = there = 0
    blobs = {route: size for work in works if work.plan is not None for route, size in work.plan.blobs.items()}
    progress.total = sum(blobs.values())
    for (route, size), outcome in crew.each(list(blobs.items()), lambda blob: puller.bring(*blob)):
        if outcome is True:
            brought += size
        elif outcome is False:
            there += size
            progress.total -= size
        for work in works:
            if route not in work.waiting:
                continue
            work.waiting.discard(route)
            if isinstance(outcome, Exception):
                _fail(work, outcome, progress)
            elif outcome:
                work.brought += size
            else:
                work.there += size
            if not work.waiting and not work.problem:
                sizes = f"{size_in_words(work.brought)} downloaded, {size_in_words(work.there)} cached"
                progress.say(f"{work.image.name}: {sizes}")
    return brought, there


def _incomplete(plan: Plan) -> str:
    """
    Say which of an image's manifests are missing.
    """
    named = "; ".join(plan.missing[:MOST_TOLD])
    more = len(plan.missing) - MOST_TOLD
    of_all = f"{len(plan.missing)} of {plan.manifests + len(plan.missing)} manifests can't be pulled, the rest is"
    return f"{of_all}: {named}" + (f"; and {more} more" if more > 0 else "")


def _fail(work: Work, problem: Exception, progress: Progress) -> None:
    if not isinstance(problem, PullError):
        raise problem
    if not work.problem:
        work.problem = str(problem)
        progress.say(f"{work.image.name}: failed: {problem}")


def _document(works: Sequence[Work]) -> dict[str, Any]:
    """
    Return the result of each image, for JSON output.
    """
    told = [
        {
            "image": each.image.name,
            "ok": not each.problem,
            "problem": each.problem or None,
            "brought": each.brought,
            "there": each.there,
        }
        for each in works
    ]
    return {"images": told, "failed": sum(1 for each in works if each.problem)}


def _report(works: Sequence[Work], terminal: Terminal, sizes: str) -> None:
    """
    Print the results.
    """
    failed = [work for work in works if work.problem]
    terminal.print(f"{counted(len(works), 'image')}, {len(failed)} failed; {sizes}")
    for each in failed:
        terminal.print(f"failed: {each.image.name}: {each.problem}")
