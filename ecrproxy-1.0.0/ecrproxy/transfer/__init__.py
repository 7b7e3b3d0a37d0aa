"""
Bytes on their way: in from a bucket over several connections, out to any number of clients.
"""
