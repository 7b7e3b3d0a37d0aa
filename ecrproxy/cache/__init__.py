"""
The cache directory: content, transfers in progress, the index, verification and eviction.
"""
