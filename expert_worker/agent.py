"""The expert worker's parent: its server, its executor and its registration, put together. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from importlib import metadata
from pathlib import Path

from common.config import Config, fleet_token
from common.config_rules import WILDCARDS
from common.errors import CheckpointError, ConfigError
from common.grpc_server import RunningServer, bracketed, start_server
from common.interceptors import FleetTokenInterceptor
from common.own_address import own_address
from expert_worker.control_service import ControlService
from expert_worker.executor_link import EXECUTOR_MODULE, ExecutorLink
from expert_worker.messages import Configure
from expert_worker.registration import Registration
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = "expertmesh.v1.ExpertWorkerService"
STOP_GRACE_S = 0.5


class Agent:
    """One expert worker, from its first line of output to its last."""

    def __init__(self, config: Config, executor_module: str = EXECUTOR_MODULE) -> None:
        if config.router is None:
            raise ConfigError(
                "no router is configured: set ExpertMesh.router or --router to HOST:PORT of its fleet port"
            )
        self.config = config
        self.worker_id = config.worker_id or _make_worker_id(config)
        self._data_address = own_address(config.data_address)
        self.executor = ExecutorLink(
            Configure(
                config.device,
                config.threads,
                self._data_address,
                config.exchange,
                config.same_host_transport,
            ),
            executor_module,
        )
        self._token = fleet_token(config)
        self.registration = Registration(
            config.router,
            self._token,
            config.register_timeout_s,
            self._introduction,
            self.executor.has_started,
            self.executor.is_new,
            self.executor.forget,
        )
        # Its own view of the checkpoint, if it has one: the router's path may not exist on this host.
        self._model_path = Path(config.model_path).resolve() if config.model_path is not None else None
        self._server: RunningServer | None = None
        self._useless: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def listen(self) -> str:
        """Open the port; return the line that says where.

        Raises:
            ConfigError: the address cannot be bound.
        """
        service = ControlService(
            self.executor, self.registration, self._model_path, self._data_address, self._be_useless
        )
        self._server = await start_server(
            self.config.agent_host,
            self.config.agent_port,
            lambda server: fleet_pb2_grpc.add_ExpertWorkerServiceServicer_to_server(service, server),
            (SERVICE,),
            [FleetTokenInterceptor(self._token)],
        )
        return f"listening agent={self._server.address}"

    async def run(self) -> None:
        """Serve until cancelled, or until this worker is of no use.

        Raises:
            ExpertMeshError: the executor could not start, the router could not be reached or refuses this
                worker, or the checkpoint cannot give what the worker was asked to hold.
        """
        if self._server is not None:
            await self._server.set_serving(True)
        work: list[asyncio.Future[None]] = [
            asyncio.ensure_future(self.executor.run()),
            asyncio.ensure_future(self.registration.run()),
            self._useless,
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            await self.executor.stop()
            for one in work:
                one.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def close(self) -> None:
        """Close the port."""
        if self._server is not None:
            await self._server.set_serving(False)
            await self._server.stop(STOP_GRACE_S)

    def _be_useless(self, error: CheckpointError | ConfigError) -> None:
        if not self._useless.done():
            self._useless.set_exception(error)

    def _introduction(self) -> pb.RegisterRequest:
        ready = self.executor.ready
        device = ready.device if ready is not None else self.config.device
        return pb.RegisterRequest(
            worker_id=self.worker_id,
            incarnation=self.executor.incarnation,
            address=self._advertised(),
            device=device,
            arithmetic=ready.arithmetic if ready is not None else "",
            version=metadata.version("expertmesh"),
            data_address=self._data_address,
            device_id=_device_id(self.config, device),
        )

    def _advertised(self) -> str:
        """HOST:PORT at which the router finds this agent."""
        host, port = self.config.agent_host, self.config.agent_port
        if self._server is not None:
            host, port = self._server.host, self._server.port
        if named := self.config.advertise_address:
            host, colon, named_port = named.rpartition(":")
            if colon and named_port.isdigit():
                return named
            host = named
        elif host in WILDCARDS:
            host = self._data_address
        return f"{bracketed(host)}:{port}"


def _device_id(config: Config, device: str) -> int | None:
    """The number of this worker's device on its server: as configured, else as torch counts it."""
    kind, _, number = device.partition(":")
    if config.device_id is None and kind != "cpu" and number.isdecimal():
        return int(number)
    return config.device_id


def _make_worker_id(config: Config) -> str:
    """The host's name, and what tells this worker from others on the host."""
    host = "".join(char if char.isalnum() or char in "-_." else "-" for char in socket.gethostname())
    return f"{host.lstrip('-_.') or 'worker'}-{config.agent_port or secrets.token_hex(3)}"
