"""
What the daemon writes to its log: one line, or one JSON object, for each thing that an operator may ask about.
"""
