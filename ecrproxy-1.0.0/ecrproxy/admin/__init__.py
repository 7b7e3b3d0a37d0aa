"""
The operator's port: figures for Prometheus.
"""
