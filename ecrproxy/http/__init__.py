"""
The client side: connections, resources and responses.
"""
