"""Drivers, CANN, torch and the native kernels: what is missing is named, and what nobody asked for is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from expertmesh.doctor.facts.accelerators import AscendFacts, NvidiaFacts
from expertmesh.doctor.facts.program import ProgramAnswer
from expertmesh.doctor.finding import Finding, Outcome
from expertmesh.doctor.findings.accelerators import judge_ascend, judge_nvidia
from expertmesh.doctor.findings.torch import judge_backends, judge_native, judge_torch

TORCH = {"version": "2.13.0+cu130", "cuda": "13.0", "threads": 4, "import_s": 1.2}
CUDA = {"is_available": True, "names": ["NVIDIA H100"], "complaint": ""}
NPU = {"is_installed": True, "version": "2.13.0", "is_available": True, "count": 8}
SMI = ProgramAnswer("/usr/bin/nvidia-smi", 0, "NVIDIA H100, 580.1, 81559 MiB\n")
ASCEND = AscendFacts(
    smi=ProgramAnswer("/usr/local/bin/npu-smi", 0, "| npu-smi 25.2.0 |"),
    devices=(0, 1),
    closed=(),
    driver="25.2.0",
    cann="/usr/local/Ascend/ascend-toolkit/latest",
    has_environment=True,
    missing_libraries=(),
)


def outcomes(findings: Any) -> dict[str, Outcome]:
    return {one.subject: one.outcome for one in findings}


def failures(findings: Any) -> list[Finding]:
    return [one for one in findings if one.outcome is Outcome.FAILURE]


def test_a_machine_with_gpus_is_well() -> None:
    found = list(judge_nvidia(NvidiaFacts(SMI, True), TORCH, CUDA, "cuda"))
    assert outcomes(found) == {"nvidia": Outcome.OK, "cuda": Outcome.OK}


@pytest.mark.parametrize(
    ("smi", "torch", "cuda", "subject", "words"),
    [
        (ProgramAnswer(error="nvidia-smi is not installed"), TORCH, CUDA, "nvidia", "not installed"),
        (ProgramAnswer("/x", 9, "", "couldn't communicate"), TORCH, CUDA, "nvidia", "couldn't communicate"),
        (ProgramAnswer("/x", 0, ""), TORCH, CUDA, "nvidia", "lists none"),
        (SMI, {**TORCH, "cuda": None}, {"is_available": False}, "cuda", "a build for CPUs"),
        (SMI, TORCH, {"is_available": False, "complaint": "driver is too old"}, "cuda", "too old"),
        (SMI, TORCH, {"error": "it ended"}, "cuda", "it ended"),
    ],
)
def test_what_a_gpu_lacks_is_named(
    smi: ProgramAnswer, torch: dict[str, Any], cuda: dict[str, Any], subject: str, words: str
) -> None:
    [one] = failures(judge_nvidia(NvidiaFacts(smi, True), torch, cuda, "cuda"))
    assert (one.subject, words in one.found) == (subject, True)
    assert one.symptom
    assert one.remedy


def test_gpus_and_npus_that_nobody_asked_for_are_no_failure() -> None:
    [one] = judge_nvidia(NvidiaFacts(SMI, True), TORCH, CUDA, "cpu")
    assert one.outcome is Outcome.NOT_APPLICABLE
    assert "GPUs are here, not used: NVIDIA H100" in one.found
    [one] = judge_ascend(ASCEND, NPU, "cpu")
    assert one.outcome is Outcome.NOT_APPLICABLE
    assert "not used" in one.found


def test_a_machine_with_npus_is_well() -> None:
    subjects = ("ascend driver", "npu devices", "cann", "npu")
    assert outcomes(judge_ascend(ASCEND, NPU, "npu")) == dict.fromkeys(subjects, Outcome.OK)


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"smi": ProgramAnswer(), "driver": None}, "ascend driver", "neither npu-smi nor"),
        ({"smi": ProgramAnswer("/x", 255, "", "dcmi failed")}, "ascend driver", "dcmi failed"),
        ({"devices": ()}, "npu devices", "no /dev/davinci0"),
        ({"closed": (1,)}, "npu devices", "/dev/davinci1"),
        ({"cann": None}, "cann", "nowhere"),
        ({"has_environment": False}, "cann", "environment is not set"),
    ],
)
def test_what_an_npu_lacks_is_named(change: dict[str, Any], subject: str, words: str) -> None:
    [one] = failures(judge_ascend(replace(ASCEND, **change), NPU, "npu"))
    assert (one.subject, words in one.found) == (subject, True)


def test_libraries_of_cann_that_the_loader_does_not_see_are_a_warning() -> None:
    found = judge_ascend(replace(ASCEND, missing_libraries=("libhccl.so",)), NPU, "npu")
    assert outcomes(found)["cann"] is Outcome.WARNING


def test_a_torch_npu_that_reaches_nothing_says_why() -> None:
    [one] = failures(judge_ascend(ASCEND, {"error": "ImportError: libhccl.so"}, "npu"))
    assert (one.subject, "libhccl.so" in one.found) == ("npu", True)


def test_a_torch_that_cannot_be_imported_is_a_failure() -> None:
    assert judge_torch(TORCH).outcome is Outcome.OK
    assert judge_torch({"error": "ImportError: libcudart"}).outcome is Outcome.FAILURE


@pytest.mark.parametrize(
    ("built", "npu", "device", "outcome"),
    [
        (["gloo"], {}, "cpu", Outcome.OK),
        (["gloo"], {}, "cuda", Outcome.FAILURE),
        (["gloo", "nccl"], {}, "cuda", Outcome.OK),
        (["gloo"], {"is_installed": False}, "npu", Outcome.FAILURE),
        (["gloo"], NPU, "npu", Outcome.OK),
    ],
)
def test_the_collective_library_of_the_device_must_be_there(
    built: list[str], npu: dict[str, Any], device: str, outcome: Outcome
) -> None:
    [one] = judge_backends({"built": built}, npu, device, "127.0.0.1")
    assert one.outcome is outcome


def test_an_address_that_gloo_cannot_use_is_a_failure() -> None:
    [one] = judge_backends({"error": "Cannot assign requested address"}, {}, "cpu", "10.0.0.9")
    assert one.outcome is Outcome.FAILURE
    assert "10.0.0.9" in one.found


def test_missing_native_kernels_are_a_warning_on_cpus_alone() -> None:
    assert judge_native({"paths": ["portable", "avx2"]}, "cpu").found.endswith("avx2")
    assert judge_native({"error": "was not built"}, "cpu").outcome is Outcome.WARNING
    assert judge_native({"error": "was not built"}, "npu").outcome is Outcome.NOT_APPLICABLE
