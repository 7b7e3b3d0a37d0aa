"""
How the doctor judges registry, bucket, certificates, clocks, name servers and the metadata service.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from email.utils import format_datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from twisted.names.dns import AAAA, A, Message, Record_A, Record_AAAA, Record_CNAME, RRHeader
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.checkup import metadata, names
from ecrproxy.command.checkup.findings import Finding, Verdict
from ecrproxy.command.checkup.network import judge_clock, look_at_host
from ecrproxy.command.checkup.reach import Contact, ShownCertificate, by_name, describe, split
from ecrproxy.registry.challenges import Challenge

NOW = 1_800_000_000.0
ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
AMAZON = ShownCertificate("Amazon", ["*.dkr.ecr.eu-west-1.amazonaws.com", ECR], NOW - 86400, NOW + 90 * 86400)


class HostTests(SynchronousTestCase):
    """
    A host that the doctor connects to.
    """

    def look(self, *contacts: Contact, url: str = f"https://{ECR}") -> Finding:
        """
        Check a host whose addresses answer so.
        """
        waiting = {each.address: each for each in contacts}
        (found,) = look_at_host("registry", url, list(waiting), waiting.__getitem__, NOW)
        return found

    def test_one_that_answers_is_well(self) -> None:
        """
        Its address and the issuer of its certificate are shown.
        """
        found = self.look(Contact("10.0.0.1", status=401, shown=AMAZON))
        self.assertEqual(Verdict.OK, found.verdict)
        self.assertIn("at 10.0.0.1, certificate of 'Amazon'", found.said)

    def test_all_that_it_says_it_wants_is_read(self) -> None:
        """
        A registry may name Bearer and Basic in a header each: the daemon asks for tokens then, and so does the doctor.
        """
        said = [("WWW-Authenticate", 'Bearer realm="https://a.test"'), ("WWW-authenticate", 'Basic realm="x"')]
        heard = by_name([*said, ("Date", "yesterday"), ("Date", "today")])
        challenge = heard.pop("www-authenticate")
        self.assertEqual(Challenge("bearer", "https://a.test"), Challenge.read([challenge]))
        self.assertEqual({"date": "today"}, heard)

    def test_the_next_address_is_tried(self) -> None:
        """
        One that does not answer is no failure yet.
        """
        found = self.look(
            Contact("2001:db8::1", "Network is unreachable"), Contact("10.0.0.1", status=401, shown=AMAZON)
        )
        self.assertEqual(Verdict.OK, found.verdict)

    def test_one_that_is_not_reached_fails(self) -> None:
        """
        What to open depends on whether it is the registry or a bucket.
        """
        found = self.look(Contact("10.0.0.1", "it does not answer"))
        self.assertEqual(Verdict.FAILED, found.verdict)
        self.assertIn("10.0.0.1: it does not answer", found.said)
        self.assertIn("ecr.dkr", found.advice)
        bucket = self.look(Contact("10.0.0.1", "it does not answer"), url="https://x.s3.eu-west-1.amazonaws.com/a?b=c")
        self.assertIn("gateway endpoint for S3", bucket.advice)
        self.assertNotIn("b=c", repr(bucket))
        self.assertIn("no address", self.look().said)

    def test_tls_that_is_opened_on_its_way_is_told(self) -> None:
        """
        Whether or not this machine trusts the intercepting proxy.
        """
        corporate = ShownCertificate("Corporate Proxy CA", [ECR], NOW - 1, NOW + 90 * 86400)
        trusted = self.look(Contact("10.0.0.1", status=401, shown=corporate))
        self.assertEqual(Verdict.WARNING, trusted.verdict)
        self.assertIn("Corporate Proxy CA", trusted.said)
        unknown = self.look(Contact("10.0.0.1", "unable to get local issuer certificate", 20, corporate))
        self.assertEqual(Verdict.FAILED, unknown.verdict)
        self.assertIn("SSL_CERT_FILE", unknown.advice)
        ours = self.look(Contact("10.0.0.1", "self-signed certificate", 18, corporate), url="https://registry.test")
        self.assertIn("add the CA", ours.advice)

    def test_a_certificate_that_has_ended_is_told_with_the_clock_in_mind(self) -> None:
        """
        A certificate that is not valid yet usually means a wrong clock; one that expires soon is a warning.
        """
        ended = self.look(
            Contact("a", "certificate has expired", 10, ShownCertificate("Amazon", [], 0, NOW - 2 * 86400))
        )
        self.assertIn("has ended, by 2.0 days", ended.said)
        self.assertIn("clock", ended.advice)
        early = self.look(
            Contact("a", "certificate is not yet valid", 9, ShownCertificate("Amazon", [], NOW + 86400, NOW * 2))
        )
        self.assertIn("has not begun to hold", early.said)
        soon = self.look(Contact("a", status=200, shown=ShownCertificate("Amazon", [], 0, NOW + 86400)))
        self.assertEqual((Verdict.WARNING, True), (soon.verdict, "ends in 1.0 days" in soon.said))

    def test_a_certificate_of_somebody_else_is_told_with_its_names(self) -> None:
        """
        The name resolves to another server.
        """
        found = self.look(
            Contact("10.0.0.9", "Hostname mismatch", 62, ShownCertificate("Amazon", ["other.test"], 0, NOW * 2))
        )
        self.assertEqual(Verdict.FAILED, found.verdict)
        self.assertIn("shows a certificate for other.test", found.said)

    def test_plain_http_is_a_warning(self) -> None:
        """
        Stand-ins and tunnels use it; ECR does not.
        """
        self.assertEqual(Verdict.WARNING, self.look(Contact("a", status=200), url="http://registry.test").verdict)

    def test_a_url_is_split(self) -> None:
        """
        Ports default to those of the scheme.
        """
        self.assertEqual(("a.test", 443, True), split("https://a.test/x?y"))
        self.assertEqual(("::1", 5000, False), split("http://[::1]:5000"))

    def test_a_certificate_is_read(self) -> None:
        """
        Its issuer, its names, its validity.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Amazon")])
        moment = dt.datetime(2027, 1, 15, 8, tzinfo=dt.UTC)
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, moment, moment + dt.timedelta(days=1))
        names_ = x509.SubjectAlternativeName([x509.DNSName("a.test")])
        shown = describe(builder.add_extension(names_, critical=False).sign(key, SHA256()))
        self.assertEqual(ShownCertificate("Amazon", ["a.test"], moment.timestamp(), moment.timestamp() + 86400), shown)
        self.assertEqual([], describe(builder.sign(key, SHA256())).names)


class ClockTests(SynchronousTestCase):
    """
    This machine's clock.
    """

    def judge(self, skew: float) -> Finding:
        """
        Judge a clock that is so many seconds ahead.
        """
        date = format_datetime(dt.datetime.fromtimestamp(NOW - skew, dt.UTC), usegmt=True)
        return judge_clock(date, NOW)

    def test_it_is_held_against_the_registrys(self) -> None:
        """
        A minute is fine, at five minutes AWS rejects signatures.
        """
        verdicts = [self.judge(skew).verdict for skew in (0, -30, 90, -90, 400, -400)]
        wanted = [Verdict.OK] * 2 + [Verdict.WARNING] * 2 + [Verdict.FAILED] * 2
        self.assertEqual(wanted, verdicts)
        self.assertIn("400 s ahead of", self.judge(400).said)
        self.assertIn("400 s behind", self.judge(-400).said)

    def test_no_date_is_no_trouble(self) -> None:
        """
        Nor is an unreadable one.
        """
        self.assertEqual([Verdict.OK] * 2, [judge_clock(date, NOW).verdict for date in (None, "yesterday")])


SERVER = ("192.0.2.53", 53)


class NameServerTests(SynchronousTestCase):
    """
    A name server that is queried.
    """

    def ask(self, *, code: int = 0, wrong: bytes | None = None) -> names.LookupResult:
        """
        Query one that answers so.
        """

        def send(server: tuple[str, int], question: bytes) -> bytes:
            self.assertEqual(SERVER, server)
            asked, told = Message(), Message(answer=1, rCode=code)
            asked.fromStr(question)
            told.id, told.queries = asked.id, asked.queries
            (query,) = asked.queries
            if not code:
                told.answers = [RRHeader(b"a.test", 5, payload=Record_CNAME(b"b.test"))]
                told.answers += [
                    RRHeader(b"b.test", query.type, payload=record)
                    for kind, record in ((A, Record_A("10.0.0.1")), (AAAA, Record_AAAA("2001:db8::1")))
                    if kind == query.type
                ]
            return told.toStr() if wrong is None else wrong

        return names.ask_server(SERVER, "a.test", 7, send)

    def test_its_addresses_are_read(self) -> None:
        """
        Of both kinds, behind aliases.
        """
        self.assertEqual(["10.0.0.1", "2001:db8::1"], self.ask().addresses)

    def test_what_it_says_instead_is_told(self) -> None:
        """
        No such name, an error, silence, or an invalid response.
        """
        self.assertEqual(names.LookupResult([]), self.ask(code=3))
        self.assertEqual("answers with error 2", self.ask(code=2).problem)
        self.assertIn("invalid DNS response", self.ask(wrong=b"hello").problem)

        def silent(server: tuple[str, int], question: bytes) -> bytes:
            raise TimeoutError

        self.assertEqual("does not answer", names.ask_server(SERVER, "a.test", 7, silent).problem)

    def judge(self, answer: names.LookupResult | None, system: names.LookupResult) -> Finding:
        """
        Judge the answers of one server and of the host's own resolver.
        """
        (found,) = names.judge_names(ECR, {"8.8.8.8:53": answer} if answer is not None else {}, system)
        return found

    def test_one_that_finds_the_host_is_well(self) -> None:
        """
        So is the host's own resolver, if that is configured.
        """
        known = names.LookupResult(["52.0.0.1"])
        self.assertEqual([Verdict.OK] * 2, [self.judge(each, known).verdict for each in (known, None)])
        self.assertEqual(Verdict.FAILED, self.judge(None, names.LookupResult(problem="no such name")).verdict)

    def test_one_that_is_silent_costs_time(self) -> None:
        """
        The daemon falls back to the host's resolver; it is a warning.
        """
        found = self.judge(names.LookupResult(problem="does not answer"), names.LookupResult(["52.0.0.1"]))
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("PROXY_DNS_RESOLVER=system", found.advice)

    def test_one_that_knows_less_than_the_host_fails(self) -> None:
        """
        The daemon believes the configured server.
        """
        self.assertEqual(Verdict.FAILED, self.judge(names.LookupResult(), names.LookupResult(["10.0.0.1"])).verdict)
        self.assertIn("spelling", self.judge(names.LookupResult(), names.LookupResult()).advice)

    def test_a_vpc_endpoint_that_is_passed_by_is_told(self) -> None:
        """
        If the host's own resolver returns private addresses, and the configured server public ones.
        """
        found = self.judge(names.LookupResult(["52.0.0.1"]), names.LookupResult(["10.0.0.1"]))
        self.assertEqual(Verdict.WARNING, found.verdict)
        self.assertIn("VPC endpoint", found.said)

    def test_addresses_are_asked_of_nobody(self) -> None:
        """
        Nor is this machine.
        """
        self.assertEqual([True, True, True, False], [names.is_local(e) for e in ("::1", "10.0.0.1", "localhost", ECR)])


class MetadataTests(SynchronousTestCase):
    """
    The instance's metadata service.
    """

    def look(
        self,
        answers: Mapping[tuple[str, str], Contact],
        environ: Mapping[str, str] | None = None,
        *,
        needed: bool = True,
    ) -> Finding:
        """
        Check one that answers so, by method and end of the path.
        """

        def ask(method: str, url: str, headers: Mapping[str, str]) -> Contact:
            self.assertTrue(url.startswith("http://169.254.169.254/latest/"))
            return answers.get((method, url.rstrip("/").rpartition("/")[2]), Contact("x", "it does not answer"))

        (found,) = metadata.look_at_metadata(environ or {}, ask, needed=needed)
        return found

    def test_its_role_is_told_and_its_session_is_not(self) -> None:
        """
        Both steps work from here.
        """
        session = Contact("x", status=200, body=b"secret-session")
        role = Contact("x", status=200, body=b"puller")
        found = self.look({("PUT", "token"): session, ("GET", "security-credentials"): role})
        self.assertEqual((Verdict.OK, "answers; the instance has the role puller"), (found.verdict, found.said))
        found = self.look({("PUT", "token"): session, ("GET", "security-credentials"): Contact("x", status=404)})
        self.assertEqual((Verdict.FAILED, "attach an instance profile"), (found.verdict, found.advice))
        self.assertNotIn("secret", repr(found))

    def test_a_hop_limit_that_is_too_small_is_told_from_no_service(self) -> None:
        """
        The session's token does not arrive, though the service exists.
        """
        there = {("GET", "meta-data"): Contact("x", status=401)}
        found = self.look(there)
        self.assertEqual(Verdict.FAILED, found.verdict)
        self.assertIn("--http-put-response-hop-limit 2", found.advice)
        self.assertEqual(Verdict.WARNING, self.look(there, needed=False).verdict)
        self.assertEqual(Verdict.FAILED, self.look({}).verdict)
        self.assertEqual(Verdict.SKIPPED, self.look({}, needed=False).verdict)

    def test_one_that_is_switched_off_is_not_asked(self) -> None:
        """
        Neither by the doctor nor by the daemon.
        """
        off = {"AWS_EC2_METADATA_DISABLED": "true"}
        self.assertEqual(
            [Verdict.WARNING, Verdict.SKIPPED], [self.look({}, off, needed=n).verdict for n in (True, False)]
        )
        refused = {("PUT", "token"): Contact("x", status=403)}
        self.assertEqual([Verdict.FAILED, Verdict.OK], [self.look(refused, needed=n).verdict for n in (True, False)])
