"""Are the driver, the vendor's software and the devices there that the configuration asks for?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expertmesh.doctor.facts.accelerators import AscendFacts, NvidiaFacts
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

Answer = Mapping[str, Any]
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh before the start"
NO_DEVICE = "device {device!r} is not available on this machine: choose device 'cpu'"


def judge_nvidia(facts: NvidiaFacts, torch: Answer, cuda: Answer, device: str) -> Iterator[Finding]:
    """Judge NVIDIA's driver, its GPUs, and whether torch reaches them."""
    if device != "cuda":
        there = f"GPUs are here, not used: {'; '.join(facts.gpus)}; " if facts.gpus else ""
        yield not_applicable("nvidia", f"{there}the device is {device}")
        return
    symptom = NO_DEVICE.format(device=device)
    if not facts.gpus:
        yield failure(
            "nvidia",
            f"no GPU answers: {facts.smi.error or 'nvidia-smi lists none'}",
            symptom,
            "install NVIDIA's driver; for a container, the NVIDIA container toolkit and --gpus all",
        )
    else:
        yield ok("nvidia", f"GPUs: {'; '.join(facts.gpus)}")
    if torch.get("version") and not torch.get("cuda"):
        yield failure(
            "cuda",
            f"torch {torch['version']} is a build for CPUs",
            symptom,
            "make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130",
        )
    elif not cuda.get("is_available"):
        yield failure(
            "cuda",
            f"torch reaches no GPU: {cuda.get('error') or cuda.get('complaint') or 'it does not say why'}",
            symptom,
            "update the driver to one that knows the CUDA version torch was built for (nvidia-smi shows "
            "the newest it knows), and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield ok("cuda", f"torch reaches {', '.join(cuda['names'])}")


def judge_ascend(facts: AscendFacts, npu: Answer, device: str) -> Iterator[Finding]:
    """Judge Ascend's driver, CANN, the device files, and whether torch_npu reaches the NPUs."""
    if device != "npu":
        there = "Ascend's software is here, not used: " if facts.is_there else ""
        yield not_applicable("ascend", f"{there}the device is {device}")
        return
    yield from _driver(facts)
    yield from _device_files(facts)
    yield from _cann(facts)
    if not npu.get("is_available"):
        yield failure(
            "npu",
            f"torch_npu reaches no NPU: {npu.get('error') or 'torch.npu.is_available() is False'}",
            NO_DEVICE.format(device=device),
            "correct what stands above first: driver, CANN, its environment, torch-npu",
        )
    else:
        yield ok("npu", f"torch_npu {npu['version']} reaches {npu['count']} NPUs")


def _driver(facts: AscendFacts) -> Iterator[Finding]:
    if facts.smi.path is None and facts.driver is None:
        yield failure(
            "ascend driver",
            "neither npu-smi nor /usr/local/Ascend/driver/version.info is here",
            "libascend_hal.so: cannot open shared object file",
            "install driver and firmware of the NPU; in a container, mount /usr/local/Ascend/driver, "
            "/usr/local/dcmi and npu-smi (compose/npu.yaml)",
        )
    elif not facts.smi.has_answered:
        yield failure(
            "ascend driver",
            f"npu-smi info does not answer well: {facts.smi.error or f'exit status {facts.smi.status}'}",
            "drvErr, or: dcmi module initialize failed",
            "run npu-smi info as this user; in a container, mount /usr/local/dcmi and the device files",
        )
    else:
        yield ok("ascend driver", f"npu-smi answers; driver {facts.driver or 'of unknown version'}")


def _device_files(facts: AscendFacts) -> Iterator[Finding]:
    if not facts.devices:
        yield failure(
            "npu devices",
            "there is no /dev/davinci0 or another one",
            "torch.npu.device_count() is 0",
            "in a container, pass /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc",
        )
    elif facts.closed:
        yield failure(
            "npu devices",
            f"this user may not open {', '.join(f'/dev/davinci{number}' for number in facts.closed)}",
            "open device failed, or: Permission denied",
            "add the user to the group of the driver (HwHiAiUser), or run the container with that group",
        )
    else:
        yield ok("npu devices", f"{len(facts.devices)} device files, all of them open to this user")


def _cann(facts: AscendFacts) -> Iterator[Finding]:
    if facts.cann is None:
        yield failure(
            "cann",
            "CANN is nowhere: neither ASCEND_HOME_PATH nor /usr/local/Ascend names a directory of it",
            "ImportError: libhccl.so: cannot open shared object file",
            "install the CANN toolkit and the kernels of this NPU, or use an image that has them "
            "(BASE_IMAGE of compose/npu.yaml)",
        )
    elif not facts.has_environment:
        yield failure(
            "cann",
            f"CANN is in {facts.cann}, but its environment is not set",
            "ImportError: libhccl.so: cannot open shared object file",
            SET_ENV,
        )
    elif facts.missing_libraries:
        yield warning(
            "cann",
            f"no directory of LD_LIBRARY_PATH has {' or '.join(facts.missing_libraries)}",
            "ImportError: libhccl.so: cannot open shared object file",
            SET_ENV,
        )
    else:
        yield ok("cann", f"CANN in {facts.cann}, with its environment")
