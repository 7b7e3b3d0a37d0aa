"""
A caching pull-through proxy for Amazon ECR.

C{proxy.py} is the room to read first; docs/architecture.rst is the map.
"""

__version__ = "1.0.0"
