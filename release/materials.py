"""
The bill of materials: the content of the container, by hash, in CycloneDX.

One lock and one commit always give the same bill: its time is the commit's, and it has no random number.
"""

from __future__ import annotations

import configparser
import json
import os
import sys
import tempfile
from pathlib import Path

from ecrproxy import __version__
from release.archives import output

SPECIFICATION = "1.6"


def project_of(checkout: Path) -> str:
    """
    Write the project's own data in the format that the tool reads.
    """
    settings = configparser.ConfigParser()
    settings.read(checkout / "setup.cfg", "utf-8")
    metadata = settings["metadata"]
    fields = {"name": metadata["name"], "version": __version__}
    fields |= {each: metadata[each] for each in ("description", "license")}
    # A string of TOML is one of JSON, as far as these go.
    return "[project]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


def bill_of(lock: Path, epoch: int) -> str:
    """
    Return the bill of a lock, validated against CycloneDX's schema.

    @raise ReleaseError: if it is invalid.
    """
    with tempfile.TemporaryDirectory(prefix="bill-") as folder:
        project = Path(folder) / "pyproject.toml"
        project.write_text(project_of(lock.parent), "utf-8")
        return output(
            *(sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible", "--validate"),
            *("--spec-version", SPECIFICATION, "--output-format", "JSON", "--pyproject", project, lock),
            env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
        )
