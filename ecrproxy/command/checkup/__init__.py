"""
What a daemon stands on, looked at piece by piece: for the person who has to make it work.
"""
