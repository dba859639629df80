"""Does the router answer that the workers of this machine shall register at?"""

from __future__ import annotations

from expertmesh.doctor.facts.peer import Peer
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok

SUBJECT = "router"
SYMPTOM = "expert worker ... could not register with the router at {address} within 60 s"


def judge_peer(peer: Peer | None) -> Finding:
    """Say what the answer of a peer, or its silence, means."""
    if peer is None:
        return not_applicable(SUBJECT, "no router is named: --router HOST:PORT or ExpertMesh.router")
    symptom = SYMPTOM.format(address=peer.address)
    waited = f"after {peer.waited_s:.1f} s"
    match peer.failure:
        case "":
            return _answered(peer)
        case "refused":
            return failure(
                SUBJECT,
                f"{peer.address} refused the connection: the host is there, and nothing listens on that port",
                symptom,
                "start the router; look whether it listens on this address (fleetAddress, else dataAddress, "
                "is loopback unless configured) and this port (fleetPort, 1028)",
            )
        case "timed out":
            return failure(
                SUBJECT,
                f"{peer.address} did not answer {waited}: a firewall drops what is sent there, or the host "
                "is off",
                symptom,
                "let this machine through to the router on every port above 1024, and back (docs/deploy.md)",
            )
        case "name":
            return failure(
                SUBJECT,
                f"the host of {peer.address} cannot be resolved on this machine",
                symptom,
                "write its address, or add the name to DNS or /etc/hosts; in compose, use one network",
            )
        case "unreachable":
            return failure(
                SUBJECT,
                f"there is no route to {peer.address}, or a firewall says so",
                symptom,
                "look at ip route get HOST, and at the firewall of the router's machine",
            )
        case other:
            return failure(
                SUBJECT,
                f"connecting to {peer.address} failed: {other}",
                symptom,
                "write HOST:PORT of the router",
            )


def _answered(peer: Peer) -> Finding:
    if peer.health in ("SERVING", "NOT_SERVING"):
        return ok(SUBJECT, f"{peer.address} is a fleet port, and takes this machine's fleet token")
    if peer.health.startswith("UNAUTHENTICATED"):
        return failure(
            SUBJECT,
            f"{peer.address} answers, and refuses this machine's fleet token",
            f"the router at {peer.address} refuses expert worker ...: the fleet token is missing or wrong",
            "copy the router's token to this machine: one file, the same everywhere",
        )
    if peer.health.startswith(("UNIMPLEMENTED", "NOT_FOUND")):
        return failure(
            SUBJECT,
            f"{peer.address} is a gRPC server, and not the fleet port of a router",
            f"the router at {peer.address} refuses expert worker ...: Method not found!; "
            "ExpertMesh.router must name the router's fleet port",
            "name the fleet port: fleetPort, 1028 by default",
        )
    return failure(
        SUBJECT,
        f"{peer.address} takes connections, but is no gRPC server that answers ({peer.health})",
        SYMPTOM.format(address=peer.address),
        "name the fleet port of the router; look for another program or a proxy on that port",
    )
