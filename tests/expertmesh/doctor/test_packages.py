"""Versions that do not fit each other are named, with the package that says so."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from expertmesh.doctor.facts.packages import PackageFacts, gather_packages
from expertmesh.doctor.finding import Finding, Outcome
from expertmesh.doctor.findings.packages import judge_packages, judge_torch_npu
from expertmesh.doctor.requirement import Requirement, parse_requirement

NEEDS = (
    ("expertmesh", Requirement("torch", (("==", "2.13.0"),))),
    ("expertmesh", Requirement("grpcio", ((">=", "1.76"),))),
    ("grpcio-health-checking", Requirement("protobuf", ((">=", "7.35.1"), ("<", "8.0.0")))),
)
VERSIONS = {
    "torch": "2.13.0+cpu",
    "grpcio": "1.85.3",
    "grpcio-health-checking": "1.85.1",
    "protobuf": "7.35.1",
}


def facts(python: str = "3.11.7", **versions: str) -> PackageFacts:
    changed = {**VERSIONS, **{name.replace("_", "-"): version for name, version in versions.items()}}
    found = {name: version for name, version in changed.items() if version}
    return PackageFacts(python, "Linux x86_64", found, NEEDS)


def bad(found: PackageFacts) -> list[Finding]:
    return [one for one in judge_packages(found) if one.outcome is not Outcome.OK]


@pytest.mark.parametrize(
    ("line", "version", "is_met"),
    [
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("torch==2.13.0", "2.13.1", False),
        ("torch==2.13.0", "2.13", True),
        ("torch (==2.13.*)", "2.13.0+cpu", True),
        ("torch==2.13.*", "2.14.0", False),
        ("torch!=2.13.*", "2.14.0", True),
        ("numpy>=2.1", "2.10.0", True),
        ("numpy>=2.1", "2.0.9", False),
        ("protobuf<8.0.0,>=6.33.5", "6.33.5", True),
        ("protobuf<8.0.0,>=6.33.5", "8.0.0", False),
        ("protobuf<8.0.0,>=6.33.5", "6.4", False),
        ("rich~=14.1", "14.9.1", True),
        ("rich~=14.1", "15.0", False),
        ("rich~=14.1.2", "14.2", False),
        ("x>1", "1.0.0", False),
        ("x<=1.0", "1", True),
        ("typer[all]>=0.20", "0.29.1", True),
        ("anything", "whatever", True),
        ("x>=1", "unknown", True),
    ],
)
def test_a_version_passes_what_a_requirement_asks_for(line: str, version: str, is_met: bool) -> None:
    requirement = parse_requirement(line)
    assert requirement is not None
    assert requirement.is_met_by(version) is is_met


@pytest.mark.parametrize("line", ["torch-npu==2.13.0; extra == 'npu'", 'x; python_version < "3.0"', "==", ""])
def test_what_has_a_condition_or_is_none_is_no_requirement(line: str) -> None:
    assert parse_requirement(line) is None


def test_a_name_is_normalised_as_packages_are() -> None:
    requirement = parse_requirement("Typing_Extensions.Extra >=4")
    assert requirement is not None
    assert (requirement.name, str(requirement)) == ("typing-extensions-extra", "typing-extensions-extra>=4")


def test_requirements_agree_with_what_pip_says_of_this_environment() -> None:
    pip = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True)
    found = gather_packages()
    assert found.versions["torch"] == metadata.version("torch")
    assert len(found.requirements) > len(metadata.requires("grpcio") or ())
    if pip.returncode == 0:
        assert bad(found) == []


def test_versions_that_fit_are_one_line() -> None:
    assert [one.outcome for one in judge_packages(facts())] == [Outcome.OK, Outcome.OK]


def test_health_checking_that_needs_another_protobuf_is_a_failure() -> None:
    [one] = bad(facts(protobuf="6.33.6"))
    assert one.outcome is Outcome.FAILURE
    assert one.found == (
        "protobuf 6.33.6 is installed, but grpcio-health-checking needs protobuf>=7.35.1,<8.0.0"
    )


def test_another_torch_is_a_warning_and_a_missing_package_a_failure() -> None:
    [one] = bad(facts(torch="2.14.0"))
    assert (one.outcome, one.subject) == (Outcome.WARNING, "packages")
    [one] = bad(facts(grpcio=""))
    assert one.outcome is Outcome.FAILURE
    assert one.found == "grpcio is not installed, and expertmesh needs grpcio>=1.76"


def test_an_old_python_is_a_failure() -> None:
    [one] = bad(facts(python="3.10.14"))
    assert (one.outcome, one.subject) == (Outcome.FAILURE, "python")


@pytest.mark.parametrize(
    ("torch", "npu", "device", "outcome"),
    [
        ("2.13.0+cpu", "2.13.0", "npu", Outcome.OK),
        ("2.13.0+cpu", "2.13.0.post1", "npu", Outcome.OK),
        ("2.13.0+cpu", "2.14.0", "npu", Outcome.FAILURE),
        ("2.13.0+cpu", "2.14.0", "cpu", Outcome.FAILURE),
        ("2.13.0+cpu", "2.13.0", "cpu", Outcome.WARNING),
        ("2.13.0+cpu", "", "npu", Outcome.FAILURE),
        ("2.13.0+cpu", "", "cuda", Outcome.NOT_APPLICABLE),
    ],
)
def test_torch_npu_must_be_of_torchs_series(torch: str, npu: str, device: str, outcome: Outcome) -> None:
    assert judge_torch_npu(facts(torch=torch, torch_npu=npu), device).outcome is outcome
