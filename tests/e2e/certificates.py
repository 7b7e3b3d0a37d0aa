"""
A certificate authority for one test run.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

LIFE = dt.timedelta(days=2)
PROXY = "proxy.example"


@dataclass(frozen=True)
class Certificates:
    """
    The paths of a server's key and chain, and the directory that holds only the CA.
    """

    key: Path
    chain: Path
    ca_directory: Path

    @property
    def ca(self) -> Path:
        """
        Return the path of the CA's certificate, which clients trust.
        """
        return self.ca_directory / "ca.crt"


def name(common: str) -> x509.Name:
    """
    Return a name that has only its common part.
    """
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def build(
    subject: str,
    issuer: str,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    life: dt.timedelta = LIFE,
) -> x509.Certificate:
    """
    Build a certificate: the CA's own if it signs itself, else the server's, for loopback and the recipes' names.

    @param life: how long it is still valid; if negative, how long ago it expired.
    """
    authority = subject == issuer
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LIFE)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if not authority:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName(PROXY)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, SHA256())


def make_client(directory: Path, server: Certificates, authority: str) -> Path:
    """
    Create a CA of clients and a client's certificate of it, in a directory as docker and skopeo want it.

    @return: the directory; the CA of the clients is in its C{clients.pem}.
    """
    directory.mkdir(parents=True)
    ours, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = build(authority, authority, ours.public_key(), ours)
    leaf = build("client", authority, theirs.public_key(), ours)
    (directory / "ca.crt").write_bytes(server.ca.read_bytes())
    (directory / "clients.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (directory / "client.cert").write_bytes(leaf.public_bytes(Encoding.PEM))
    key = theirs.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "client.key").write_bytes(key)
    return directory


def make_certificates(directory: Path, life: dt.timedelta = LIFE) -> Certificates:
    """
    Create a CA, and a server's certificate for the loopback address.
    """
    made = Certificates(directory / "server.key", directory / "server.crt", directory / "ca")
    made.ca_directory.mkdir(parents=True)
    ours, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = build("Test CA", "Test CA", ours.public_key(), ours)
    leaf = build("127.0.0.1", "Test CA", theirs.public_key(), ours, life)
    made.ca.write_bytes(root.public_bytes(Encoding.PEM))
    made.chain.write_bytes(leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
    made.key.write_bytes(theirs.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made
