"""Is the configuration valid, and does it fit the checkpoint?"""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config
from expertmesh.doctor.finding import Finding, failure, ok

SUBJECT = "configuration"
REFUSED = "router and expert workers end with this sentence and exit status 2"


def judge_configuration(config: Config | None, source: str, problems: tuple[str, ...]) -> Iterator[Finding]:
    """Name each bad value; or say that there is none."""
    for problem in problems:
        yield failure(
            SUBJECT, problem, REFUSED, "correct it; docs/configuration.md has the rule of every key"
        )
    if config is None:
        return
    count = len(config.warnings)
    ignored = f"; {count} notes on keys: `expertmesh config check` lists them" if count else ""
    yield ok(SUBJECT, f"{source} is valid{ignored}")
