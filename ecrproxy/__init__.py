"""
A caching pull-through proxy for Amazon ECR.

Start reading at C{proxy.py}; docs/architecture.rst is the overview.
"""

__version__ = "1.0.0"
