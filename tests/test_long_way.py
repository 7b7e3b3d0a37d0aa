"""
What clients see is the same where all requests take the long way: the tests of that, once more without the hot path.
"""

from __future__ import annotations

from types import ModuleType

from tests import test_access_log, test_channel, test_clients, test_ending, test_web
from tests.daemon import DaemonTestCase


def without_hot_path(module: ModuleType) -> dict[str, type[DaemonTestCase]]:
    """
    Make each test case of a module that has a daemon once more, with a daemon that has no hot path.
    """
    return {
        name: type(name, (each,), {"hot_path": False, "__module__": __name__})
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, DaemonTestCase) and each.__module__ == module.__name__
    }


for each in (test_access_log, test_channel, test_clients, test_ending, test_web):
    globals().update(without_hot_path(each))
del each
