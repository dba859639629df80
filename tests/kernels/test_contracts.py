"""Every device module satisfies its contract; the annotated lists are checked by the type checker."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import expert_worker.kernels.cpu
import expert_worker.kernels.reference
import router.kernels.cpu
import router.kernels.reference
from common.device import DEVICES, open_device
from common.errors import ConfigError
from expert_worker.arithmetic import arithmetic_hash
from expert_worker.kernels import ExpertKernels
from expert_worker.kernels import load_kernels as load_expert_kernels
from router.kernels import RouterKernels
from router.kernels import load_kernels as load_router_kernels
from tests.kernels.comparing import num_threads

if TYPE_CHECKING:
    import expert_worker.kernels.npu
    import router.kernels.npu

ROUTER_MODULES: list[RouterKernels] = [router.kernels.reference, router.kernels.cpu]
EXPERT_MODULES: list[ExpertKernels] = [expert_worker.kernels.reference, expert_worker.kernels.cpu]
if TYPE_CHECKING:  # a device that is not here is checked by its types alone
    ABSENT_ROUTER_MODULES: list[RouterKernels] = [router.kernels.npu]
    ABSENT_EXPERT_MODULES: list[ExpertKernels] = [expert_worker.kernels.npu]


@pytest.mark.parametrize(
    ("contract", "module"),
    [(RouterKernels, module) for module in ROUTER_MODULES]
    + [(ExpertKernels, module) for module in EXPERT_MODULES],
)
def test_a_module_has_every_function_of_its_contract_with_the_same_arguments(
    contract: type, module: object
) -> None:
    for name, function in inspect.getmembers(contract, inspect.isfunction):
        if name.startswith("_"):
            continue
        wanted = [argument for argument in inspect.signature(function).parameters if argument != "self"]
        assert list(inspect.signature(getattr(module, name)).parameters) == wanted


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_kernels_are_found_by_the_name_of_their_device(device: str) -> None:
    assert sys.modules[f"router.kernels.{device}"] is load_router_kernels(device)
    assert sys.modules[f"expert_worker.kernels.{device}"] is load_expert_kernels(device)
    assert open_device(device) == torch.device("cpu")


@pytest.mark.parametrize("load", [load_router_kernels, load_expert_kernels, open_device])
def test_an_unknown_device_is_refused_with_the_ones_there_are(load: object) -> None:
    with pytest.raises(ConfigError, match=r"'tpu' is unknown: choose one of cpu, reference, cuda, npu"):
        load("tpu")  # type: ignore[operator]


def test_a_device_that_needs_a_package_says_which_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ConfigError, match="'npu' needs the package torch_npu"):
        open_device("npu")


def test_every_device_names_its_collective_library() -> None:
    assert {name: device.collective for name, device in DEVICES.items()} == {
        "cpu": "gloo",
        "reference": "gloo",
        "cuda": "nccl",
        "npu": "hccl",
    }


@pytest.mark.parametrize("name", sorted({"cuda", "npu"}))
def test_a_device_without_kernels_is_refused_by_name(name: str) -> None:
    for package, load in (("router", load_router_kernels), ("expert_worker", load_expert_kernels)):
        if sys.modules.get(f"{package}.kernels.{name}") is None and not _has_module(package, name):
            with pytest.raises(ConfigError, match=rf"{package}\.kernels\.{name} is missing"):
                load(name)


def _has_module(package: str, name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"{package}.kernels.{name}") is not None


def test_the_hash_of_the_arithmetic_does_not_depend_on_threads_and_tells_kernels_apart() -> None:
    kernels = load_expert_kernels("cpu")
    hashes = set()
    for threads in (1, 2, 3):
        with num_threads(threads):
            hashes.add(arithmetic_hash(kernels))
    assert len(hashes) == 1
    assert len(hashes.pop()) == 16


def test_the_hash_of_the_arithmetic_changes_with_the_last_bit_of_an_expert() -> None:
    class Nudged:
        """The CPU's kernels, but for one bit of one row."""

        def __init__(self) -> None:
            self.pack = expert_worker.kernels.cpu.pack
            self.pack_int8 = expert_worker.kernels.cpu.pack_int8
            self.int8_experts = expert_worker.kernels.cpu.int8_experts

        def experts(self, *arguments: object) -> torch.Tensor:
            output: torch.Tensor = expert_worker.kernels.cpu.experts(*arguments)  # type: ignore[arg-type]
            output[3, 5] = torch.nextafter(output[3, 5].float(), torch.tensor(1e9)).to(output.dtype)
            return output

    nudged: object = Nudged()
    assert arithmetic_hash(nudged) != arithmetic_hash(load_expert_kernels("cpu"))  # type: ignore[arg-type]
