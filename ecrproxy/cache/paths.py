"""
Where the files of a digest are, relative to the cache directory.
"""

from __future__ import annotations

from ecrproxy.oci import Digest


def content_path(digest: Digest) -> str:
    """
    Return the path of the content of C{digest}.
    """
    return f"content/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"


def arriving_path(digest: Digest) -> str:
    """
    Return the path of the data of C{digest} while it is downloaded.
    """
    return f"arriving/{digest.algorithm}-{digest.hex}"
