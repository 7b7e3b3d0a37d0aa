"""
Access control and limits: which clients may pull what, and how much they may use.
"""
