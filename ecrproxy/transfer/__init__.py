"""
Transfer blobs: from a bucket over several connections, to any number of clients.
"""
