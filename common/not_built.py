"""What the configuration has a place for and this version does not do: refused. Pure.

Whoever builds one of these takes its line out of here, and the words about it out of docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.config_file import Sections
from common.config_problems import Problem, json_line

NO_TLS = "TLS is not built in this version, and nothing is sent in plaintext silently: set it to false"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "ServerConfig.httpsEnabled": ((False,), NO_TLS),
    "ServerConfig.interCommTLSEnabled": ((False,), NO_TLS),
    "BackendConfig.interNodeTLSEnabled": ((False,), NO_TLS),
    "ExpertMesh.httpPort": ((None,), "HTTP is not built in this version: leave it out"),
    "ExpertMesh.device": (("cpu", "npu"), 'only "cpu" and "npu" are built in this version'),
}
"""Keys that would silently be less safe, or other, than what was asked for: what is built, and why."""


def refusals(sections: Sections) -> Iterator[Problem]:
    """Name every key that asks for what cannot be done."""
    for key, (built, why) in REFUSED.items():
        value = sections.value(key)
        if value not in built:
            keys, path = frozenset({key.rpartition(".")[2]}), sections.path(key)
            yield Problem(keys, path, f"{path} is {json_line(value)}, but {why}")
