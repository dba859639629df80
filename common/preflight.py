"""What is checked before any weight is loaded: a `Finding` for each, with what it takes and what there is.

The checks are pure functions that return findings, met or not; whoever starts something calls `require`.
preflight_fleet.py calls all that do not depend on a machine: preflight_group.py (experts and workers) and
preflight_npu.py (Ascend's fused operators); preflight_memory.py has what a worker and the router hold. All of
them are torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import ConfigError

GIBIBYTE = 1 << 30
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: what was looked at, as the subject of a sentence: "HCCL_BUFFSIZE".
        needed: what it takes, a noun with its number: "at least 900 MB".
        found: what there is: "200 MB".
        is_met: whether that is enough.
        remedy: what to do where it is not.
    """

    what: str
    needed: str
    found: str
    is_met: bool
    remedy: str

    @property
    def sentence(self) -> str:
        """One sentence: met, what holds; else the value found, the rule and the way out."""
        if self.is_met:
            return f"{self.what} is {self.found}, and {self.needed} is needed"
        return f"{self.what} is {self.found}, but {self.needed} is needed: {self.remedy}"


def require(findings: Iterable[Finding]) -> None:
    """Go on only where every finding is met.

    Raises:
        ConfigError: one sentence for each that is not.
    """
    unmet = [finding.sentence for finding in findings if not finding.is_met]
    if unmet:
        raise ConfigError(*unmet)


def size(num_bytes: int) -> str:
    """Write a size for people: "13.2 GiB", "640 MiB", "12 bytes"."""
    if num_bytes >= GIBIBYTE:
        return f"{num_bytes / GIBIBYTE:.1f} GiB"
    if num_bytes >= MEBIBYTE:
        return f"{num_bytes / MEBIBYTE:.0f} MiB"
    return f"{num_bytes} bytes"
