"""
Worker processes: how the parent manages them, and the messages between them.
"""
