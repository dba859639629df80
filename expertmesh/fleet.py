"""A router and its expert workers on this machine: starts them, replaces a worker that dies, stops them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.config import TOKEN_VARIABLE, Config, load_config
from common.config_file import VARIABLES
from common.environment import RANK_TABLE_VARIABLE, rank_table_file
from common.errors import CheckpointError, ConfigError, ControlError
from common.preflight import require
from common.restart_delay import RestartDelay
from expertmesh.preflight import together_here
from expertmesh.processes import OnLine, Processes, Service, new_token
from expertmesh.visible_devices import one_for_each

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r"(\w+)=(\S+)")


class ServiceEnded(ControlError):
    """A service ended that should be running. `status` is its exit status."""

    def __init__(self, service: Service, status: int) -> None:
        super().__init__(service.why())
        self.status = status


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a router listens, as HOST:PORT; an empty string for what it does not serve."""

    grpc: str
    admin: str
    fleet: str = ""
    http: str = ""

    @classmethod
    def parse(cls, line: str) -> Addresses:
        """Read `WORD grpc=HOST:PORT admin=HOST:PORT ...`."""
        found = dict(ADDRESS.findall(line))
        return cls(
            found.get("grpc", ""), found.get("admin", ""), found.get("fleet", ""), found.get("http", "")
        )

    def ready_line(self) -> str:
        """The one line that `expertmesh up` prints."""
        http = f" http={self.http}" if self.http else ""
        return f"ready grpc={self.grpc} admin={self.admin}{http}"


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """How a fleet is configured.

    Attributes:
        document: the configuration file that all services get.
        overrides: keys like "ExpertMesh.device" that win over the file and over the environment.
    """

    document: dict[str, Any]
    overrides: dict[str, Any]

    def write(self, path: Path) -> Config:
        """Write the file; return what the services will make of it.

        Raises:
            ConfigError: a value that they would refuse, or no checkpoint.
        """
        path.write_text(json.dumps(self.document, indent=2))
        try:
            config = load_config(path, self.overrides)
        except ConfigError as error:
            # Nobody knows the file by this name.
            raise ConfigError(str(error).removeprefix(f"{path}: ")) from None
        if config.model_path is None:
            raise ConfigError("no checkpoint was given: name its directory with --model DIR")
        return config

    def environment(self) -> dict[str, str]:
        """`overrides` as the environment variables the services read."""
        names = {key: variable for variable, key in VARIABLES.items()}
        return {
            names[key]: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.overrides.items()
        }


class Fleet:
    """One router and its expert workers. Leaving the `async with` stops them all."""

    def __init__(self, settings: FleetSettings, on_line: OnLine) -> None:
        """`on_line` gets every line the services log.

        Raises:
            ConfigError: settings that the services would refuse.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="expertmesh-")
        self._config = Path(self._folder.name) / "config.json"
        try:
            config = settings.write(self._config)
            _check_room(config)
        except ConfigError:
            self._folder.cleanup()
            raise
        self._num_workers = 0 if config.experts_in_process else config.world_size
        if rank_table_file() is not None:
            logger.warning(
                "%s has no effect: a rank table is about two servers or more, and this fleet is on one",
                RANK_TABLE_VARIABLE,
            )
        environment = {**settings.environment(), TOKEN_VARIABLE: new_token(), RANK_TABLE_VARIABLE: ""}
        self._processes = Processes(on_line, environment)
        try:
            self._devices = one_for_each(config.device, self._processes.environment, 1 + self._num_workers)
        except ConfigError:
            self._folder.cleanup()
            raise
        self._router: Service | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._is_ready = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        try:
            await asyncio.gather(*self._keepers, return_exceptions=True)
            await self._processes.stop()
        finally:
            self._folder.cleanup()

    async def start(self) -> Addresses:
        """Start all services; return where the router listens while everything is loading.

        Raises:
            ServiceEnded: the router could not start.
        """
        self._router = await self._processes.start(
            "router", "router", "--config", self._config, environment=self._devices[0]
        )
        addresses = Addresses.parse(await self._router_line("listening"))
        self._keepers = [
            asyncio.create_task(
                self._keep_worker(f"worker-{index}", addresses.fleet, self._devices[1 + index])
            )
            for index in range(self._num_workers)
        ]
        return addresses

    async def wait_ready(self) -> Addresses:
        """Wait until the fleet serves.

        Raises:
            ServiceEnded: the router or a worker ended before that.
        """
        line = asyncio.create_task(self._router_line("ready"))
        try:
            await asyncio.wait([line, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
            self._raise_what_ended()
            self._is_ready = True
            return Addresses.parse(await line)
        finally:
            line.cancel()

    async def serve(self) -> None:
        """Replace workers that die, until the router ends.

        Raises:
            ServiceEnded: the router ended.
        """
        router = asyncio.create_task(self._watch_router())
        try:
            await asyncio.wait([router, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
            self._raise_what_ended()
            await router
        finally:
            router.cancel()

    async def _watch_router(self) -> None:
        # Nothing more is expected on stdout; reading it to its end notices the router's.
        await self._router_line("")

    def _raise_what_ended(self) -> None:
        for keeper in self._keepers:
            if keeper.done():
                keeper.result()

    async def _router_line(self, word: str) -> str:
        """The router's next line that starts with `word`."""
        if self._router is None:
            raise ControlError("the router was not started; call start() first")
        while (line := await self._router.read_line()) is not None:
            if word and line.startswith(f"{word} "):
                return line
        raise ServiceEnded(self._router, await self._router.wait())

    async def _keep_worker(self, name: str, fleet_address: str, device: dict[str, str]) -> None:
        """Run one worker, again and again once the fleet serves; before that its end is an error."""
        clock = asyncio.get_running_loop()
        delay = RestartDelay()
        while True:
            started = clock.time()
            arguments = ["--config", str(self._config), "--router", fleet_address, "--worker-id", name]
            worker = await self._processes.start(name, "expert_worker", *arguments, environment=device)
            await _drain(worker)
            status = await worker.wait()
            if not self._is_ready:
                raise ServiceEnded(worker, status)
            delay_s = delay.after(clock.time() - started)
            logger.warning("%s; starting it again in %.1f s", worker.why(), delay_s)
            await asyncio.sleep(delay_s)


def _check_room(config: Config) -> None:
    """Refuse to start what would not fit into this machine's memory: each service can only see its own part.

    Raises:
        ConfigError: what is needed, and what is free.
    """
    if config.device != "cpu" or config.model_path is None:
        return
    try:
        finding = together_here(config, Path(config.model_path))
    except CheckpointError:
        return  # the router says so, with what it knows
    require([finding])


async def _drain(service: Service) -> None:
    """Read what the service prints, so that it never waits for a reader."""
    while await service.read_line() is not None:
        pass
