"""
Benchmarks: the daemon and its alternatives, in one run on one machine.

C{python -m bench} prints the table of docs/benchmarks.rst; C{python -m bench.growth} measures large caches.
"""
