"""The list of checks: each turns what was found on this machine into findings. Pure.

A new one needs its facts in facts/machine.py, its judgement in findings/, and its line in CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from expertmesh.doctor.facts.machine import Machine
from expertmesh.doctor.finding import Finding, not_applicable
from expertmesh.doctor.findings.accelerators import judge_ascend, judge_nvidia
from expertmesh.doctor.findings.addresses import judge_addresses
from expertmesh.doctor.findings.checkpoint import judge_checkpoint, judge_preflight
from expertmesh.doctor.findings.configuration import judge_configuration
from expertmesh.doctor.findings.packages import judge_packages, judge_torch_npu
from expertmesh.doctor.findings.peers import judge_peer
from expertmesh.doctor.findings.ports import judge_ports
from expertmesh.doctor.findings.ranks import judge_rank_table, judge_two_servers
from expertmesh.doctor.findings.resources import (
    judge_locked_memory,
    judge_memory,
    judge_open_files,
    judge_shared_memory,
)
from expertmesh.doctor.findings.token import judge_token
from expertmesh.doctor.findings.torch import judge_backends, judge_native, judge_torch
from expertmesh.doctor.findings.variables import judge_variables
from expertmesh.doctor.setup import Setup, split_address

Check = Callable[[Setup, Machine], Iterable[Finding]]
NO_CONFIGURATION = "the configuration cannot be read"


def packages(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """Python and packages."""
    yield from judge_packages(machine.packages)
    yield judge_torch_npu(machine.packages, setup.device)


def torch_itself(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """What torch can do here. Without it, nothing more is known of its parts."""
    answers = machine.torch
    yield judge_torch(answers.of("torch"))
    if "error" in answers.of("torch"):
        yield not_applicable("data plane", "torch cannot be imported")
        yield not_applicable("native kernels", "torch cannot be imported")
        return
    yield from judge_backends(answers.of("backends"), answers.of("npu"), setup.device, setup.link_address)
    yield judge_native(answers.of("native"), setup.device)


def devices(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """Drivers and accelerators."""
    answers = machine.torch
    yield from judge_nvidia(machine.nvidia, answers.of("torch"), answers.of("cuda"), setup.device)
    yield from judge_ascend(machine.ascend, answers.of("npu"), setup.device)


def configuration(setup: Setup, _: Machine) -> Iterator[Finding]:
    """The file and the environment's overrides."""
    yield from judge_configuration(setup.config, setup.source, setup.problems)


def checkpoint(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """The model directory."""
    if setup.model is None and setup.config is None:
        yield not_applicable("model", NO_CONFIGURATION)
        return
    if machine.model.is_there and "error" in machine.torch.of("torch"):
        yield not_applicable("model", "torch cannot be imported, and nothing else reads it")
        return
    yield from judge_checkpoint(
        setup.model,
        machine.torch.of("checkpoint"),
        is_there=machine.model.is_there,
        is_worker=setup.is_worker,
        has_tokenizer=machine.model.has_tokenizer,
    )
    yield from judge_preflight(machine.model.checked)


def network(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """Addresses, ports, the router."""
    if setup.config is None:
        yield not_applicable("addresses", NO_CONFIGURATION)
        yield not_applicable("ports", NO_CONFIGURATION)
    else:
        servers = machine.ranks.table.servers if machine.ranks.table is not None else ("this one",)
        yield from judge_addresses(
            machine.addresses,
            machine.interfaces,
            router=None if setup.router is None else split_address(setup.router)[0],
            num_servers=len(servers),
        )
        yield from judge_ports(machine.ports)
    yield judge_peer(machine.peer)


def token(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """The fleet token."""
    if setup.config is None:
        yield not_applicable("fleet token", NO_CONFIGURATION)
    else:
        yield judge_token(machine.token, setup.config, is_worker=setup.is_worker)


def collectives(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """Variables of HCCL, NCCL and Gloo, the rank table, and the cables of two servers."""
    yield from judge_variables(setup.environment, machine.interfaces, setup.device)
    config = setup.config
    yield judge_rank_table(machine.ranks, config.world_size if config is not None else 0)
    if config is None:
        yield not_applicable("two servers", NO_CONFIGURATION)
        return
    is_mesh = config.exchange == "collective"
    table = machine.ranks.table
    yield judge_two_servers(config.ep_level, config.topology, table, machine.cables, is_mesh=is_mesh)


def resources(setup: Setup, machine: Machine) -> Iterator[Finding]:
    """Memory and limits."""
    found = machine.resources
    cache_bytes = setup.config.kv_cache_bytes if setup.config is not None else 0
    model_bytes = machine.torch.of("checkpoint").get("num_bytes", 0)
    yield from judge_memory(found, cache_bytes, model_bytes, is_worker=setup.is_worker)
    yield judge_shared_memory(found, setup.device)
    yield judge_open_files(found, setup.config)
    yield judge_locked_memory(found, setup.device)


CHECKS: tuple[Check, ...] = (
    packages,
    torch_itself,
    devices,
    configuration,
    checkpoint,
    network,
    token,
    collectives,
    resources,
)


def examine(setup: Setup, machine: Machine) -> list[Finding]:
    """Run all checks."""
    return [finding for check in CHECKS for finding in check(setup, machine)]
