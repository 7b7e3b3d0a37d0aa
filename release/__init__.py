"""
Build reproducible release artifacts: C{make dist}.
"""
