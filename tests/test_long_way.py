"""
Clients see the same if all requests take the long way: these tests run again without the hot path.
"""

from __future__ import annotations

from types import ModuleType

from tests import test_access_log, test_channel, test_clients, test_ending, test_web
from tests.daemon import DaemonTestCase


def without_hot_path(module: ModuleType) -> dict[str, type[DaemonTestCase]]:
    """
    Repeat each test case of a module that has a daemon with a daemon without hot path.
    """
    return {
        name: type(name, (each,), {"hot_path": False, "__module__": __name__})
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, DaemonTestCase) and each.__module__ == module.__name__
    }


for each in (test_access_log, test_channel, test_clients, test_ending, test_web):
    globals().update(without_hot_path(each))
del each
