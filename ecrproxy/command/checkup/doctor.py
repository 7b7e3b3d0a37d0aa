"""
One run of C{ecr-proxy doctor}: the checks, and their dependencies on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from ecrproxy import __version__
from ecrproxy.command.checkup import account, assumptions, metadata, names, ports
from ecrproxy.command.checkup.disk import judge_directory, judge_room
from ecrproxy.command.checkup.findings import (
    Check,
    Finding,
    Once,
    SkippedError,
    Verdict,
    brief,
    examine,
    failed,
    ok,
    skipped,
    warning,
)
from ecrproxy.command.checkup.hosts import Hosts
from ecrproxy.command.checkup.image import image_of
from ecrproxy.command.checkup.network import judge_clock, look_at_host
from ecrproxy.command.checkup.other_registry import look_at_registry
from ecrproxy.command.checkup.permissions import Trial
from ecrproxy.command.checkup.principals import Principals, without_role
from ecrproxy.command.checkup.questions import DoctorRequest, interview
from ecrproxy.command.checkup.reach import Contact, split
from ecrproxy.command.checkup.senses import Senses
from ecrproxy.command.checkup.settings import judge_files, look_at_files, look_at_settings
from ecrproxy.command.subcommand import FINE, MISUSED, WRONG, CommandError, Invocation
from ecrproxy.endpoint_string import parse_endpoint_string
from ecrproxy.registries import Registries
from ecrproxy.registry.guard import is_forbidden
from ecrproxy.settings.config import Config, given
from ecrproxy.settings.contradictions import load
from ecrproxy.settings.registry_table import RegistryTable


def run(call: Invocation, senses: Senses | None = None) -> int:
    """
    Run all checks; return the exit status.
    """
    senses = senses or Senses()
    limit = _seconds(call.options.seconds)
    if call.options.report is not None and call.options.image is None:
        raise CommandError("--report is about an image: give --image NAME:TAG", MISUSED)
    report_alone = call.options.report == "-"
    if report_alone and call.options.json:
        raise CommandError("--report=- and --json both want the standard output: give one of them a file", MISUSED)
    checks = Doctor(call, load(call.flags, call.world.variables, call.file), senses, limit).checks()
    found: list[Finding] = []
    width = max(map(len, [*(each.name for each in checks), *(assumptions.ASSUMPTIONS if call.options.image else ())]))
    for each in examine(checks, limit, call.world.seconds, senses.start):
        found.append(each)
        if not call.options.json and not report_alone:
            call.terminal.print(f"{each.verdict.value:<7}  {each.check:<{width}}  {each.said}")
            if each.advice:
                call.terminal.print(f"{'':<7}  {'':<{width}}  -> {each.advice}")
    if call.options.report is not None:
        report = assumptions.report({each.check: each for each in found}, __version__)
        if report_alone:
            for line in report.splitlines():
                call.terminal.print(line)
        else:
            _write(call.options.report, report)
    wrong = sum(1 for each in found if each.verdict is Verdict.FAILED)
    if call.options.json:
        told = [
            {"check": each.check, "verdict": each.verdict.value, "said": each.said, "advice": each.advice}
            for each in found
        ]
        call.terminal.tell({"findings": told, "failed": wrong})
    return WRONG if wrong else FINE


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, "utf-8")
    except OSError as problem:
        raise CommandError(f"--report={path!r}: can't be written: {problem.strerror}") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:  # noqa: PLR2004
        raise CommandError(f"--seconds={text!r}: give a number from 1 to 3600", MISUSED)
    return seconds


_ROLES: Final = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
"""Variables for a role that does not come from the metadata service."""
_LAST_SECONDS: Final = 12.0
"""No request is started in the last seconds of a run: connection and response may take five seconds each."""
_OTHERS: Final = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", *_ROLES)


class Doctor:
    """
    The checks for one configuration.
    """

    def __init__(self, call: Invocation, config: Config, senses: Senses, limit: float) -> None:
        self._config, self._senses = config, senses
        self._given = given(call.flags, call.world.variables, call.file)
        self._variables, self._now, self._seconds = call.world.variables, call.world.now, call.world.seconds
        default, *self._others = config.registries
        base = without_role(default, config.region, senses)
        self._provider, self._identity = Once(base.provider), Once(base.identity)
        self._principals = Principals(config.registries, senses)
        self._default = self._principals.of(default)
        self._role, self._token = default.role, self._default.token
        self._hosts = hosts = Hosts(config, senses, call.world.variables)
        self._greeting = Once(lambda: hosts.touch(config.ecr_endpoint + "/v2/", hosts.address()))
        self._image = image_of(call.options, Registries(config.registries, config.registry_aliases or ()))
        self._assumes = call.options.image is not None
        self._until = call.world.seconds() + max(limit / 2, limit - _LAST_SECONDS)
        self._trial = Once(self._try)
        self._survey = Once(lambda: senses.survey(config.cache_dir, self._seconds))

    def checks(self) -> Sequence[Check]:
        """
        Return the checks, in the order of the output.
        """
        config, senses, role = self._config, self._senses, self._role
        slow = "see that AWS can be reached from here: by NAT, VPC endpoints, or HTTPS_PROXY"
        registry = self._hosts.registry.partition(".")[0]
        owner = registry if registry.isdecimal() and self._role is None else None
        return (
            Check("settings", lambda: look_at_settings(config, self._given, self._variables, senses.cores())),
            Check("files", lambda: look_at_files(config, self._now())),
            Check("credentials", self._credentials, slow),
            Check("metadata", self._metadata),
            Check("identity", lambda: account.look_at_identity(self._identity, owner), slow),
            *([Check("role", partial(account.look_at_role, self._default.identity, role), slow)] if role else []),
            Check("token", lambda: account.look_at_token(self._token, self._now()), slow),
            Check("resolver", self._resolver, "set PROXY_DNS_RESOLVER=system, or see /etc/resolv.conf"),
            Check("registry", self._registry, slow),
            Check("clock", self._clock),
            Check("login", self._login, slow),
            Check("permissions", self._permissions, slow),
            Check("bucket", self._bucket, slow),
            *([Check("assumptions", self._assumptions, slow)] if self._assumes else []),
            *(Check(each.name, partial(self._look_at, each), slow) for each in self._others),
            Check("cache", lambda: judge_directory(self._survey.get(), senses.user()), "see whether the disk is well"),
            Check("room", lambda: judge_room(self._survey.get(), config.cache_limit), "see whether the disk is well"),
            Check("port", self._ports),
            Check("open files", lambda: [judge_files(senses.most_files(), config)]),
        )

    # AWS.

    def _credentials(self) -> Iterator[Finding]:
        auth = self._config.instance_auth
        return account.look_at_credentials(self._provider, instance_auth=auth, environ=self._variables)

    def _metadata(self) -> Iterator[Finding]:
        """
        Check the metadata service. It is needed if it provides the credentials, or nothing else does.
        """
        try:
            needed = self._provider.get().method == "iam-role"
        except Exception:  # noqa: BLE001 (reported by the line about credentials)
            others = [name for name in _OTHERS if not self._config.instance_auth or name in _ROLES]
            needed = not any(self._variables.get(name) for name in others)
        return metadata.look_at_metadata(self._variables, self._senses.ask_metadata, needed=needed)

    def _permissions(self) -> Iterator[Finding]:
        if self._image is None:
            yield from self._simulated()
            return
        table = self._image.registry.table
        if not (table.namespaces or self._config.namespace_pattern).fullmatch(self._image.name):
            setting = "PROXY_NAMESPACE_PATTERN" if table.namespaces is None else f"namespaces of {table.name}"
            said = f"{setting} does not match {self._image.name}"
            yield failed("namespace", said, "change the pattern, or give another repository")
        yield from self._trial.need("a token and a registry").findings

    def _simulated(self) -> Iterator[Finding]:
        """
        Simulate the permissions in IAM, if no repository is given.
        """
        check, advice = "permissions", "give --repository NAME:TAG to have them tried"
        identity = self._default.identity.need("an identity")
        partition = identity.arn.split(":")[1]
        resource = f"arn:{partition}:ecr:{self._config.region}:{identity.account}:repository/*"
        actions = [*account.NEEDED[1:], *account.USEFUL, *account.IMPORTING]
        try:
            told = self._default.account.simulate(account.principal(identity.arn), actions, resource)
        except Exception as problem:  # noqa: BLE001 (few identities may simulate policies)
            yield skipped(check, f"IAM can't be asked: {brief(problem)}", advice)
        else:
            yield from account.judge_simulation(told)

    # The network.

    def _resolver(self) -> Iterator[Finding]:
        if (proxy := self._hosts.proxy(self._config.ecr_endpoint)) is not None:
            return iter([ok("resolver", f"the egress proxy {proxy} looks {self._hosts.registry} up")])
        return names.judge_names(self._hosts.registry, self._hosts.servers.get(), self._hosts.system.get())

    def _registry(self) -> Iterator[Finding]:
        greeting = self._greeting.get()
        url = self._config.ecr_endpoint
        yield from look_at_host("registry", url, [greeting.address], lambda _: greeting, self._now())
        if self._hosts.is_tunnel():
            host, at = self._hosts.registry, greeting.address
            said = f"{host} is at {at}: its redirects may lead to any service on loopback here"
            advice = "use it for trusted registries only, or move the tunnel to another address"
            yield warning("redirects", said, advice)

    def _login(self) -> Iterator[Finding]:
        if not self._greeting.need("an answer of the registry").status:
            raise SkippedError("not without an answer of the registry")
        token, _ = self._token.need("a token")
        url = f"{self._config.ecr_endpoint}/v2/"
        answer = self._hosts.touch(url, self._hosts.address(), {"Authorization": f"Basic {token}"})
        if answer.status == 200:  # noqa: PLR2004
            yield ok("login", "the registry accepts the token")
        else:
            said = f"the registry answers {answer.status or answer.problem} to a fresh token"
            advice = "check that PROXY_ECR_ENDPOINT is in the token's region, and that its account allows yours"
            yield failed("login", said, advice)

    def _clock(self) -> Iterator[Finding]:
        greeting = self._greeting.need("an answer of the registry")
        if not greeting.status:
            raise SkippedError("not without an answer of the registry")
        yield judge_clock(greeting.headers.get("date"), self._now())

    def _try(self) -> Trial:
        image = self._image
        if image is None:
            raise SkippedError("not without an image")
        table = image.registry.table
        token, url = self._principals.of(table).token.get()[0], table.endpoint or ""
        (address, *_) = self._hosts.addresses(url)

        def ask(method: str, path: str, headers: Mapping[str, str]) -> Contact:
            return self._hosts.touch(url + path, address, {**headers, "Authorization": f"Basic {token}"}, method)

        trial = Trial(ask, image.asked)
        trial.run(image.reference)
        return trial

    def _assumptions(self) -> Iterator[Finding]:
        """
        Compare the daemon's assumptions about ECR with ECR's responses for the image.
        """
        image = self._image
        if image is None or image.reference is None:
            raise SkippedError("not without an image")
        table = image.registry.table
        url, (token, expires) = table.endpoint or "", self._principals.of(table).token.need("a token")
        places: dict[str, list[str]] = {}

        def ask(question: DoctorRequest) -> Contact:
            if question.target.startswith("/"):
                shown = {"Authorization": f"Basic {token}", **question.headers}
                return self._hosts.answer_to(replace(question, target=url + question.target, headers=shown), places)
            return self._hosts.answer_to(question, places, tunnel=self._hosts.is_tunnel())

        seen = interview(ask, url, image.asked, image.reference, in_time=lambda: self._seconds() < self._until)
        location = seen.known.get("location", "")
        at = places.get(split(location)[0], []) if self._hosts.proxy(location) is None else []
        if not assumptions.is_there(seen):
            said = f"ECR answers 404: it has no {image.asked}:{image.reference}"
            yield failed("image", said, "check the spelling, and give an existing one")
        yield from assumptions.findings(replace(seen, token_seconds=expires - self._now(), bucket=at))

    def _bucket(self) -> Iterator[Finding]:
        """
        Check the host of a blob; without a blob, the usual one of this region.
        """
        location = self._location()
        if not location:
            yield skipped("bucket", "its address is unknown", "give --repository NAME:TAG")
            return
        host, _, _ = split(location)
        addresses = self._hosts.addresses(location)
        if self._hosts.proxy(location) is not None:
            yield from self._look_at_bucket(location, addresses)
            return
        tunnel = self._hosts.is_tunnel()
        forbidden = [address for address in addresses if is_forbidden(address, tunnel=tunnel)]
        if forbidden:
            said = f"{host} is at {forbidden[0]}, which the proxy does not connect to"
            yield failed(
                "bucket", said, "check the DNS for it: redirects must not lead to loopback or link-local addresses"
            )
            return
        yield from self._look_at_bucket(location, addresses)

    def _look_at_bucket(self, location: str, addresses: Sequence[str]) -> Iterator[Finding]:
        asked = {"Range": "bytes=0-0"}
        return look_at_host(
            "bucket", location, addresses, lambda address: self._hosts.touch(location, address, asked), self._now()
        )

    def _location(self) -> str:
        if self._image is not None:
            return self._trial.need("a token and a registry").location
        if not self._hosts.registry.endswith(".amazonaws.com"):
            return ""
        region = self._config.region
        return f"https://prod-{region}-starport-layer-bucket.s3.{region}.amazonaws.com/"

    # The other registries, and this machine.

    def _look_at(self, table: RegistryTable) -> Iterator[Finding]:
        return look_at_registry(table, self._principals, self._hosts, self._now())

    def _ports(self) -> Iterator[Finding]:
        config, senses = self._config, self._senses
        secure = "ssl" if config.ssl_key is not None else "tcp"
        alone = parse_endpoint_string(f"{secure}:{config.port}")
        ours = [("PROXY_LISTEN", each) for each in config.listen] or [("PROXY_PORT", alone)]
        theirs = [("PROXY_ADMIN_LISTEN", config.admin_listen), ("PROXY_METRICS_LISTEN", config.metrics_listen)]
        operators = [(variable, endpoint) for variable, endpoint in theirs if endpoint is not None]
        return ports.look_at_ports([*ours, *operators], senses.touch_place, senses.bind)
