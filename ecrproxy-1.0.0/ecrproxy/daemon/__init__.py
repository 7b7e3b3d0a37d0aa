"""
The process, or processes: ports, certificates, signals, and how all of it ends.
"""
