"""
How the pages become a site and manuals: `make docs`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ecrproxy import __version__

project = "ecrproxy"
author = "the authors of ecrproxy"
project_copyright = author
version = release = __version__

extensions = ["tables"]
exclude_patterns = ["_build"]
nitpicky = True
smartquotes = False  # it would make one dash of the two before a flag
highlight_language = "text"  # what a block is in, it says itself
today_fmt = "%Y-%m-%d"

html_theme = "furo"
html_title = f"ecrproxy {release}"
html_short_title = "ecrproxy"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

man_pages = [
    ("reference/command", "ecr-proxy", "work with an ecr-proxy daemon that runs, and with its cache", author, 1),
    ("reference/daemon", "ecrproxy", "caching pull-through proxy for Amazon ECR", author, 8),
]
man_make_section_directory = False
