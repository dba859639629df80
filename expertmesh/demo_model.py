"""Where the trained demo model of a source checkout is: what is served when nobody says what."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / "examples" / "demo_model"


def demo_model() -> Path | None:
    """The checkpoint's directory; None where there is no examples/, as in an installed wheel."""
    return DIRECTORY if (DIRECTORY / "config.json").is_file() else None
