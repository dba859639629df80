"""Do the environment variables of HCCL, NCCL, Gloo and the drivers hold what these will accept?

Ranges: CANN's reference of environment variables (HCCL_CONNECT_TIMEOUT, HCCL_IF_BASE_PORT,
HCCL_SOCKET_IFNAME); HCCL_EVENT_TIMEOUT must exceed HCCL_EXEC_TIMEOUT (torch_npu).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address

from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

SUBJECT = "variables"
WHOLE = re.compile(r"[0-9]{1,9}")
NEVER_ENDS = "a worker that dies is never noticed: the others wait for it for ever"
DEFAULT_EXEC_S, DEFAULT_EVENT_S = 1836, 1868

Rule = Callable[[str, Mapping[str, str]], str]
"""Takes a value and this machine's interfaces; says what it must be instead, or nothing."""


def whole(low: int, high: int, unit: str) -> Rule:
    """A whole number within bounds."""

    def check(value: str, _: Mapping[str, str]) -> str:
        is_in = WHOLE.fullmatch(value) is not None and low <= int(value) <= high
        return "" if is_in else f"must be a whole number from {low} to {high}{unit}"

    return check


def one_of(*values: str) -> Rule:
    """One of a few words."""
    return lambda value, _: "" if value in values else f"must be {' or '.join(values)}"


def own_ip(value: str, interfaces: Mapping[str, str]) -> str:
    """An address of this machine."""
    try:
        ip_address(value)
    except ValueError:
        return "must be an IP address of this machine"
    known = set(interfaces.values())
    return (
        "" if value in known or ":" in value else f"must be an address of this machine: {_names(interfaces)}"
    )


def interface_pattern(value: str, interfaces: Mapping[str, str]) -> str:
    """Prefixes of interfaces, or whole names after "=", or what is not to be used after "^"."""
    is_excluding, is_exact = value.startswith("^"), value.lstrip("^").startswith("=")
    names = [name for name in value.lstrip("^").removeprefix("=").split(",") if name]
    named = {
        interface
        for interface in interfaces
        if any(interface == name if is_exact else interface.startswith(name) for name in names)
    }
    chosen = interfaces.keys() - named if is_excluding else named
    return "" if chosen else f"must leave an interface of this machine to use: {_names(interfaces)}"


def interface_names(value: str, interfaces: Mapping[str, str]) -> str:
    """Whole names of interfaces."""
    is_known = all(name in interfaces for name in value.split(","))
    return "" if is_known else f"must name an interface of this machine: {_names(interfaces)}"


def device_list(value: str, _: Mapping[str, str]) -> str:
    """Numbers of devices, each once."""
    numbers = value.split(",")
    is_list = all(WHOLE.fullmatch(number.strip()) for number in numbers)
    is_list = is_list and len(set(numbers)) == len(numbers)
    return "" if is_list else "must be numbers of devices, each once, like 0,1,2,3"


def cuda_list(value: str, interfaces: Mapping[str, str]) -> str:
    """Numbers of GPUs, or their UUIDs."""
    return "" if value.startswith(("GPU-", "MIG-")) else device_list(value, interfaces)


HCCL: dict[str, Rule] = {
    "HCCL_BUFFSIZE": whole(1, 1 << 20, " (MB)"),
    "HCCL_CONNECT_TIMEOUT": whole(120, 7200, " (seconds)"),
    "HCCL_EXEC_TIMEOUT": whole(0, 999999999, " (seconds)"),
    "HCCL_EVENT_TIMEOUT": whole(0, 999999999, " (seconds)"),
    "HCCL_IF_IP": own_ip,
    "HCCL_IF_BASE_PORT": whole(1024, 65520, ""),
    "HCCL_SOCKET_IFNAME": interface_pattern,
    "HCCL_INTRA_PCIE_ENABLE": one_of("0", "1"),
    "HCCL_INTRA_ROCE_ENABLE": one_of("0", "1"),
    "ASCEND_RT_VISIBLE_DEVICES": device_list,
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": one_of("0", "1", "2", "3"),
}
NCCL: dict[str, Rule] = {
    "NCCL_SOCKET_IFNAME": interface_pattern,
    "NCCL_BUFFSIZE": whole(1, 1 << 40, " (bytes)"),
    "CUDA_VISIBLE_DEVICES": cuda_list,
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": one_of("0", "1", "2", "3"),
}
EVERYWHERE: dict[str, Rule] = {
    "GLOO_SOCKET_IFNAME": interface_names,
    "TP_SOCKET_IFNAME": interface_names,
    "OMP_NUM_THREADS": whole(1, 4096, ""),
}
RULES: dict[str, dict[str, Rule]] = {
    "cpu": EVERYWHERE,
    "cuda": {**EVERYWHERE, **NCCL},
    "npu": {**EVERYWHERE, **HCCL},
}
"""The variables that act where a device computes."""


def judge_variables(
    environment: Mapping[str, str], interfaces: Mapping[str, str], device: str
) -> Iterator[Finding]:
    """Judge every variable that is set: a bad one is a failure where it acts, and a warning elsewhere."""
    acting = RULES[device]
    every = {**EVERYWHERE, **NCCL, **HCCL}
    given = {name: environment[name] for name in every if environment.get(name)}
    bad = {name: rule for name, value in given.items() if (rule := every[name](value, interfaces))}
    for name, rule in bad.items():
        found, way_out = f'{name} is "{given[name]}", but it {rule}', "correct it, or unset it"
        if name in acting:
            yield failure(
                SUBJECT, found, "the vendor's library refuses it, or silently takes its default", way_out
            )
        else:
            yield warning(SUBJECT, found, f"nothing: it has no effect where the device is {device}", way_out)
    yield from _suspicious({name: value for name, value in given.items() if name not in bad}, acting)
    good = [f"{name}={given[name]}" for name in acting if name in given and name not in bad]
    if good:
        yield ok(SUBJECT, ", ".join(good))
    elif not bad:
        yield not_applicable(SUBJECT, f"none is set that acts where the device is {device}")


def _suspicious(given: Mapping[str, str], acting: Mapping[str, Rule]) -> Iterator[Finding]:
    """Values that are accepted, and rarely meant."""
    for name in ("TORCH_HCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "HCCL_EXEC_TIMEOUT"):
        if name in acting and given.get(name) == "0":
            yield warning(SUBJECT, f"{name} is 0: nothing ever ends", NEVER_ENDS, f"unset {name}")
    if "HCCL_EVENT_TIMEOUT" in acting:
        execution = int(given.get("HCCL_EXEC_TIMEOUT", DEFAULT_EXEC_S))
        event = int(given.get("HCCL_EVENT_TIMEOUT", DEFAULT_EVENT_S))
        if 0 < event <= execution:
            yield warning(
                SUBJECT,
                f"HCCL_EVENT_TIMEOUT is {event} s, and HCCL_EXEC_TIMEOUT is {execution} s",
                "the event ends first, and the error does not name the operation that hung",
                "set HCCL_EVENT_TIMEOUT above HCCL_EXEC_TIMEOUT",
            )
    if "HCCL_IF_IP" in acting and {"HCCL_IF_IP", "HCCL_SOCKET_IFNAME"} <= given.keys():
        yield warning(
            SUBJECT,
            "HCCL_IF_IP and HCCL_SOCKET_IFNAME are both set",
            "HCCL takes HCCL_IF_IP, whatever the other one says",
            "unset one of them",
        )


def _names(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in interfaces.items())
