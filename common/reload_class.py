"""How a change of a configured value takes effect while the services run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReloadClass:
    """The class of one key: "hot", "drain" or "restart". `needs` ends the sentence "..., but that needs"."""

    name: str
    needs: str = ""


HOT = ReloadClass("hot")
"""From the next step or the next request on."""
DRAIN = ReloadClass(
    "drain",
    "the running requests to finish: stop the router, which waits for them, and start it with the new value; "
    "its expert workers can go on",
)
ROUTER = ReloadClass("restart", "another start of the router: stop it and start it with the new value")
WORKERS = ReloadClass(
    "restart", "another start of the expert workers: stop and start them with the new value"
)
FLEET = ReloadClass(
    "restart",
    "another start of the router and its expert workers: stop them and start them with the new value",
)
