"""
The cache as requests see it.
"""
