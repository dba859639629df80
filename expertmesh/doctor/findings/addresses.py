"""Are the addresses this machine's own, and can the rest of the fleet reach them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expertmesh.doctor.facts.network import Listening
from expertmesh.doctor.finding import Finding, failure, ok
from expertmesh.doctor.setup import is_loopback

SUBJECT = "addresses"
DATA_KEY = "ExpertMesh.dataAddress"
FLEET_KEY = "ExpertMesh.fleetAddress"
AGENT_KEY = "ExpertMesh.agentAddress"
CLIENT_KEY = "ServerConfig.ipAddress"


def judge_addresses(
    found: Sequence[Listening],
    interfaces: dict[str, str],
    *,
    router: str | None,
    num_servers: int,
) -> Iterator[Finding]:
    """Judge every address that a service of this machine listens on.

    Args:
        found: one per key, tried with port 0.
        interfaces: this machine's addresses, to choose from.
        router: host of the router that workers of this machine register at; None on the router's machine.
        num_servers: of the rank table; 1 without one.
    """
    bad = [one for one in found if one.error]
    for one in bad:
        yield _unusable(one, interfaces)
    if bad:
        return
    by_key = {one.key: one.resolved for one in found}
    is_here = router is not None and router in interfaces.values()
    yield from _reach(by_key, "127.0.0.1" if is_here else router, num_servers)
    shown = ", ".join(f"{key.rpartition('.')[2]} {host}" for key, host in by_key.items())
    alone = "; clients on this machine, or in this container, only"
    is_alone = is_loopback(by_key.get(CLIENT_KEY, ""))
    yield ok(SUBJECT, f"this machine's own: {shown}{alone if is_alone else ''}")


def _unusable(one: Listening, interfaces: dict[str, str]) -> Finding:
    own = ", ".join(f"{address} ({name})" for name, address in interfaces.items())
    way_out = f"use one of {own}, or interface:NAME"
    if one.error == "EADDRNOTAVAIL":
        return failure(
            SUBJECT,
            f'{one.key} is "{one.host}", which is not an address of this machine',
            f"cannot listen on {one.resolved}:...: Cannot assign requested address",
            way_out,
        )
    if one.error == "name":
        found = f'{one.key} is "{one.host}", a name that cannot be resolved here'
    else:
        found = f"{one.key}: {one.error}"
    return failure(SUBJECT, found, "the service ends with a sentence like this one", way_out)


def _reach(by_key: dict[str, str], router: str | None, num_servers: int) -> Iterator[Finding]:
    """Loopback where others must come in."""
    is_local = {key: is_loopback(host) for key, host in by_key.items()}
    data_is_local = is_local.get(DATA_KEY, False)
    way_out = f"set {DATA_KEY} to this machine's address on the network of the fleet, or interface:NAME"
    if router is not None and not is_loopback(router):
        for key in (AGENT_KEY, DATA_KEY):
            if is_local.get(key, False):
                yield failure(
                    SUBJECT,
                    f"the router is at {router}, but {key} is {by_key[key]}, which it cannot reach",
                    "PrepareEpoch on expert worker ... failed with UNAVAILABLE: the router calls itself",
                    way_out,
                )
    elif router is None and data_is_local and not is_local.get(FLEET_KEY, True):
        yield failure(
            SUBJECT,
            f"workers of other machines register at {by_key[FLEET_KEY]}, but {DATA_KEY} is "
            f"{by_key[DATA_KEY]}",
            "the link to ep_rank ... could not be made: link ... was not made within 20.0 s",
            way_out,
        )
    elif data_is_local and num_servers > 1:
        yield failure(
            SUBJECT,
            f"the rank table has {num_servers} servers, but {DATA_KEY} is {by_key[DATA_KEY]}",
            "workers of the other servers cannot reach this one",
            way_out,
        )
