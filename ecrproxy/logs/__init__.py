"""
The daemon's log: one line or one JSON object for each event.
"""
