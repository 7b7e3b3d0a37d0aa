"""
Make C{ecr-proxy} known to twistd. Every run of twistd imports this file, so it holds nothing else.
"""

from twisted.application.service import ServiceMaker

ecr_proxy = ServiceMaker("ecr-proxy", "ecrproxy.tap", "A caching pull-through proxy for Amazon ECR.", "ecr-proxy")
