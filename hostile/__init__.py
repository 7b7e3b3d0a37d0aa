"""
Measure which promises the daemon keeps while everything around it misbehaves: C{make hostile}.

Each row is an adversity, each column a promise, each cell a measurement.
"""
