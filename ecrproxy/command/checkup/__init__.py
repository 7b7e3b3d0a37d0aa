"""
Checks of everything that the daemon depends on, for C{ecr-proxy doctor}.
"""
