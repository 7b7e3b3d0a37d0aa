"""
One registry has many names, and each name means one registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.identity import RegistryId

ACCOUNT = "123456789012"
_COMMERCIAL = (
    "dkr.ecr.{}.amazonaws.com",
    "dkr.ecr-fips.{}.amazonaws.com",
    "dkr-ecr.{}.on.aws",
    "dkr-ecr-fips.{}.on.aws",
)
NAMES = {
    **dict.fromkeys(("eu-west-1", "us-east-1", "us-gov-west-1"), _COMMERCIAL),
    "cn-north-1": ("dkr.ecr.{}.amazonaws.com.cn", "dkr-ecr.{}.on.amazonwebservices.com.cn"),
    "eusc-de-east-1": ("dkr.ecr.{}.amazonaws.eu", "dkr-ecr.{}.on.amazonwebservices.eu"),
}
"""The host names' parts after the account, by region."""
accounts = st.sampled_from([ACCOUNT, "210987654321", "000000000000"]) | st.from_regex(r"[0-9]{12}", fullmatch=True)


def spelled(draw: Callable[[st.SearchStrategy[Any]], Any], host: str) -> str:
    """
    Write a host's name in another way.
    """
    capitals = draw(st.integers(0, 2 ** len(host) - 1))
    text = "".join(each.upper() if capitals >> place & 1 else each for place, each in enumerate(host))
    return f"{text}{draw(st.sampled_from(['', '.']))}{draw(st.sampled_from(['', ':443']))}"


class RegistryIdTests(SynchronousTestCase):
    def test_all_names_of_an_ecr_registry_are_one(self) -> None:
        for region, partition, names in (
            ("eu-west-1", "aws", ("dkr.ecr.{}.amazonaws.com", "dkr-ecr.{}.on.aws")),
            (
                "us-east-1",
                "aws",
                ("dkr.ecr-fips.{}.amazonaws.com", "dkr-ecr-fips.{}.on.aws", "dkr.ecr.{}.amazonaws.com"),
            ),
            ("us-gov-west-1", "aws-us-gov", ("dkr.ecr.{}.amazonaws.com", "dkr.ecr-fips.{}.amazonaws.com")),
            ("cn-north-1", "aws-cn", ("dkr.ecr.{}.amazonaws.com.cn", "dkr-ecr.{}.on.amazonwebservices.com.cn")),
            ("eusc-de-east-1", "aws-eusc", ("dkr.ecr.{}.amazonaws.eu",)),
            ("us-iso-east-1", "aws-iso", ("dkr.ecr.{}.c2s.ic.gov",)),
            ("us-isob-east-1", "aws-iso-b", ("dkr.ecr.{}.sc2s.sgov.gov",)),
        ):
            for name in names:
                host = f"{ACCOUNT}.{name.format(region)}"
                for spelling in (host, host.upper(), f"{host}.", f"{host}:443"):
                    self.assertEqual(RegistryId(f"{partition}:{region}:{ACCOUNT}"), RegistryId.of_host(spelling))
                self.assertEqual(RegistryId.of_host(host), RegistryId.of_url(f"https://{host}"))

    def test_the_host_of_a_registry_leads_back_to_it(self) -> None:
        regions = ("eu-west-1", "us-gov-west-1", "cn-north-1", "eusc-de-east-1", "us-iso-east-1", "us-isob-east-1")
        domains = ("amazonaws.com", "amazonaws.com", "amazonaws.com.cn", "amazonaws.eu", "c2s.ic.gov", "sc2s.sgov.gov")
        for region, domain in zip(regions, domains, strict=True):
            host = f"{ACCOUNT}.dkr.ecr.{region}.{domain}"
            self.assertEqual(host, RegistryId.of_host(host).host)
        dual = RegistryId.of_host(f"{ACCOUNT}.dkr-ecr.eu-west-1.on.aws")
        self.assertEqual(f"{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com", dual.host)
        for host in ("quay.io", "localhost:5000", "[::1]:5000", "[::1]"):
            self.assertEqual(host, RegistryId.of_host(host).host)

    def test_accounts_and_regions_are_different_registries(self) -> None:
        hosts = [
            f"{account}.dkr.ecr.{region}.amazonaws.com"
            for account in (ACCOUNT, "210987654321")
            for region in ("eu-west-1", "eu-west-2")
        ]
        self.assertEqual(4, len({RegistryId.of_host(host) for host in hosts}))

    @given(accounts, accounts, st.sampled_from(sorted(NAMES)), st.sampled_from(sorted(NAMES)), st.data())
    def test_two_names_are_one_registry_if_account_and_region_are(
        self, one: str, other: str, here: str, there: str, data: st.DataObject
    ) -> None:
        """
        Whichever of ECR's names they are, and however each is spelled.
        """
        first, second = (
            spelled(data.draw, f"{account}.{data.draw(st.sampled_from(NAMES[region])).format(region)}")
            for account, region in ((one, here), (other, there))
        )
        same = RegistryId.of_host(first) == RegistryId.of_host(second)
        self.assertEqual((one, here) == (other, there), same, (first, second))

    @given(st.text(max_size=40) | st.from_regex(r"[a-z0-9.:\[\]@/-]{1,30}", fullmatch=True), st.sampled_from([80, 443]))
    def test_no_other_name_is_one_of_ecrs(self, text: str, port: int) -> None:
        """
        Nor does the identity of any other registry look like that of one of ECR's.
        """
        try:
            found = RegistryId.of_host(text, port)
        except ValueError:
            return
        if "ecr" not in text.lower():
            self.assertIsNone(found.account_and_region)
        self.assertEqual(found, RegistryId.of_host(str(found)) if found.account_and_region is None else found)

    def test_docker_hub_is_one_by_all_of_its_names(self) -> None:
        for name in ("docker.io", "Registry-1.Docker.io", "index.docker.io.", "registry-1.docker.io:443"):
            self.assertEqual(RegistryId.of_host("docker.io"), RegistryId.of_host(name))
        for name in ("docker.io:80", "auth.docker.io", "docker.io.test"):
            self.assertNotEqual(RegistryId.of_host("docker.io"), RegistryId.of_host(name))

    def test_ecr_public_is_one_by_both_of_its_names(self) -> None:
        """
        The second is that of nodes with IPv6 alone.
        """
        public = RegistryId.of_host("public.ecr.aws")
        for name in ("ecr-public.aws.com", "ECR-Public.aws.com.", "ecr-public.aws.com:443"):
            self.assertEqual(public, RegistryId.of_host(name))
        self.assertEqual("public.ecr.aws", public.host)
        for name in ("ecr-public.aws.com:80", "x.ecr-public.aws.com", "public.ecr.aws:8443"):
            self.assertNotEqual(public, RegistryId.of_host(name))

    def test_any_other_endpoint_is_its_host_and_port(self) -> None:
        """
        A host that only looks like ECR is another registry.
        """
        ours = RegistryId.of_host(f"{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com")
        for url, text in (
            ("http://127.0.0.1:5000", "127.0.0.1:5000"),
            ("http://[::1]:5000", "[::1]:5000"),
            ("https://registry.test", "registry.test:443"),
            ("http://registry.test", "registry.test:80"),
            ("https://public.ecr.aws", "public.ecr.aws:443"),
            (f"https://{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com:8443", None),
            (f"http://{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com", None),
            (f"https://{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com.evil.test", None),
            (f"https://{ACCOUNT}.dkr.ecr.eu-west-1.evil.test", None),
            (f"https://x.{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com", None),
            ("https://12345678901.dkr.ecr.eu-west-1.amazonaws.com", None),
        ):
            found = RegistryId.of_url(url)
            self.assertNotEqual(ours, found)
            self.assertEqual(text or found.text, str(found))

    def test_what_is_no_host_is_refused(self) -> None:
        for name in (
            "",
            ".",
            "..",
            "a..",
            "a:",
            "[::1]:",
            ":5000",
            "a:b",
            "a:99999",
            "http://a",
            "a/b",
            "a?b",
            "a#b",
            "me@a",
            "\u017fcr.test",
            "[::1",
        ):
            self.assertRaises(ValueError, RegistryId.of_host, name)
