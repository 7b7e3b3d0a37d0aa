"""
The daemon's processes: ports, certificates, signals, shutdown.
"""
