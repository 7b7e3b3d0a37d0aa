"""
Code and Message of a bucket's error, S3's XML, as text that may be shown. Pure.

A bucket's error may repeat the request. Nothing that looks like a URL, a signature or part of a query is kept, and
no other element of the XML is read: C{CanonicalRequest} and C{StringToSign} contain the presigned query.
"""

from __future__ import annotations

import re
from typing import Final
from xml.sax.saxutils import unescape

_READ: Final = 16 * 2**10
"""Maximum bytes of an error that are parsed: S3's have some 300, or 2 KiB with a repeated request."""
_LENGTH: Final = 300
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9._-]{1,64})</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]{1,2000})</Message>")
_SECRET: Final = re.compile(r"://|amz-|[a-z]=|%[0-9a-f]{2}|.{200}", re.IGNORECASE)


def said_by_bucket(body: bytes) -> str:
    """
    Return C{Code: Message} from the body of a bucket's error; empty if it has no code.
    """
    text = body[:_READ].decode("utf-8", "replace")
    code, message = _CODE.search(text), _MESSAGE.search(text)
    if code is None:
        return ""
    words = unescape(message[1], {"&quot;": '"', "&apos;": "'"}).split() if message else []
    shown = " ".join("[...]" if _SECRET.search(word) else word for word in words)
    shown = "".join(letter for letter in shown if letter.isprintable())[:_LENGTH]
    return f"{code[1]}: {shown}" if shown else code[1]
