"""
Run the real daemon for a long time over a stand-in for ECR that misbehaves: C{make soak}.
"""
