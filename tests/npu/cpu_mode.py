"""Runs every operator that is called with NPU tensors on the CPU: what a fake CANN leaves undone.

The memory of an NPU tensor is host memory here, so a CPU tensor over the same bytes takes its place, and
what is written in place is there at once. Views and allocations are torch_npu's own. `npu::` operators run
twice: the real one as far as its call of CANN, for its checks and the shapes of its results, then an
emulation of what CANN would have computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.npu.emulation import EMULATED

NATIVE = {
    "aten::_pin_memory",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "npu::get_npu_format",
}
"""torch_npu's own: they allocate or describe memory and compute nothing."""
MOVES = {"aten::_to_copy", "aten::copy_"}
"""What may see tensors of both devices."""


class NpuOnCpu(TorchDispatchMode):
    """Active in one thread while it is entered."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        own = [one for one in flat if is_npu(one)]
        if not own and not any(isinstance(one, torch.device) and one.type == "npu" for one in flat):
            return func(*args, **kwargs)
        name = func.name()
        if name in NATIVE:
            return _checked(func(*args, **kwargs), name)
        if func.namespace == "npu":
            return _run_vendor_operator(func, args, kwargs)
        if any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            if func._can_decompose():  # such as `reshape` and `contiguous`, which may have to copy
                with self:
                    return func.decompose(*args, **kwargs)
            return func(*args, **kwargs)
        if name not in MOVES:
            _refuse_mixed_devices(name, flat)
        return _run_on_cpu(func, args, kwargs, name)


def is_npu(value: object) -> bool:
    """Whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == "npu"


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of an NPU tensor, as it is once the stream has done what it was told."""
    import torch_npu

    torch_npu.npu.current_stream().synchronize()
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(flat.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def to_npu(tensor: Tensor) -> Tensor:
    """An NPU tensor of the same bytes."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")
    if tensor.numel():
        on_cpu(_checked(copy, "copy")).copy_(tensor)
    return copy


def _run_on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    wanted = kwargs.get("device")
    stays = name == "aten::_to_copy" and wanted is not None and torch.device(wanted).type == "cpu"
    cpu_args, cpu_kwargs = tree_map(_as_cpu, (args, kwargs))
    returned = func(*cpu_args, **cpu_kwargs)
    flat, _ = tree_flatten((args, kwargs))
    outputs = returned if isinstance(returned, tuple) else (returned,)
    results = []
    for output, described in zip(outputs, func._schema.returns, strict=False):
        if described.alias_info is not None and described.alias_info.is_write:
            results.append(_written(func, args, kwargs, described))
        elif stays:
            # The CPU's copy must not be the device's memory.
            results.append(output.clone() if any(is_npu(one) for one in flat) else output)
        else:
            results.append(tree_map(lambda one: to_npu(one) if isinstance(one, Tensor) else one, output))
    if not isinstance(returned, tuple):
        return results[0] if results else None
    return tuple(results)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], described: Any) -> Any:
    """The argument that an operator has written to and returns."""
    for position, argument in enumerate(func._schema.arguments):
        is_same = argument.alias_info is not None and (
            argument.alias_info.before_set == described.alias_info.before_set
        )
        if is_same:
            return args[position] if position < len(args) else kwargs[argument.name]
    raise AssertionError(f"{func.name()} returns what it was not given")


def _as_cpu(value: Any) -> Any:
    if is_npu(value):
        return on_cpu(value)
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    return value


def _as_argument(value: Any) -> Any:
    """As `_as_cpu`, and with the format that torch_npu keeps beside a tensor."""
    import torch_npu

    one = _as_cpu(value)
    if is_npu(value):
        one.npu_format = torch_npu.get_npu_format(value)
    return one


def _refuse_mixed_devices(name: str, flat: list[Any]) -> None:
    """An NPU takes no CPU tensors but scalars."""
    strays = [one for one in flat if isinstance(one, Tensor) and not is_npu(one) and one.dim() > 0]
    if strays and any(is_npu(one) for one in flat):
        raise RuntimeError(f"{name} was called with tensors of the NPU and of the CPU: {strays[0].shape}")


def _checked(result: Any, name: str) -> Any:
    """Refuse float64: torch_npu turns it into float32 without an error wherever it converts."""
    if isinstance(result, Tensor) and result.dtype == torch.float64 and is_npu(result):
        raise RuntimeError(f"{name} makes float64 on an NPU, which has none: compute it on the CPU")
    return result


def _run_vendor_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    emulate: Callable[..., Any] | None = EMULATED.get(func.name())
    if emulate is None:
        raise NotImplementedError(f"{func.name()} has no emulation in tests/npu/emulation")
    _refuse_mixed_devices(func.name(), tree_flatten((args, kwargs))[0])
    real = func(*args, **kwargs)
    cpu_args, cpu_kwargs = tree_map(_as_argument, (args, kwargs))
    with torch.inference_mode():
        computed = emulate(*cpu_args, **cpu_kwargs)
    real_tensors = [one for one in tree_flatten(real)[0] if isinstance(one, Tensor)]
    computed_tensors = [one for one in tree_flatten(computed)[0] if one is None or isinstance(one, Tensor)]
    for index, (output, value) in enumerate(zip(real_tensors, computed_tensors, strict=True)):
        if value is None:  # what the documentation leaves undefined is garbage here too
            on_cpu(output).fill_(-7 if output.dtype != torch.bool else 1)
            continue
        if (output.shape, output.dtype) != (value.shape, value.dtype):
            raise AssertionError(
                f"result {index} of {func.name()} is {tuple(output.shape)} {output.dtype} by torch_npu and "
                f"{tuple(value.shape)} {value.dtype} by its emulation"
            )
        if output.numel():
            on_cpu(output).copy_(value)
    return real
