"""Which device of this machine each service gets: a process computes on the first one it sees. Pure."""

from __future__ import annotations

from common.errors import ConfigError

VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""What tells a process of each kind of device which ones it sees; a CPU is everybody's."""


def one_for_each(device: str, environment: dict[str, str], num_services: int) -> list[dict[str, str]]:
    """Return what each service gets in its environment: the router first, then the expert workers.

    Args:
        device: of the configuration.
        environment: of this process; where it names devices, these are dealt out, else the first ones are.

    Raises:
        ConfigError: it names fewer devices than there are services.
    """
    variable = VARIABLES.get(device)
    if variable is None:
        return [{} for _ in range(num_services)]
    named = environment.get(variable)
    names = [name.strip() for name in named.split(",") if name.strip()] if named else None
    if names is None:
        names = [str(number) for number in range(num_services)]
    if len(names) < num_services:
        raise ConfigError(
            f"{variable} names {len(names)} devices, but a router and {num_services - 1} expert workers take "
            "one each: name more, or start fewer with --expert-workers"
        )
    return [{variable: name} for name in names[:num_services]]
