"""
The admin port: metrics, status page, and the API of the command line.
"""
