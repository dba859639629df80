"""Connects to a peer, and asks whether it is the fleet port of a router."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass, replace

from common.config import Config, fleet_token
from common.errors import ConfigError
from common.health import ask
from expertmesh.doctor.setup import split_address
from protos import fleet_pb2

CONNECT_TIMEOUT_S = 3.0
FLEET_SERVICE = fleet_pb2.DESCRIPTOR.services_by_name["FleetService"].full_name


@dataclass(frozen=True, slots=True)
class Peer:
    """What came of connecting to a peer.

    Attributes:
        failure: empty where it worked, else "refused", "timed out", "name", "unreachable" or what else it is.
        health: what grpc.health.v1 says there: a status, or the code and sentence of the refusal.
    """

    address: str
    failure: str
    waited_s: float
    health: str = ""


def ask_router(address: str, config: Config | None) -> Peer:
    """Connect to a router's fleet port and ask for its health, with this machine's fleet token."""
    try:
        host, port = split_address(address)
        peer = try_connecting(address, host, port)
        return peer if peer.failure else replace(peer, health=ask(address, FLEET_SERVICE, _token(config)))
    except ConfigError as error:
        return Peer(address, str(error), 0.0)


def _token(config: Config | None) -> str:
    try:
        return "" if config is None else fleet_token(config)
    except ConfigError:
        return ""  # a check of its own says so


def try_connecting(address: str, host: str, port: int) -> Peer:
    """Open a connection to a peer and close it, within CONNECT_TIMEOUT_S."""
    began_s = time.monotonic()
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT_S):
            failure = ""
    except TimeoutError:
        failure = "timed out"
    except socket.gaierror:
        failure = "name"
    except ConnectionRefusedError:
        failure = "refused"
    except OSError as error:
        unreachable = (errno.EHOSTUNREACH, errno.ENETUNREACH)
        failure = "unreachable" if error.errno in unreachable else error.strerror or str(error)
    return Peer(address, failure, time.monotonic() - began_s)
