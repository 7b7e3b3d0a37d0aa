"""
Images brought into the cache before anybody asks for them, through the running daemon.
"""

from __future__ import annotations

from typing import Final

PASSWORD: Final = "ECR_PROXY_PASSWORD"  # noqa: S105 (a variable's name)
