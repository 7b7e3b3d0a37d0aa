"""
The parent and its worker processes: started, replaced and ended; and what they tell each other.
"""
