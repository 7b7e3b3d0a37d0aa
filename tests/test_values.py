"""
Each type of value has its grammar, and anything else is rejected.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.identity import RegistryId
from ecrproxy.settings.endpoints import parse_endpoint, parse_region, region_of
from ecrproxy.settings.values import (
    parse_count,
    parse_flag,
    parse_networks,
    parse_origin,
    parse_path,
    parse_patience,
    parse_pattern,
    parse_port,
    parse_registries,
    parse_resolver,
    parse_seconds,
    parse_size,
    parse_tries,
)


class ParserTests(SynchronousTestCase):
    def assert_refused(self, parse: Callable[[str], object], *texts: str) -> None:
        """
        Assert that none of C{texts} is accepted.
        """
        for text in texts:
            try:
                value = parse(text)
            except ValueError:
                continue
            self.fail(f"{text!r} was taken for {value!r}")

    def test_endpoints_are_urls_or_bare_hosts(self) -> None:
        """
        A bare host means https; only scheme, host and port count.
        """
        expected = {
            "ecr.test": "https://ecr.test",
            "ecr.test:8443": "https://ecr.test:8443",
            " https://ECR.test/ ": "https://ecr.test",
            "HTTP://localhost:5000/": "http://localhost:5000",
            "http://127.0.0.1:5000": "http://127.0.0.1:5000",
            "http://[::1]:5000": "http://[::1]:5000",
            "[::1]": "https://[::1]",
            "a-b.c-d": "https://a-b.c-d",
        }
        self.assertEqual(expected, {text: parse_endpoint(text) for text in expected})

    def test_what_is_no_registrys_url_is_refused(self) -> None:
        """
        Paths, queries, user names, other schemes and impossible hosts and ports are mistakes.
        """
        self.assert_refused(
            parse_endpoint,
            "",
            " ",
            "https://",
            "ftp://ecr.test",
            "://ecr.test",
            "https//ecr.test",
            "https://ecr.test/v2/",
            "ecr.test/team",
            "https://ecr.test?x=1",
            "https://ecr.test#x",
            "https://user:secret@ecr.test",
            "user@ecr.test",
            "5000",
            "https://123456789012",
            "https://127.1:443",
            "https://0x7f000001",
            "https://ecr.1",
            "https://ecr.test:0",
            "https://ecr.test:65536",
            "https://ecr.test:port",
            "https://ecr..test",
            "https://-ecr.test",
            "https://ecr_.test!",
            "https://ecr test",
            "https://[::1",
            "https://[nonsense]",
            "https://é.test",
        )

    def test_an_origin_is_as_browsers_write_it(self) -> None:
        """
        In lower case and without the default port; an origin has no path, user or pattern.
        """
        expected = {
            "*": "*",
            "HTTPS://UI.example:443/": "https://ui.example",
            "http://ui.example:443": "http://ui.example:443",
            "http://[::1]:8080": "http://[::1]:8080",
        }
        self.assertEqual(expected, {text: parse_origin(text) for text in expected})
        self.assert_refused(
            parse_origin,
            "",
            "null",
            "ui.example",
            "https://",
            "ftp://ui.example",
            "https://ui.example/x",
            "https://ui.example?x",
            "https://user@ui.example",
            "https://*.example",
            "https://ui.example:port",
            "https://ui.example:080",
            "https://a.example https://b.example",
        )

    def test_sizes_are_in_powers_of_1024(self) -> None:
        """
        However the unit is spelled, and without one, sizes are as in nginx.
        """
        expected = {
            **dict.fromkeys(("64g", "64gb", "64GiB", "64G", "64 GB", " 64gib "), 68_719_476_736),
            **dict.fromkeys(("512m", "512MB"), 536_870_912),
            **dict.fromkeys(("100k", "100KiB"), 102_400),
            "2t": 2_199_023_255_552,
            "1": 1,
            "1000b": 1000,
        }
        self.assertEqual(expected, {text: parse_size(text) for text in expected})

    def test_what_is_no_size_is_refused(self) -> None:
        """
        Nothing at all, fractions, signs and unknown units are no sizes.
        """
        self.assert_refused(
            parse_size, "", "0", "0g", "g", "1.5g", "-1", "+1", "1e9", "64p", "64gg", "64 parsecs", "6 4", "1" * 30
        )

    def test_flags_are_yes_or_no(self) -> None:
        """
        Only the usual words are understood.
        """
        for text in ("true", "True", "yes", "on", "1"):
            self.assertIs(True, parse_flag(text))
        for text in ("false", "FALSE", "no", "off", "0"):
            self.assertIs(False, parse_flag(text))
        self.assert_refused(parse_flag, "", "2", "t", "nein", "true ")

    def test_a_pattern_must_match_the_whole_name(self) -> None:
        """
        `image1|image3` matches exactly these two.
        """
        pattern = parse_pattern("image1|image3")
        names = ("image1", "image3", "image2", "image11", "image13", "aimage1", "aimage3", "image3/x", "team/image1")
        self.assertEqual(["image1", "image3"], [name for name in names if pattern.fullmatch(name)])

    def test_patterns_may_look_ahead(self) -> None:
        """
        Namespaces can be excluded by their prefix.
        """
        pattern = parse_pattern("(?!secret/).*")
        self.assertTrue(pattern.fullmatch("open/image"))
        self.assertFalse(pattern.fullmatch("secret/image"))
        both = parse_pattern("(?=.*prod)(?!.*test).+|base")
        self.assertEqual(
            ["my-prod", "base"], [name for name in ("my-prod", "prod-test", "base", "x") if both.fullmatch(name)]
        )

    def test_a_pattern_may_begin_with_flags(self) -> None:
        """
        Inline flags at the beginning of a pattern are accepted, as in Python and nginx.
        """
        self.assertTrue(parse_pattern("(?i)IMAGE1|image3").fullmatch("image1"))

    def test_what_is_no_pattern_is_refused(self) -> None:
        """
        Unbalanced parentheses are rejected even if they would balance within a group, and so is everything that re
        rejects.
        """
        self.assert_refused(parse_pattern, "", "(a", "a)", "a)|(b", ")(", "[a", "*", "(?P<x", "a\\")

    def test_a_pattern_too_large_to_compile_is_refused(self) -> None:
        """
        A repetition beyond what re can count, or brackets beyond what it can nest, is a wrong value and no crash.
        """
        self.assert_refused(parse_pattern, "a{99999999999999999999}", "(" * 20_000 + ")" * 20_000)

    def test_name_servers_are_addresses_with_ports(self) -> None:
        """
        One or more servers, of both families, separated by blanks or commas; `system` means the host's own.
        """
        expected = {
            "system": None,
            "8.8.8.8": (("8.8.8.8", 53),),
            "8.8.8.8:5353": (("8.8.8.8", 5353),),
            "1.1.1.1 8.8.8.8:54": (("1.1.1.1", 53), ("8.8.8.8", 54)),
            "1.1.1.1,8.8.8.8, 9.9.9.9": (("1.1.1.1", 53), ("8.8.8.8", 53), ("9.9.9.9", 53)),
            "::1": (("::1", 53),),
            "[::1]": (("::1", 53),),
            "[2001:db8::5]:5353": (("2001:db8::5", 5353),),
        }
        self.assertEqual(expected, {text: parse_resolver(text) for text in expected})

    def test_what_is_no_name_server_is_refused(self) -> None:
        """
        A server's name can't be resolved without a server, and ports have their range.
        """
        self.assert_refused(
            parse_resolver,
            "",
            " ",
            ",",
            "dns.test",
            "8.8.8",
            "8.8.8.8:",
            "8.8.8.8:0",
            "8.8.8.8:65536",
            "8.8.8.8:x",
            "[::1",
            "[::1]:x",
            "system 8.8.8.8",
            "System",
        )

    def test_networks_are_separated_by_space_or_commas(self) -> None:
        """
        A single address is a network.
        """
        found = parse_networks(" 10.0.0.0/8,192.0.2.7\n fd00::/8 ")
        self.assertEqual(["10.0.0.0/8", "192.0.2.7/32", "fd00::/8"], [str(each) for each in found])

    def test_a_network_with_bits_of_a_host_is_told_what_it_may_mean(self) -> None:
        """
        10.1.2.3/8 may mean one machine or sixteen million.
        """
        problem = self.assertRaises(ValueError, parse_networks, "10.1.2.3/8")
        self.assertEqual("'10.1.2.3/8' is not a network; give 10.0.0.0/8, if that is meant", str(problem))

    def test_ports_are_from_1_to_65535(self) -> None:
        """
        Both ends are included.
        """
        self.assertEqual((1, 65535), (parse_port("1"), parse_port("65535")))
        self.assert_refused(parse_port, "", "0", "65536", "-1", "+80", "5000 ", "0x50", "5000/tcp", "five")

    def test_times_are_not_negative(self) -> None:
        """
        Seconds and fractions of them are times.
        """
        self.assertEqual((0.0, 30.0, 0.5), (parse_seconds("0"), parse_seconds("30"), parse_seconds("0.5")))
        self.assert_refused(parse_seconds, "", "-1", "inf", "nan", "1e3", "30s", " 1", ".5", "9" * 10)

    def test_numbers_are_written_in_ascii_digits(self) -> None:
        for read in (parse_seconds, parse_patience, parse_count, parse_tries, parse_port, parse_size):
            self.assert_refused(read, "\u0663", "\uff13", "3_0", "+3", "3" * 5000)

    def test_paths_are_not_empty(self) -> None:
        """
        Any non-empty text without NUL is a path.
        """
        self.assertEqual("/a b", parse_path("/a b"))
        self.assert_refused(parse_path, "", "a\0b")

    def test_ecr_host_names_tell_their_region(self) -> None:
        """
        In every partition, with FIPS and dual-stack names too; other hosts have none.
        """
        account = "https://123456789012"
        expected = {
            f"{account}.dkr.ecr.eu-west-1.amazonaws.com": "eu-west-1",
            f"{account}.dkr.ecr-fips.us-gov-west-1.amazonaws.com": "us-gov-west-1",
            f"{account}.dkr.ecr.cn-north-1.amazonaws.com.cn": "cn-north-1",
            f"{account}.dkr.ecr.eusc-de-east-1.amazonaws.eu": "eusc-de-east-1",
            f"{account}.dkr-ecr.ap-southeast-2.on.aws": "ap-southeast-2",
            f"{account}.dkr-ecr-fips.us-east-1.on.aws": "us-east-1",
            f"{account}.dkr.ecr.eu-west-1.amazonaws.com:8443": "eu-west-1",
            "https://public.ecr.aws": None,
            "https://12.dkr.ecr.eu-west-1.amazonaws.com": None,
            "https://localhost": None,
        }
        self.assertEqual(expected, {endpoint: region_of(endpoint) for endpoint in expected})

    def test_registries_are_named_by_host_and_port(self) -> None:
        expected = {RegistryId.of_host("docker.io"), RegistryId.of_host("mirror.test:5000")}
        self.assertEqual(expected, parse_registries("docker.io, mirror.test:5000"))
        self.assert_refused(
            parse_registries, "", " , ", "https://docker.io", "docker.io/library", "a:b", "me@docker.io"
        )

    def test_regions_of_all_partitions_are_taken(self) -> None:
        """
        Names of regions have words and a number at the end.
        """
        for name in ("eu-west-1", "us-gov-east-1", "us-isob-east-1", "eusc-de-east-1", "ap-southeast-12"):
            self.assertEqual(name, parse_region(name))
        for name in ("", "eu", "eu-west", "eu-west-1a", "eu_west_1", "eu-west-1 ", "-west-1", "e-west-1"):
            self.assertRaises(ValueError, parse_region, name)
