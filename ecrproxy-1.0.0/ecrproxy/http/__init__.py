"""
The clients' side: connections, resources, and how an answer becomes a response.
"""
