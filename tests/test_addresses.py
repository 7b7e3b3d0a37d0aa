"""
Tell addresses from names.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.addresses import is_address, unmapped


class AddressTests(SynchronousTestCase):
    @given(st.ip_addresses().map(str))
    def test_addresses_are(self, text: str) -> None:
        """
        Of both families.
        """
        self.assertTrue(is_address(text))

    def test_names_are_not(self) -> None:
        """
        Nor is what only looks like an address, or has brackets or a port.
        """
        for text in ("", "localhost", "127.1", "1.2.3.4.5", "256.1.1.1", "[::1]", "127.0.0.1:53", "1.2.3.4\n"):
            self.assertFalse(is_address(text), text)

    def test_a_mapped_address_is_the_ipv4_address_in_any_notation(self) -> None:
        expected = {
            "::ffff:10.0.0.1": "10.0.0.1",
            "::ffff:a00:1": "10.0.0.1",
            "10.0.0.1": "10.0.0.1",
            "2001:db8::1": "2001:db8::1",
            "::ffff:": "",
            "::ffff:x:y": "::ffff:x:y",
            "": "",
        }
        self.assertEqual(expected, {text: unmapped(text) for text in expected})
