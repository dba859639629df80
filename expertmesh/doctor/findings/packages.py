"""Are Python and the packages those that expertmesh needs, and do they fit each other?"""

from __future__ import annotations

from collections.abc import Iterator

from expertmesh.doctor.facts.packages import PROJECT, PackageFacts
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning
from expertmesh.doctor.requirement import release_of

LEAST_PYTHON = (3, 11)
SERIES = 2
"""torch and torch-npu of one series, like 2.13, belong together: torch-npu is compiled against it."""
REINSTALL = "install expertmesh again into this environment: pip install -e . (or make setup)"


def judge_packages(facts: PackageFacts) -> Iterator[Finding]:
    """Judge Python, what is missing, and what does not fit."""
    python = release_of(facts.python) or ()
    if python < LEAST_PYTHON:
        yield failure(
            "python",
            f"Python {facts.python}, but expertmesh needs {'.'.join(map(str, LEAST_PYTHON))} or newer",
            "SyntaxError or ImportError at the first command",
            "make a new environment with a newer Python: make setup PYTHON=/path/to/python3",
        )
    else:
        yield ok("python", f"Python {facts.python} on {facts.machine}")
    unmet = list(_unmet(facts))
    yield from unmet
    if not unmet:
        named = ("torch", "grpcio", "grpcio-health-checking", "protobuf")
        versions = ", ".join(f"{name} {facts.versions[name]}" for name in named if name in facts.versions)
        yield ok("packages", f"{versions}, and all others fit")


def judge_torch_npu(facts: PackageFacts, device: str) -> Finding:
    """Judge whether torch-npu is there where it is needed, and is of torch's series."""
    torch, npu = facts.versions.get("torch"), facts.versions.get("torch-npu")
    if npu is None:
        if device != "npu":
            return not_applicable("torch-npu", f"not installed, and the device is {device}")
        return failure(
            "torch-npu",
            "the device is npu, but the package torch-npu is not installed",
            "device 'npu' needs the package torch_npu, which cannot be imported",
            "pip install -e '.[npu]' in this environment",
        )
    if torch is None or _series(torch) != _series(npu):
        return failure(
            "torch-npu",
            f"torch-npu {npu} needs torch {'.'.join(map(str, _series(npu)))}, and torch is "
            f"{torch or 'missing'}",
            "import torch fails, for every device: undefined symbol, or Failed to load the backend extension",
            f"pip install 'torch-npu=={torch.split('+')[0] if torch else npu}.*', or remove torch-npu",
        )
    if device != "npu":
        return warning(
            "torch-npu",
            f"torch-npu {npu} is installed, and the device is {device}",
            "import torch loads it as well, and fails where CANN is missing",
            "set TORCH_DEVICE_BACKEND_AUTOLOAD=0, or remove torch-npu from this environment",
        )
    return ok("torch-npu", f"torch-npu {npu} beside torch {torch}")


def _series(version: str) -> tuple[int, ...]:
    return ((*(release_of(version) or ()), 0, 0))[:SERIES]


def _unmet(facts: PackageFacts) -> Iterator[Finding]:
    for owner, requirement in facts.requirements:
        found = facts.versions.get(requirement.name)
        if found is None and owner == PROJECT:
            yield failure(
                "packages",
                f"{requirement.name} is not installed, and {owner} needs {requirement}",
                f"ModuleNotFoundError: No module named '{requirement.name.replace('-', '_')}'",
                REINSTALL,
            )
        elif found is not None and not requirement.is_met_by(found):
            yield _misfit(owner, requirement.name, str(requirement), found)


def _misfit(owner: str, name: str, wanted: str, found: str) -> Finding:
    if (owner, name) == (PROJECT, "torch"):
        return warning(
            "packages",
            f"torch {found} is installed, and expertmesh was tested with {wanted}",
            "answers may differ in their last bits, or an operator may be missing",
            REINSTALL,
        )
    return failure(
        "packages",
        f"{name} {found} is installed, but {owner} needs {wanted}",
        "an ImportError, a VersionError of protobuf or a RuntimeError of grpc when a service starts",
        f"pip install '{wanted}'; pip check shows whether others disagree",
    )
