"""What the image is made of where no registry is at hand: Debian's packages, and wheels from pip.

Both are kept in .cache/compose for the next run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.compose.engine import Engine
from tests.source import ROOT

CACHE = ROOT / ".cache" / "compose"
BASE_IMAGE = "expertmesh-tests-base:latest"
PACKAGES = "python3-minimal,python3-venv,libstdc++6"
BOOTSTRAP_S = 300.0
DOWNLOAD_S = 400.0


def build_arguments(engine: Engine, wheels: Path) -> dict[str, str]:
    """What `docker compose build` takes from the environment.

    BASE_IMAGE in the environment names an image with Python, which is then built on as a user would.
    """
    if named := os.environ.get("BASE_IMAGE"):
        return {"BASE_IMAGE": named}
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no base image: set BASE_IMAGE=python:3.12-slim, or install mmdebstrap to make one")
    engine.docker("import", str(_root_file_system()), BASE_IMAGE, timeout_s=120)
    version = engine.docker(
        *("run", "--rm", "--network=none", BASE_IMAGE, "python3", "-c"),
        "import sys; print('%d.%d' % sys.version_info[:2])",
    )
    _download(version, wheels)
    return {"BASE_IMAGE": BASE_IMAGE, "BUILD_PACKAGES": "", "PIP_NO_INDEX": "1", "BUILD_NETWORK": "none"}


def _root_file_system() -> Path:
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    archive = CACHE / f"{codename}-{platform.machine()}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = archive.with_suffix(".unfinished.tar")
        _run(
            *("mmdebstrap", "--quiet", "--variant=essential", "--dpkgopt=force-unsafe-io"),
            *(f"--include={PACKAGES}", codename, str(unfinished)),
            timeout_s=BOOTSTRAP_S,
        )
        unfinished.rename(archive)
    return archive


def _download(version: str, wheels: Path) -> None:
    """Let pip fetch every wheel from its own sources, for the Python of the base image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    kept = CACHE / f"wheels-{version}"
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(kept)),
        *("--only-binary=:all:", "--python-version", version),
        *project["project"]["dependencies"],
        *project["build-system"]["requires"],
        timeout_s=DOWNLOAD_S,
    )
    for wheel in kept.glob("*.whl"):
        os.link(wheel, wheels / wheel.name)


def _run(*command: str, timeout_s: float) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stderr[-4000:]}"
