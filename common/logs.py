"""How a service logs: one line per event, to stderr; stdout stays for the lines other programs read."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s"


def configure_logging(level: str, service: str) -> None:
    """Send the log of this process to stderr. `service` names the process in every line."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=FORMAT.format(service=service.replace("%", "%%")),
        force=True,
    )
    # asyncio and grpc log their own housekeeping at these levels.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("grpc").setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Log from another level on."""
    logging.getLogger().setLevel(level.upper())
