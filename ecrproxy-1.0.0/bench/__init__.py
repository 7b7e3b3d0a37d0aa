"""
Side by side: the daemon, and what its users would take instead, in one run on one machine.

C{python -m bench} prints the table of docs/benchmarks.rst; C{python -m bench.growth} measures large caches.
"""
