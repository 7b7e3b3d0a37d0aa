"""
The command line tool C{ecr-proxy}, for use with a running daemon.

Each subcommand is a module that imports quickly: large modules are imported when they are used.
"""
