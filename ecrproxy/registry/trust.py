"""
The CAs that registries and buckets must have certificates of: the system's, or those of C{SSL_CERT_FILE}.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

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
"""What the log calls them."""


@implementer(IPolicyForHTTPS)
class Trust:
    """
    Begins TLS with upstream. The CAs are read once for all connections: that takes 10 ms and more.

    To read them again takes L{load}, which blocks, and L{use}.

    @param path: the file that OpenSSL reads, which need not be there. It may know a directory, too, where it looks for
        a CA that is not in the file while it verifies a certificate.
    @raise OSError: if it is no file.
    """

    def __init__(self, path: str) -> None:
        self._path, self._files = path, Files([path])
        seen, read = self.load()
        if isinstance(read, OSError):
            raise read
        self.use((seen, read))

    def load(self) -> tuple[Sequence[tuple[int, ...]], CertificateOptions | OSError]:
        """
        Read the CAs. Blocks, and changes nothing.

        @return: what L{use} takes.
        """
        seen = self._files.seen()
        try:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # as OpenSSL does
                require_regular(self._path)
        except OSError as problem:
            return seen, problem
        options = CertificateOptions(trustRoot=platformTrust())
        options.getContext()  # reads
        return seen, options

    def use(self, loaded: tuple[Sequence[tuple[int, ...]], CertificateOptions | OSError]) -> None:
        """
        Use what was read for the connections that begin from now on. If it can't be used, all is as it was.
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
        Return True if the file is another than was read. Blocks.
        """
        return self._files.changed()

    def creatorForNetloc(self, hostname: bytes, port: int) -> ClientTLSOptions:  # noqa: ARG002
        """
        Return what begins connections to a host, whose certificate must name it.
        """
        return ClientTLSOptions(self._options.clientConnectionForTLS, hostname.decode("ascii"))
