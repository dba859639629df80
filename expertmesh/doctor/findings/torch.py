"""Does torch load, what can its data plane use, and are the native kernels there?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

Answer = Mapping[str, Any]
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
REINSTALL_KERNEL = (
    "install g++ or clang++, or name a compiler in CXX, then install expertmesh again (make clean setup)"
)


def judge_torch(answer: Answer) -> Finding:
    """Judge whether torch can be imported."""
    if "error" in answer:
        return failure(
            "torch",
            f"torch cannot be imported: {answer['error']}",
            "the router's engine and the worker's executor end before they have loaded anything",
            "make the import work first: python -c 'import torch'; a torch-npu without CANN breaks it too",
        )
    build = f"for CUDA {answer['cuda']}" if answer["cuda"] else "for CPUs"
    return ok(
        "torch",
        f"torch {answer['version']} {build}, {answer['threads']} threads, imported in {answer['import_s']} s",
    )


def judge_backends(answer: Answer, npu: Answer, device: str, data_address: str) -> Iterator[Finding]:
    """Judge whether the collective library of the device is there, and Gloo works on the data address."""
    wanted = BACKENDS[device]
    if "error" in answer:
        yield failure(
            "data plane",
            f"Gloo does not work on {data_address}: {answer['error']}",
            "links cannot be made: the router stays not ready",
            "set ExpertMesh.dataAddress to an address of this machine",
        )
        return
    built = (*answer["built"], *(("hccl",) if npu.get("version") else ()))
    if wanted not in built:
        yield failure(
            "data plane",
            f"device {device} needs {wanted.upper()}, and this torch has {', '.join(built)}",
            "the engine ends when it makes its first group",
            "install torch for CUDA (make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130)"
            if device == "cuda"
            else "pip install -e '.[npu]'",
        )
    else:
        yield ok("data plane", f"{', '.join(built)}; a Gloo device and a store were opened on {data_address}")


def judge_native(answer: Answer, device: str) -> Finding:
    """Judge whether the native kernels were built, and name the instructions they take."""
    if device != "cpu":
        return not_applicable("native kernels", f"it is for CPUs, and the device is {device}")
    if "error" in answer:
        return warning(
            "native kernels",
            answer["error"],
            "everything is computed more slowly, W8A8 checkpoints most of all",
            REINSTALL_KERNEL,
        )
    best = answer["paths"][-1]
    return ok("native kernels", f"built; this processor takes their path {best}")
