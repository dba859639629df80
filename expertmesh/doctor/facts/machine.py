"""Everything that is asked of this machine, each thing once. All I/O of `doctor` begins here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.config import TOKEN_VARIABLE, Config
from common.environment import hccl_buffer_mb
from common.errors import CheckpointError, ConfigError
from common.model_config import ModelConfig
from common.preflight import Finding as Checked
from common.preflight_fleet import fixed_findings
from common.rank_table import RankTable
from common.topology import ALL_TO_ALL, SERVERS_IN_QUESTION, DeviceLink
from expertmesh.doctor.facts.accelerators import AscendFacts, NvidiaFacts, gather_ascend, gather_nvidia
from expertmesh.doctor.facts.network import Listening, gather_interfaces, try_listening
from expertmesh.doctor.facts.packages import PackageFacts, gather_packages
from expertmesh.doctor.facts.peer import Peer, ask_router
from expertmesh.doctor.facts.ranks import RankTableFacts, ask_cables, gather_ranks
from expertmesh.doctor.facts.resources import Resources, gather_resources
from expertmesh.doctor.facts.token import TokenFacts, gather_token
from expertmesh.doctor.facts.torch_answers import TorchAnswers, ask_torch
from expertmesh.doctor.setup import Setup


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model directory, without its tensors.

    Attributes:
        is_there: whether it exists.
        has_tokenizer: whether it holds a tokenizer.json.
        checked: what the services check before they load it, as far as the configuration fixes it.
    """

    is_there: bool = False
    has_tokenizer: bool = False
    checked: tuple[Checked, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. What hangs on a configuration is empty where that cannot be read."""

    packages: PackageFacts
    torch: TorchAnswers
    nvidia: NvidiaFacts
    ascend: AscendFacts
    interfaces: dict[str, str]
    addresses: tuple[Listening, ...]
    ports: tuple[Listening, ...]
    ranks: RankTableFacts
    cables: tuple[DeviceLink, ...]
    resources: Resources
    token: TokenFacts
    peer: Peer | None
    model: ModelFacts


def gather_machine(setup: Setup) -> Machine:
    """Ask everything. Every question has a deadline."""
    interfaces = gather_interfaces()
    ranks = gather_ranks(setup.environment, interfaces.values())
    has_variable = bool(setup.environment.get(TOKEN_VARIABLE, "").strip())
    config, places = setup.config, tuple(_places(setup))
    return Machine(
        packages=gather_packages(),
        torch=ask_torch(setup.link_address, _readable(setup.model)),
        nvidia=gather_nvidia(),
        ascend=gather_ascend(setup.environment),
        interfaces=interfaces,
        addresses=tuple(try_listening(one.address_key, one.host, 0) for one in places),
        ports=tuple(try_listening(one.port_key, one.host, one.port) for one in places if one.port),
        ranks=ranks,
        cables=_cables(config, ranks),
        resources=gather_resources(),
        token=TokenFacts() if config is None else gather_token(config, has_variable),
        peer=None if setup.router is None else ask_router(setup.router, config),
        model=_model_facts(setup, ranks.table),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a service listens, and the keys that say so. Port 0 takes a free one."""

    address_key: str
    host: str
    port_key: str
    port: int


def _places(setup: Setup) -> Iterator[_Place]:
    """Everything that this machine's services listen on."""
    config = setup.config
    if config is None:
        return
    if setup.is_worker:
        yield _Place("ExpertMesh.agentAddress", config.agent_host, "ExpertMesh.agentPort", config.agent_port)
    else:
        yield _Place("ServerConfig.ipAddress", config.host, "ServerConfig.port", config.port)
        yield _Place(
            "ServerConfig.managementIpAddress",
            config.management_host,
            "ServerConfig.managementPort",
            config.management_port,
        )
        if not config.experts_in_process:
            yield _Place(
                "ExpertMesh.fleetAddress", config.fleet_host, "ExpertMesh.fleetPort", config.fleet_port
            )
    yield _Place("ExpertMesh.dataAddress", config.data_address, "", 0)


def _cables(config: Config | None, ranks: RankTableFacts) -> tuple[DeviceLink, ...]:
    """What this machine's NPUs are connected to, where the two-server rule asks for it."""
    if config is None or ranks.table is None or ranks.own_server is None:
        return ()
    is_in_question = config.ep_level == ALL_TO_ALL and len(ranks.table.servers) == SERVERS_IN_QUESTION
    return tuple(ask_cables(ranks.table, ranks.own_server)) if is_in_question else ()


def _readable(model: Path | None) -> Path | None:
    return model if model is not None and os.path.exists(model) else None


def _model_facts(setup: Setup, table: RankTable | None) -> ModelFacts:
    directory = _readable(setup.model)
    if directory is None:
        return ModelFacts()
    checked: tuple[Checked, ...] = ()
    if setup.config is not None:
        # What cannot be read, checkpoint or variable, is what other checks are about.
        with suppress(CheckpointError, ConfigError):
            model, buffer_mb = ModelConfig.from_directory(directory), hccl_buffer_mb(setup.config.device)
            checked = tuple(fixed_findings(setup.config, model, table, buffer_mb))
    return ModelFacts(True, os.path.exists(directory / "tokenizer.json"), checked)
