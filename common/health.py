"""`python -m common.health HOST:PORT [NAME]`: exit status 0 where grpc.health.v1 says SERVING, else 1.

For the health checks of containers: no torch, no configuration file. HOST may be `interface:NAME`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.config import fleet_token, load_config
from common.errors import ConfigError
from common.grpc_server import CHANNEL_OPTIONS, bracketed
from common.interceptors import token_metadata
from common.own_address import own_address

TIMEOUT_S = 3.0


def ask(address: str, name: str, token: str = "", timeout_s: float = TIMEOUT_S) -> str:
    """What a service says of itself: SERVING, another word of grpc.health.v1, or why there is no answer.

    Args:
        token: the fleet token, without which ports of the fleet answer nothing.

    Raises:
        ConfigError: the address has no port, or its interface is not there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f'"{address}" is no address of a service: write HOST:PORT')
    target = f"{bracketed(own_address(host))}:{port}"
    metadata = token_metadata(token) if token else ()
    with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            answer = stub.Check(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main() -> int:
    """Ask once and say what the answer is; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.health", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="a service, or readiness")
    parser.add_argument(
        "--fleet-token",
        action="store_true",
        help="send it, as agents and the fleet port ask; from EXPERTMESH_FLEET_TOKEN or ..._FLEET_TOKEN_FILE",
    )
    arguments = parser.parse_args()
    try:
        token = fleet_token(load_config()) if arguments.fleet_token else ""
        answer = ask(arguments.address, arguments.name, token)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{answer}\n")
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
