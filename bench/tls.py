"""
A certificate for the loopback address, for one run.
"""

from __future__ import annotations

import datetime as dt
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from bench.processes import LOCAL

CIPHER = "TLS_AES_128_GCM_SHA256"
"""What Docker and containerd agree on with every server here: Go puts it first, and the servers follow their client."""


@dataclass(frozen=True)
class Certificate:
    """
    The files of a self-signed certificate.
    """

    key: Path
    chain: Path

    def context(self) -> ssl.SSLContext:
        """
        Return a context for clients in Python that trust it.
        """
        return ssl.create_default_context(cafile=str(self.chain))


def make_certificate(directory: Path) -> Certificate:
    """
    Create key and certificate in C{directory}.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOCAL))]), critical=False)
        .sign(key, SHA256())
    )
    made = Certificate(directory / "bench.key", directory / "bench.crt")
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    made.chain.write_bytes(certificate.public_bytes(Encoding.PEM))
    return made
