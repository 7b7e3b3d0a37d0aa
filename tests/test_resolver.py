"""
Names are resolved by the servers that the operator chose, and pulls go on when these are silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IHostnameResolver, IHostResolution, IResolutionReceiver, IResolver
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.names import dns
from twisted.names.error import DNSNameError, DNSQueryTimeoutError, DNSServerError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from ecrproxy.registry.resolver import DOUBT_SECONDS, LATE_SECONDS, NAMES, ChosenServers, SharedLookups, hosts_names

START = 1_767_225_600.0
NAME = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
Records = Sequence[dns.RRHeader]


class Servers:
    """
    Configured servers that answer when the test says so.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, Deferred[tuple[Records, Records, Records]]] = {}

    def lookupAddress(self, name: str, timeout: Sequence[int] = ()) -> Deferred[tuple[Records, Records, Records]]:
        """
        Receive a query for IPv4 addresses.
        """
        return self._ask("A", name)

    def lookupIPV6Address(self, name: str, timeout: Sequence[int] = ()) -> Deferred[tuple[Records, Records, Records]]:
        """
        Receive a query for IPv6 addresses.
        """
        return self._ask("AAAA", name)

    def _ask(self, kind: str, name: str) -> Deferred[tuple[Records, Records, Records]]:
        self.asked.append((kind, name))
        self.answers[kind] = Deferred()
        return self.answers[kind]

    def answer(self, four: Sequence[str] = (), six: Sequence[str] = ()) -> None:
        """
        Answer both queries, through an alias, as for ECR's own names.
        """
        alias = dns.RRHeader(NAME, dns.CNAME, payload=dns.Record_CNAME("alias.test"))
        fours = [dns.RRHeader("alias.test", dns.A, payload=dns.Record_A(address)) for address in four]
        sixes = [dns.RRHeader("alias.test", dns.AAAA, payload=dns.Record_AAAA(address)) for address in six]
        self.answers["A"].callback(([alias, *fours], [], []))
        self.answers["AAAA"].callback(([alias, *sixes], [], []))

    def fail(self, problem: Exception, other: Exception | None = None) -> None:
        """
        Fail both queries.
        """
        self.answers["A"].errback(problem)
        self.answers["AAAA"].errback(other or problem)


@implementer(IHostnameResolver)
class System:
    """
    The host's own resolver, for which every name has the address 10.0.0.1.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.knows = True

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        """
        Answer at once.
        """
        self.asked.append(hostName)
        resolution = Named(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        if self.knows:
            resolutionReceiver.addressResolved(IPv4Address("TCP", "10.0.0.1", portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


@implementer(IHostResolution)
class Named:
    """
    A resolution that can no longer be cancelled.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """
        Do nothing: it is too late.
        """


@implementer(IResolutionReceiver)
class Receiver:
    """
    A caller that wants to connect.
    """

    def __init__(self) -> None:
        self.begun: list[IHostResolution] = []
        self.found: list[IAddress] = []
        self.completed = 0

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        self.begun.append(resolutionInProgress)

    def addressResolved(self, address: IAddress) -> None:
        """
        Record an address.
        """
        assert self.begun
        assert not self.completed
        self.found.append(address)

    def resolutionComplete(self) -> None:
        """
        Record the end.
        """
        self.completed += 1


class Slow(System):
    """
    The host's own resolver, which answers when the test says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[IResolutionReceiver, str, int]] = []

    def resolveHostName(self, resolutionReceiver: IResolutionReceiver, hostName: str, *rest: Any) -> IHostResolution:
        """
        Record a query.
        """
        self.asked.append(hostName)
        self.waiting.append((resolutionReceiver, hostName, rest[0]))
        return Named(hostName)

    def answer(self) -> None:
        """
        Answer the oldest query.
        """
        super().resolveHostName(*self.waiting.pop(0))
        self.asked.pop()


def asked(names: IHostnameResolver, name: str = NAME) -> Receiver:
    """
    Resolve a name.
    """
    receiver = Receiver()
    names.resolveHostName(receiver, name, 443)
    return receiver


class SharedLookupsTests(SynchronousTestCase):
    """
    The host's resolver has few threads, and may keep each for many seconds.
    """

    def test_a_name_is_asked_for_once_at_a_time(self) -> None:
        """
        All callers get the answer, also if there is no address; later callers cause another query.
        """
        system = Slow()
        shared, receivers = SharedLookups(system, Clock()), [Receiver() for _ in range(4)]
        for receiver, name in zip(receivers, (NAME, NAME, "other.test", NAME), strict=True):
            shared.resolveHostName(receiver, name, 443)
        self.assertEqual([NAME, "other.test"], system.asked)
        system.answer()
        expected = [IPv4Address("TCP", "10.0.0.1", 443)]
        self.assertEqual([expected, expected, [], expected], [each.found for each in receivers])
        self.assertEqual([1, 1, 0, 1], [each.completed for each in receivers])
        system.knows = False
        system.answer()
        self.assertEqual(([], 1), (receivers[2].found, receivers[2].completed))
        shared.resolveHostName(Receiver(), NAME, 443)
        self.assertEqual([NAME, "other.test", NAME], system.asked)

    def test_an_address_needs_no_resolver(self) -> None:
        """
        It is there at once, also while every thread of the host's resolver waits for a name server.
        """
        system = Slow()
        shared = SharedLookups(system, Clock())
        found = [asked(shared, address) for address in ("192.0.2.7", "2001:db8::7")]
        self.assertEqual(
            [[IPv4Address("TCP", "192.0.2.7", 443)], [IPv6Address("TCP", "2001:db8::7", 443)]],
            [each.found for each in found],
        )
        self.assertEqual([(1, 1), (1, 1)], [(len(each.begun), each.completed) for each in found])
        self.assertEqual([], system.asked)

    def test_the_host_knows_the_network_interface_that_an_address_names(self) -> None:
        """
        A link-local address with a zone is resolved by the host.
        """
        system = Slow()
        self.assertEqual(0, asked(SharedLookups(system, Clock()), "fe80::1%eth0").completed)
        self.assertEqual(["fe80::1%eth0"], system.asked)

    def test_the_last_addresses_are_used_while_nobody_resolves_a_name(self) -> None:
        """
        While name servers are down for a moment, the previous addresses are used; that is logged, once a minute.
        """
        system = System()
        shared = SharedLookups(system, Clock())
        first = asked(shared)
        system.knows = False
        with capturedLogs() as events:
            second = asked(shared)
        self.assertEqual((first.found, 1), (second.found, second.completed))
        self.assertEqual([], asked(shared, "other.test").found)
        self.assertEqual([NAME], [event["once"] for event in events])

    def test_a_name_that_resolves_slowly_has_its_last_addresses_after_a_second(self) -> None:
        """
        A resolver repeats a lost query after five seconds. Callers meanwhile don't wait another second.
        """
        system, clock = Slow(), Clock()
        shared = SharedLookups(system, clock)
        first = asked(shared)
        clock.advance(LATE_SECONDS)
        self.assertEqual(0, first.completed)  # there were none before
        system.answer()
        second = asked(shared)
        clock.advance(LATE_SECONDS - 0.1)
        self.assertEqual(0, second.completed)
        clock.advance(0.1)
        third = asked(shared)
        self.assertEqual([(first.found, 1)] * 2, [(each.found, each.completed) for each in (second, third)])
        system.answer()
        self.assertEqual([NAME] * 2, system.asked)
        self.assertEqual([1, 1], [second.completed, third.completed])
        self.assertEqual([], clock.getDelayedCalls())
        asked(shared)
        self.assertEqual([NAME] * 3, system.asked)

    def test_a_name_that_could_not_be_connected_to_is_waited_for_longer(self) -> None:
        """
        It may have moved; if no server answers, it may still be there, for a balancer refuses now and then.
        """
        system, clock = Slow(), Clock()
        shared = SharedLookups(system, clock)
        for name in (NAME, "other.test"):
            asked(shared, name)
            system.answer()
        shared.forget(NAME)
        forgotten, other = asked(shared), asked(shared, "other.test")
        clock.advance(LATE_SECONDS)
        self.assertEqual([0, 1], [forgotten.completed, other.completed])
        shared.forget(NAME)  # again: nobody waits longer for that
        clock.advance(DOUBT_SECONDS - LATE_SECONDS)
        self.assertEqual([IPv4Address("TCP", "10.0.0.1", 443)], forgotten.found)
        system.knows = False
        system.answer()
        second = asked(shared)
        system.answer()
        system.answer()
        self.assertEqual((forgotten.found, 1), (second.found, second.completed))

    def test_who_comes_while_a_name_is_doubted_waits_as_long(self) -> None:
        """
        Also if the answer is late already; once answered, the name is trusted again.
        """
        system, clock = Slow(), Clock()
        shared = SharedLookups(system, clock)
        asked(shared)
        system.answer()
        asked(shared)
        clock.advance(LATE_SECONDS)
        shared.forget(NAME)
        late = asked(shared)
        self.assertEqual(0, late.completed)
        clock.advance(DOUBT_SECONDS)
        self.assertEqual(1, late.completed)
        system.answer()
        good = asked(shared)
        clock.advance(LATE_SECONDS)
        self.assertEqual(1, good.completed)


class ChosenServersTests(SynchronousTestCase):
    """
    The configured servers get queries only for names that they should know.
    """

    def setUp(self) -> None:
        """
        Create servers, a host resolver, and a clock.
        """
        self.clock = Clock()
        self.clock.advance(START)
        self.servers, self.system = Servers(), System()
        servers: Any = self.servers
        self.resolver = ChosenServers(servers, self.system, ["localhost", "Registry.Internal"], self.clock)

    def resolve(self, name: str = NAME) -> Receiver:
        """
        Resolve a name.
        """
        receiver = Receiver()
        self.resolver.resolveHostName(receiver, name, 443)
        return receiver

    def test_it_is_what_twisted_asks(self) -> None:
        """
        Twisted accepts it as its resolver.
        """
        self.assertTrue(verifyObject(IHostnameResolver, self.resolver))
        receiver = Receiver()
        resolution = self.resolver.resolveHostName(receiver, NAME)
        self.assertTrue(verifyObject(IHostResolution, resolution))
        self.assertEqual([resolution], receiver.begun)
        self.assertEqual(NAME, resolution.name)
        resolution.cancel()

    def test_both_families_are_asked_for(self) -> None:
        """
        All addresses of a name are found, with the port to connect to.
        """
        receiver = self.resolve()
        self.assertEqual([("A", NAME), ("AAAA", NAME)], self.servers.asked)
        self.assertEqual(([], 0), (receiver.found, receiver.completed))
        self.servers.answer(["192.0.2.1", "192.0.2.2"], ["2001:db8::1"])
        self.assertEqual(
            [
                IPv4Address("TCP", "192.0.2.1", 443),
                IPv4Address("TCP", "192.0.2.2", 443),
                IPv6Address("TCP", "2001:db8::1", 443),
            ],
            receiver.found,
        )
        self.assertEqual((1, 1), (len(receiver.begun), receiver.completed))
        self.assertEqual([], self.system.asked)

    def test_addresses_and_local_names_never_go_to_the_servers(self) -> None:
        """
        The host itself resolves what it knows.
        """
        names = ["127.0.0.1", "::1", "2001:db8::5", "localhost", "LOCALHOST", "registry.internal"]
        for name in names:
            receiver = self.resolve(name)
            self.assertEqual([IPv4Address("TCP", "10.0.0.1", 443)], receiver.found)
        self.assertEqual(names, self.system.asked)
        self.assertEqual([], self.servers.asked)

    def test_a_name_that_does_not_exist_has_no_address(self) -> None:
        """
        The servers' denial counts: the host is not asked.
        """
        receiver = self.resolve()
        self.servers.fail(DNSNameError())
        self.assertEqual(([], 1), (receiver.found, receiver.completed))
        self.assertEqual([], self.system.asked)
        self.assertEqual([], self.flushLoggedErrors())

    def test_one_family_is_enough(self) -> None:
        """
        A name without an address of the other family is still found.
        """
        receiver = self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], receiver.found)
        self.resolver = ChosenServers(self.as_resolver(), self.system, [], self.clock)
        receiver = self.resolve("six.test")
        self.servers.answers["A"].errback(DNSNameError())
        self.servers.answers["AAAA"].callback(
            ([dns.RRHeader("six.test", dns.AAAA, payload=dns.Record_AAAA("2001:db8::1"))], [], [])
        )
        self.assertEqual([IPv6Address("TCP", "2001:db8::1", 443)], receiver.found)

    def as_resolver(self) -> IResolver:
        """
        Return the servers as a resolver.
        """
        servers: Any = self.servers
        resolver: IResolver = servers
        return resolver

    def test_an_answer_is_used_for_thirty_seconds(self) -> None:
        """
        As the nginx proxy does; after that, the servers are asked again.
        """
        self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.clock.advance(29.9)
        known = self.resolve()
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], known.found)
        self.assertEqual((1, 1), (len(known.begun), known.completed))
        self.assertEqual(2, len(self.servers.asked))
        self.clock.advance(0.1)
        again = self.resolve()
        self.assertEqual(([], 4), (again.found, len(self.servers.asked)))
        self.servers.answer(["192.0.2.9"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.9", 443)], again.found)

    def test_a_name_that_is_forgotten_is_asked_for_again(self) -> None:
        """
        If a host can't be reached, the servers may know better; other names keep their answers.
        """
        for name in (NAME, "bucket.test"):
            self.resolve(name)
            self.servers.answer(["192.0.2.1"])
        self.resolver.forget(NAME)
        self.resolver.forget("unknown.test")
        moved = self.resolve()
        self.servers.answer(["192.0.2.9"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.9", 443)], moved.found)
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], self.resolve("bucket.test").found)

    def test_one_names_answer_is_not_anothers(self) -> None:
        """
        Each name has its own query.
        """
        self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.assertEqual([], self.resolve("bucket.test").found)
        self.assertEqual(("AAAA", "bucket.test"), self.servers.asked[-1])

    def test_a_clock_set_back_makes_no_answer_last_for_ever(self) -> None:
        """
        An answer from the future causes a new query.
        """
        self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.clock.rightNow -= 3600.0
        self.assertEqual([], self.resolve().found)
        self.assertEqual(4, len(self.servers.asked))

    def test_servers_that_do_not_answer_are_done_without(self) -> None:
        """
        The host's resolver is asked, whatever kind of silence it was, and the pull goes on.
        """
        timeout, failing = DNSQueryTimeoutError(1), DNSServerError()
        for problem, other in ((timeout, timeout), (failing, failing), (timeout, DNSNameError()), (OSError(), timeout)):
            self.setUp()
            receiver = self.resolve()
            self.servers.fail(problem, other)
            self.assertEqual([IPv4Address("TCP", "10.0.0.1", 443)], receiver.found)
            self.assertEqual((1, 1), (len(receiver.begun), receiver.completed))
        self.assertEqual([], self.flushLoggedErrors())

    def test_silent_servers_are_left_alone_for_ten_seconds(self) -> None:
        """
        No caller waits for them again and again; then they are tried again.
        """
        self.resolve()
        self.servers.fail(DNSQueryTimeoutError(1))
        self.clock.advance(9.9)
        for name in (NAME, "bucket.test"):
            self.assertEqual(1, self.resolve(name).completed)
        self.assertEqual(2, len(self.servers.asked))
        self.clock.advance(0.1)
        receiver = self.resolve()
        self.assertEqual(4, len(self.servers.asked))
        self.servers.answer(["192.0.2.1"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], receiver.found)

    def test_servers_that_alone_know_a_name_are_asked_again_at_once(self) -> None:
        self.system.knows = False
        for _ in range(3):
            receiver = self.resolve()
            self.servers.fail(DNSServerError())
            self.assertEqual(([], 1), (receiver.found, receiver.completed))
        self.assertEqual(3, len(self.system.asked))
        receiver = self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], receiver.found)

    def test_servers_are_asked_again_for_what_the_host_can_not_resolve(self) -> None:
        """
        Also while they are left alone, because the host knew another name.
        """
        self.resolve("bucket.test")
        self.servers.fail(DNSServerError())
        self.system.knows = False
        self.assertEqual(([], 1), ((receiver := self.resolve()).found, receiver.completed))
        receiver = self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], receiver.found)

    def test_servers_are_asked_again_when_the_hosts_answer_leads_nowhere(self) -> None:
        self.resolve()
        self.servers.fail(DNSServerError())
        self.resolver.forget(NAME)
        self.resolve()
        self.assertEqual(4, len(self.servers.asked))

    def test_the_last_addresses_are_used_while_nobody_resolves_a_name(self) -> None:
        self.resolve()
        self.servers.answer(["192.0.2.1"])
        self.clock.advance(3600)
        self.system.knows = False
        receiver = self.resolve()
        self.servers.fail(DNSQueryTimeoutError(1))
        self.assertEqual(([IPv4Address("TCP", "192.0.2.1", 443)], 1), (receiver.found, receiver.completed))

    def test_of_many_names_those_asked_for_lately_are_kept(self) -> None:
        """
        Clients of a wildcard of accounts can make up any number of names.
        """
        for number in range(NAMES + 1):
            self.resolve(f"{number}.example")
            self.servers.answer(["192.0.2.1"])
        asked = len(self.servers.asked)
        self.resolve(f"{NAMES}.example")
        self.assertEqual(asked, len(self.servers.asked))
        self.resolve("0.example")
        self.assertEqual(asked + 2, len(self.servers.asked))

    def test_the_addresses_of_one_family_do_where_the_other_fails(self) -> None:
        receiver = self.resolve()
        self.servers.answers["A"].callback(
            ([dns.RRHeader(NAME, dns.A, payload=dns.Record_A("192.0.2.1"))], [], []),
        )
        self.servers.answers["AAAA"].errback(DNSServerError())
        self.assertEqual([IPv4Address("TCP", "192.0.2.1", 443)], receiver.found)
        self.assertEqual([], self.system.asked)

    def test_silence_is_told_once_a_minute_for_each_name(self) -> None:
        with capturedLogs() as events:
            self.resolve()
            self.servers.fail(DNSQueryTimeoutError(1))
        (warning,) = events
        self.assertEqual((LogLevel.warn, NAME), (warning["log_level"], warning["once"]))
        self.assertIn("PROXY_DNS_RESOLVER", formatEvent(warning))
        self.assertIn(NAME, formatEvent(warning))


class HostsTests(SynchronousTestCase):
    """
    The hosts file says what is local.
    """

    def test_all_names_of_a_hosts_file_are_read(self) -> None:
        """
        Aliases too, without addresses, comments and empty lines.
        """
        text = "127.0.0.1\tlocalhost loop # the host itself\n\n# 10.0.0.9 gone\n::1 localhost ip6-localhost\n10.0.0.5\n"
        self.assertEqual(["localhost", "loop", "localhost", "ip6-localhost"], hosts_names(text))
