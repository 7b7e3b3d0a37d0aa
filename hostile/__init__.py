"""
What the daemon keeps of its promises while everything around it misbehaves: C{make hostile}.

Each row is an adversity, each column a promise, each cell what was measured.
"""
