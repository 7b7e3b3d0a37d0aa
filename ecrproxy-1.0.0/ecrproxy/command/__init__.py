"""
C{ecr-proxy}: what a person does with a daemon that runs.

Each subcommand is a module of its own. Importing one costs little: what is large is imported when it is used.
"""
