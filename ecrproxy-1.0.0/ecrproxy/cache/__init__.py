"""
The cache directory: what is in it, what is arriving, what is proven, and what has to go.
"""
