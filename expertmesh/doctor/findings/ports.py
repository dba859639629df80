"""Are the ports of the configuration free, and who has those that are not?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expertmesh.doctor.facts.network import Listening
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

SUBJECT = "ports"
OWN_SERVICES = ("-m router", "-m expert_worker")


def judge_ports(found: Sequence[Listening]) -> Iterator[Finding]:
    """Judge every port that is given; 0 takes a free one when the service starts."""
    if not found:
        yield not_applicable(SUBJECT, "no port is given: free ones are taken")
        return
    seen: dict[tuple[str, int], str] = {}
    clashes = 0
    for one in found:
        place = (one.resolved, one.port)
        if place in seen:
            clashes += 1
            yield failure(
                SUBJECT,
                f"{seen[place]} and {one.key} are both {one.port} on {one.resolved}",
                f"cannot listen on {one.resolved}:{one.port}: Address already in use",
                "give each its own port",
            )
        seen.setdefault(place, one.key)
    bad = [one for one in found if one.error in ("EADDRINUSE", "EACCES")]
    yield from (_taken(one) if one.error == "EADDRINUSE" else _forbidden(one) for one in bad)
    free = [one for one in found if not one.error]
    if free and not clashes:
        yield ok(SUBJECT, "free: " + ", ".join(f"{one.resolved}:{one.port}" for one in free))


def _taken(one: Listening) -> Finding:
    owner = one.owner or "a process that this user may not see"
    found = f"{one.key}: {one.resolved}:{one.port} is taken by {owner}"
    symptom = f"cannot listen on {one.resolved}:{one.port}: Address already in use"
    if any(service in one.owner for service in OWN_SERVICES):
        return warning(
            SUBJECT,
            f"{found}: a service of expertmesh runs already",
            f"a second one ends with: {symptom}",
            "stop it first, or give the second one other ports (`up --port 0` takes free ones)",
        )
    return failure(
        SUBJECT,
        found,
        symptom,
        f"end that process, or set {one.key} to another port (0 takes a free one)",
    )


def _forbidden(one: Listening) -> Finding:
    return failure(
        SUBJECT,
        f"{one.key}: this user may not listen on {one.resolved}:{one.port}",
        f"cannot listen on {one.resolved}:{one.port}: Permission denied",
        f"set {one.key} to 1024 or above",
    )
