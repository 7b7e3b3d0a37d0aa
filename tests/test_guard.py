"""
To which addresses a redirect may lead.
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
    "2002:a00:1::",
)


class IsForbiddenTests(SynchronousTestCase):
    def test_what_leads_to_this_machine_its_link_or_its_metadata(self) -> None:
        """
        Loopback, link-local, metadata, unspecified, multicast addresses are forbidden in each form; so is what is none.
        """
        for address in FORBIDDEN:
            self.assertTrue(is_forbidden(address), address)

    def test_all_else_is_not(self) -> None:
        """
        Public addresses are allowed, and private ones, where VPC endpoints live.
        """
        for address in ALLOWED:
            self.assertFalse(is_forbidden(address), address)


class GuardTests(SynchronousTestCase):
    def test_follows_the_registry(self) -> None:
        """
        Targets may be on loopback as long as the registry is there itself, and no longer.
        """
        guard = Guard()
        self.assertRaises(ForbiddenAddressError, guard.pass_target, "127.0.0.1")
        guard.pass_registry("127.0.0.1")
        for address in ("127.0.0.2", "::1", "0.0.0.0"):
            guard.pass_target(address)
        guard.pass_registry("10.0.0.1")
        self.assertRaises(ForbiddenAddressError, guard.pass_target, "127.0.0.2")
        guard.pass_target("10.0.0.2")

    def test_a_registry_behind_a_tunnel_opens_no_way_to_the_metadata_service(self) -> None:
        guard = Guard()
        guard.pass_registry("127.0.0.1")
        for address in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254", "fe80::1"):
            self.assertRaises(ForbiddenAddressError, guard.pass_target, address)
