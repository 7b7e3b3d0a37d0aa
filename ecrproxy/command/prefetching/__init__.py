"""
C{ecr-proxy prefetch}: download images into the cache before clients pull them, through the running daemon.
"""

from __future__ import annotations

from typing import Final

PASSWORD: Final = "ECR_PROXY_PASSWORD"  # noqa: S105 (a variable's name)
