"""
End-to-end tests: real programs on both sides of the daemon.
"""
