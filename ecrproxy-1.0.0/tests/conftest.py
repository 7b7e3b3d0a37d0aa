"""
How the tests that make up their own examples are run: the same examples each time, and not too many.

C{HYPOTHESIS_PROFILE=thorough} takes other ones each time, and twenty times as many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,  # this machine's time says nothing
    max_examples=100,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("same"), derandomize=False, max_examples=2000, stateful_step_count=60
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
