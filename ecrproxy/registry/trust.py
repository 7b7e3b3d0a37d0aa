"""
The CAs that registries and buckets must have certificates of: the system's, or those of C{SSL_CERT_FILE}.
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
        self._path, self._files, self._begun = path, Files([path]), False
        seen, read = self.load()
        if isinstance(read, OSError):
            raise read
        self.use((seen, read))
        self._begun = True

    def load(self) -> tuple[Sequence[tuple[int, ...]], CertificateOptions | OSError]:
        """
        Read the CAs. Blocks, and changes nothing.

        @return: what L{use} takes.
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


def _require_authorities(path: str) -> None:
    """
    See that a file has a CA.

    OpenSSL does without a file that has none, as when somebody is still writing it: then no certificate of upstream's
    would be good before the next look. At the start it may be empty: all CAs may be in OpenSSL's directory.

    @raise OSError: if it has none.
    """
    try:
        SSL.Context(SSL.TLS_METHOD).load_verify_locations(path)
    except SSL.Error:
        raise OSError(errno.EINVAL, "it holds no PEM certificate", path) from None
