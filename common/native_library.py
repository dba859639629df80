"""The compiled library of common/native: where it is, whether it can be used, and its paths."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from common.errors import ConfigError
from common.native.compiler import LIBRARY

VERSION = 10
PATHS = ("portable", "avx2", "avx512_vnni")
"""The ways through the kernels, in the order of their numbers there."""


@cache
def open_library(library: Path = LIBRARY) -> ctypes.CDLL:
    """Open a built library.

    Raises:
        ConfigError: the file is missing, cannot be loaded, or is of another version.
    """
    again = "install expertmesh again where g++ or clang++ is on PATH"
    if not library.exists():
        raise ConfigError(f"the native kernels were not built ({library.name} is missing): {again}")
    try:
        opened = ctypes.CDLL(str(library.resolve()))
        version = opened.int8_version()
    except (OSError, AttributeError) as error:
        raise ConfigError(f"the native kernels cannot be loaded ({error}): {again}") from error
    if version != VERSION:
        raise ConfigError(f"the native kernels have version {version} and not {VERSION}: {again}")
    return opened


def best_path(library: ctypes.CDLL) -> str:
    """Return the best of PATHS that this processor can take."""
    return PATHS[library.int8_best_path()]


def available_paths(library: Path = LIBRARY) -> tuple[str, ...]:
    """Return the paths that this processor can take, the best one last. Raises ConfigError."""
    return PATHS[: open_library(library).int8_best_path() + 1]


@cache
def why_unavailable() -> str | None:
    """Return why the installed kernels cannot be used here, or None; looked for once, at the first call."""
    try:
        open_library()
    except ConfigError as error:
        return str(error)
    return None
