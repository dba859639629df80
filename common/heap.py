"""Gives memory that was freed back to the operating system, where the C library only does so when asked."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Return freed pages between blocks that are in use; does nothing where the C library is not glibc.

    Loading reads a weight, lays it out anew and frees what was read. glibc asks for a little more than a
    block of the same size has, so that hole after hole stays behind: without this, int8 weights took up to
    twice their size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
