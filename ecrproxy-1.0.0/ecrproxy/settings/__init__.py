"""
What the daemon is told: the table of settings, how their texts are read, and what is wrong with them.
"""
