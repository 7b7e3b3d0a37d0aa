"""
Blobs: from the cache, or fetched once for all requests that want them.
"""
