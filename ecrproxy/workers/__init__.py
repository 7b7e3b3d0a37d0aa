"""
The parent and its worker processes: how they are started, replaced and ended, and the messages between them.
"""
