"""
Amazon ECR and its buckets: the token, the connections, and how they are asked without being overrun.
"""
