"""
What a release is made of, made so that anybody can make the same: C{make dist}.
"""
