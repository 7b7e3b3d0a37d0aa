"""
Configure Hypothesis: the same examples in each run, and not too many. Free what tests leave.

C{HYPOTHESIS_PROFILE=thorough} uses different ones in each run, and twenty times as many.
"""

from __future__ import annotations

import gc
import itertools
import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,  # timings on this machine say nothing
    max_examples=100,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("same"), derandomize=False, max_examples=2000, stateful_step_count=60
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TOGETHER = 100
"""Number of tests after which their daemons are freed: these are cycles, of which Python would keep gigabytes."""
_ended = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """
    Free what the latest tests have left.
    """
    if next(_ended) % TOGETHER == 0:
        gc.collect()
