"""What of NVIDIA's and of Ascend's software and devices this machine has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expertmesh.doctor.facts.program import ProgramAnswer, ask_program

TIMEOUT_S = 20.0
"""The first call after boot loads the driver."""
NVIDIA_SMI = ("nvidia-smi",)
NPU_SMI = ("npu-smi", "/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi")
ASCEND = Path("/usr/local/Ascend")
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_PLACES = (ASCEND / "ascend-toolkit/latest", ASCEND / "cann", ASCEND / "nnrt/latest")
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so")
NPU_DEVICE = re.compile(r"davinci(\d+)")


@dataclass(frozen=True, slots=True)
class NvidiaFacts:
    """NVIDIA's driver.

    Attributes:
        smi: what `nvidia-smi` says: a line "name, driver version, memory" for each GPU.
        has_devices: whether there are device files (/dev/nvidia0...).
    """

    smi: ProgramAnswer
    has_devices: bool

    @property
    def gpus(self) -> list[str]:
        """The lines of nvidia-smi; none where it does not end well."""
        lines = self.smi.output.splitlines() if self.smi.has_answered else []
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True, slots=True)
class AscendFacts:
    """Ascend's driver and CANN.

    Attributes:
        smi: what `npu-smi info` says.
        devices: numbers of /dev/davinciN; `closed` are those that this user may not open.
        driver: version of the driver, as its version.info has it; None: no such file.
        cann: the directory of CANN; None: nowhere.
        has_environment: whether set_env.sh of CANN was sourced: its variables are there.
        missing_libraries: libraries that no directory of LD_LIBRARY_PATH has.
    """

    smi: ProgramAnswer
    devices: tuple[int, ...]
    closed: tuple[int, ...]
    driver: str | None
    cann: str | None
    has_environment: bool
    missing_libraries: tuple[str, ...]

    @property
    def is_there(self) -> bool:
        """Whether there is any trace of it."""
        return bool(self.devices or self.driver or self.cann or self.smi.path)


def gather_nvidia() -> NvidiaFacts:
    """Ask nvidia-smi, and look for device files."""
    arguments = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return NvidiaFacts(
        ask_program(NVIDIA_SMI, arguments, TIMEOUT_S),
        any(Path("/dev").glob("nvidia[0-9]*")),
    )


def gather_ascend(environment: Mapping[str, str]) -> AscendFacts:
    """Ask npu-smi, and look for device files, the driver and CANN."""
    files = {int(found[1]): file for file in Path("/dev").glob("davinci*") if (found := _number(file))}
    named = next((environment[name] for name in CANN_VARIABLES if environment.get(name)), None)
    places = [Path(named)] if named else list(CANN_PLACES)
    folders = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return AscendFacts(
        smi=ask_program(NPU_SMI, ("info",), TIMEOUT_S),
        devices=tuple(sorted(files)),
        closed=tuple(sorted(number for number, file in files.items() if not _is_open(file))),
        driver=_driver_version(ASCEND / "driver/version.info"),
        cann=next((str(place) for place in places if place.is_dir()), None),
        has_environment=named is not None,
        missing_libraries=tuple(
            library
            for library in CANN_LIBRARIES
            if not any(os.path.exists(os.path.join(folder, library)) for folder in folders)
        ),
    )


def _number(file: Path) -> re.Match[str] | None:
    return NPU_DEVICE.fullmatch(file.name)


def _is_open(file: Path) -> bool:
    return os.access(file, os.R_OK | os.W_OK)


def _driver_version(file: Path) -> str | None:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("Version=")), "unknown")
