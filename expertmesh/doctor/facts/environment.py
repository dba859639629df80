"""The variables that the services would inherit."""

from __future__ import annotations

import os


def gather_environment() -> dict[str, str]:
    """Return all of them."""
    return dict(os.environ)
