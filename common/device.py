"""The one table of devices: which collective library each uses, and which package torch needs for it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from common import host_memory
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """What differs between devices before the first tensor exists; the rest is in the kernel modules.

    Attributes:
        name: what the configuration says, and the name of the kernel modules.
        collective: the backend of torch.distributed: gloo, nccl or hccl.
        extension: the package that adds the device to torch, or None.
        torch_type: how torch calls it.
    """

    name: str
    collective: str
    extension: str | None
    torch_type: str


DEVICES = {
    device.name: device
    for device in (
        Device("cpu", "gloo", None, "cpu"),
        Device("reference", "gloo", None, "cpu"),
        Device("cuda", "nccl", None, "cuda"),
        Device("npu", "hccl", "torch_npu", "npu"),
    )
}


def find_device(name: str) -> Device:
    """Return the row of the table.

    Raises:
        ConfigError: there is no such device.
    """
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is unknown: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def open_device(name: str) -> torch.device:
    """Load what torch needs for a device and return it.

    Raises:
        ConfigError: there is no such device, or not on this machine.
    """
    device = find_device(name)
    if device.extension is not None:
        try:
            importlib.import_module(device.extension)
        except ImportError as error:
            raise ConfigError(
                f"device {name!r} needs the package {device.extension}, which cannot be imported ({error}): "
                f"install it, or choose device 'cpu'"
            ) from error
    if device.torch_type != "cpu" and not torch.get_device_module(device.torch_type).is_available():
        raise ConfigError(f"device {name!r} is not available on this machine: choose device 'cpu'")
    return torch.device(device.torch_type)


def free_memory(name: str) -> int:
    """Bytes that weights can still take on a device that was opened: its own, or this machine's."""
    device = find_device(name)
    if device.torch_type == "cpu":
        return host_memory.free_memory()
    free_bytes, _ = torch.get_device_module(device.torch_type).mem_get_info()
    return int(free_bytes)
