"""
Headers and errors of upstream and clients at their maximum length: parsing them delays nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.byte_ranges import Ranges
from ecrproxy.http.conditions import matches
from ecrproxy.oci import RegistryError, accepted_types, query_values
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.headers import told_part
from ecrproxy.registry.links import next_target
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import asked_wait
from tests.routes import route_to

LENGTH = 2 * 16 * 2**10
"""Twice the limit for headers; parsing in quadratic time takes seconds at this length."""
PIECES = (
    *("a", "a-", "a_", "__", "-", "/", "a/", "..", "%", "%3A", ":", "=", "&", "&=", "a=b&", ",", ", ", ";", "; ", " "),
    *("q=0.", '"', "\\", '\\"', '"\\', "<", "<>", "<a>;", 'rel="', "<Code>", "<Message>", "{", "[", '{"errors":['),
    *("token ", "1 ", "Mon, ", "Jan ", "0", "9-", "bytes=", "(", ")", "+", "#", "?", "://"),
)
READERS: dict[str, Callable[[str], object]] = {
    "a target": lambda text: route_to("/v2/" + text),
    "a name": lambda text: route_to(f"/v2/{text}/manifests/latest"),
    "a reference": lambda text: route_to("/v2/a/manifests/" + text),
    "a query": query_values,
    "Accept": lambda text: accepted_types([text]),
    "If-None-Match": lambda text: matches(text, '"x"'),
    "Range": Ranges.parse,
    "Content-Range": lambda text: told_part("bytes " + text, 0, None),
    "Link": next_target,
    "Retry-After": lambda text: asked_wait(text, text),
    "a refusal": lambda text: Refusal.read(403, text.encode(), challenged=False).is_about_token,
    "a bucket's error": lambda text: said_by_bucket(text.encode()),
}


class ReadersTests(SynchronousTestCase):
    def test_take_time_in_proportion_to_what_they_read(self) -> None:
        for what, read in READERS.items():
            for piece in PIECES:
                for start in ("", '"', "bytes=0-"):
                    text = start + piece * (LENGTH // len(piece))
                    began = time.process_time()
                    with contextlib.suppress(RegistryError, LookupError):
                        read(text)
                    self.assertLess(time.process_time() - began, 1, (what, start + piece))
