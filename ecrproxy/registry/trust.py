"""
The CAs that may certify registries and buckets: the system's, or those of C{SSL_CERT_FILE}.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Final

from OpenSSL import SSL
from twisted.internet._sslverify import ClientTLSOptions
from twisted.internet.ssl import CertificateOptions, platformTrust
from twisted.logger import Logger
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ecrproxy.files import Files, require_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

log = Logger()

AUTHORITIES: Final = "The CAs of upstream"
"""Their name in the log."""


@implementer(IPolicyForHTTPS)
class Trust:
    """
    Creates TLS connections upstream. The CAs are read once for all connections, because that takes more than 10 ms.

    They are reloaded by L{load}, which blocks, and L{use}.

    @param path: OpenSSL's file of CAs, which may be missing. OpenSSL may also have a directory, where it looks for
        CAs that are not in the file while it verifies a certificate.
    @raise OSError: if it is not a regular file.
    """

    def __init__(self, path: str) -> None:
        self._path, self._files, self._begun = path, Files([path]), False
        seen, read = self.load()
        if isinstance(read, OSError):
            raise read
        self.use((seen, read))
        self._begun = True

    def load(self) -> tuple[Sequence[tuple[int, ...]], CertificateOptions | OSError]:
        """
        Read the CAs. Blocks, and changes nothing.

        @return: the argument of L{use}.
        """
        seen = self._files.seen()
        try:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # as OpenSSL does
                require_regular(self._path)
                if self._begun:
                    _require_authorities(self._path)
        except OSError as problem:
            return seen, problem
        options = CertificateOptions(trustRoot=platformTrust())
        options.getContext()  # reads
        return seen, options

    def use(self, loaded: tuple[Sequence[tuple[int, ...]], CertificateOptions | OSError]) -> None:
        """
        Use the CAs that were read for new connections. If they can't be used, nothing changes.
        """
        seen, read = loaded
        self._files.note(seen)
        if isinstance(read, OSError):
            said = "{what}: {path} can't be read: {why}; what was read before stays in use"
            log.error(said, what=AUTHORITIES, path=self._path, why=read.strerror)
        else:
            self._options = read

    def changed(self) -> bool:
        """
        Return True if the file has changed since it was read. Blocks.
        """
        return self._files.changed()

    def creatorForNetloc(self, hostname: bytes, port: int) -> ClientTLSOptions:  # noqa: ARG002
        """
        Return the TLS settings for a host, whose certificate must name it.
        """
        return ClientTLSOptions(self._options.clientConnectionForTLS, hostname.decode("ascii"))


def _require_authorities(path: str) -> None:
    """
    Check that a file has a CA.

    OpenSSL accepts a file without any, for example one that is being written: then no certificate upstream
    would be valid until the next check. At startup it may be empty: all CAs may be in OpenSSL's directory.

    @raise OSError: if it has none.
    """
    try:
        SSL.Context(SSL.TLS_METHOD).load_verify_locations(path)
    except SSL.Error:
        raise OSError(errno.EINVAL, "it holds no PEM certificate", path) from None
