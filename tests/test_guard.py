"""
The addresses to which a redirect may lead.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.guard import ForbiddenAddressError, Guard, is_forbidden

FORBIDDEN = (
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.170.2",
    "224.0.0.1",
    "239.255.255.255",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "::ffff:0:169.254.169.254",
    "64:ff9b:1::a9fe:a9fe",
    "64:ff9b:1:a9fe:a9:fe00::",
    "64:ff9b:1:1a9:fe:a9fe::",
    "64:ff9b:1:1:a9:fea9:fe00:0",
    "2001:0:102:304::5601:5601",
    "2001:0:7f00:1::f5ff:fffe",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd20:ce::254",
    "::ffff:100.100.100.200",
    "",
    "localhost",
    "127.1",
)
ALLOWED = (
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "52.95.110.1",
    "1.0.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "169.253.255.255",
    "169.255.0.0",
    "240.0.0.1",
    "2600:1f18::1",
    "fc00::1",
    "fd00:ec1::1",
    "fd00:ec3::1",
    "fd12:3456::1",
    "::ffff:10.0.0.1",
    "64:ff9b::52.95.110.1",
    "64:ff9b:1::52.95.110.1",
    "64:ff9b:1::10.0.0.1",
    "::ffff:0:52.95.110.1",
    "100.100.100.201",
    "168.63.129.17",
    "2002:a00:1::",
)


class IsForbiddenTests(SynchronousTestCase):
    def test_what_leads_to_this_machine_its_link_or_its_metadata(self) -> None:
        """
        Loopback, link-local, metadata, unspecified, multicast addresses are forbidden in each form; so are invalid
        ones.
        """
        for address in FORBIDDEN:
            self.assertTrue(is_forbidden(address), address)

    def test_all_else_is_not(self) -> None:
        """
        Public addresses are allowed, and private ones, which VPC endpoints have.
        """
        for address in ALLOWED:
            self.assertFalse(is_forbidden(address), address)


class GuardTests(SynchronousTestCase):
    def test_follows_the_registry(self) -> None:
        """
        Targets may be on loopback only as long as the registry is there itself.
        """
        guard = Guard()
        self.assertRaises(ForbiddenAddressError, guard.pass_target, "127.0.0.1")
        guard.pass_registry("127.0.0.1")
        for address in ("127.0.0.2", "::1", "0.0.0.0"):
            guard.pass_target(address)
        guard.pass_registry("10.0.0.1")
        self.assertRaises(ForbiddenAddressError, guard.pass_target, "127.0.0.2")
        guard.pass_target("10.0.0.2")

    def test_this_machines_own_addresses_are_refused_unless_the_registry_is_at_one(self) -> None:
        guard = Guard()
        guard.pass_registry("127.0.0.1")
        guard.met_registry("127.0.0.1", "127.0.0.1")
        guard.met_target("127.0.0.1", "127.0.0.1")  # that is judged before
        guard.met_target("192.0.2.2", "192.0.2.3")
        self.assertRaises(ForbiddenAddressError, guard.met_target, "192.0.2.2", "192.0.2.2")
        self.assertRaises(ForbiddenAddressError, guard.met_target, "2001:db8::2", "2001:db8::2")
        guard.met_registry("192.0.2.2", "192.0.2.2")
        guard.met_target("192.0.2.2", "192.0.2.2")
        guard.met_registry("192.0.2.2", "192.0.2.9")
        self.assertRaises(ForbiddenAddressError, guard.met_target, "192.0.2.2", "192.0.2.2")

    def test_a_registry_behind_a_tunnel_opens_no_way_to_the_metadata_service(self) -> None:
        guard = Guard()
        guard.pass_registry("127.0.0.1")
        for address in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254", "fe80::1"):
            self.assertRaises(ForbiddenAddressError, guard.pass_target, address)
