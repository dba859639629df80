"""A gRPC server as every port of expertmesh has it: one address, reflection, health, limits, errors."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from common.errors import ConfigError
from common.interceptors import ErrorInterceptor
from common.own_address import own_address

MAX_MESSAGE_BYTES = 16 << 20
"""A prompt of a million tokens fits."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # gRPC would send every call through http_proxy, calls to 127.0.0.1 as well.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
"""For channels between services of a fleet."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RunningServer:
    """A server that listens. `health` answers for its names; all are NOT_SERVING at first."""

    def __init__(
        self, server: grpc.aio.Server, host: str, port: int, health: HealthServicer, names: Sequence[str]
    ) -> None:
        self._server = server
        self._names = tuple(names)
        self.host = host
        self.port = port
        self.health = health

    @property
    def address(self) -> str:
        """HOST:PORT, as clients write it."""
        return f"{bracketed(self.host)}:{self.port}"

    async def set_serving(self, is_serving: bool) -> None:
        """Set every health name of this server."""
        for name in self._names:
            await self.health.set(name, SERVING if is_serving else NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` to end, then cancel them."""
        await self._server.stop(grace_s)

    async def wait_stopped(self) -> None:
        """Return when the server has stopped."""
        await self._server.wait_for_termination()


async def start_server(
    host: str,
    port: int,
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> RunningServer:
    """Listen on one address and serve.

    Args:
        host: an address of this host, or `interface:NAME`; see RunningServer.host.
        port: 0 takes a free one; see RunningServer.port.
        service_names: full names for reflection and health; health also answers for "".
        interceptors: outermost first; errors are mapped outside of all of them.

    Raises:
        ConfigError: the address cannot be bound.
    """
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=SERVER_OPTIONS)
    add_services(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    listed = (
        *service_names,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(listed, server)
    host = own_address(host)
    address = f"{bracketed(host)}:{port}"
    _check_free(host, port)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(_cannot_listen(address, str(error))) from None
    if bound == 0:
        raise ConfigError(_cannot_listen(address, "the address cannot be bound"))
    running = RunningServer(server, host, bound, health, ("", *service_names))
    await running.set_serving(False)
    await server.start()
    return running


def bracketed(host: str) -> str:
    """`host` as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _check_free(host: str, port: int) -> None:
    """Ask the kernel for the address first: its reason is clearer than gRPC's, which only logs it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # Binding alone succeeds beside a socket that was bound with SO_REUSEADDR but listens.
            probe.listen(1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(_cannot_listen(f"{bracketed(host)}:{port}", reason)) from None


def _cannot_listen(address: str, reason: str) -> str:
    return f"cannot listen on {address}: {reason}; choose another address or port in the configuration"
