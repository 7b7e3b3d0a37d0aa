"""
Settings: the table, the parsers, and checks for contradictions.
"""
