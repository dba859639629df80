"""Is there a fleet token that router and workers can share, and is it a secret?"""

from __future__ import annotations

from common.config import TOKEN_VARIABLE, Config
from expertmesh.doctor.facts.token import TokenFacts
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

SUBJECT = "fleet token"
MAKE = "python3 -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 400 FILE"
LEAST_LETTERS = 16
READABLE_BY_OTHERS = 0o077


def judge_token(facts: TokenFacts, config: Config, *, is_worker: bool) -> Finding:
    """Judge the token; nobody needs one where there are no workers or `up` makes it."""
    if config.experts_in_process:
        return not_applicable(SUBJECT, "the experts are in the router's process")
    if not facts.source and is_worker:
        return failure(
            SUBJECT,
            "none is set, and a worker registers with the router's",
            "there is no fleet token, but router and expert workers must share one: set "
            f"{TOKEN_VARIABLE} or ExpertMesh.fleetTokenFile",
            "copy the router's token to this machine, and name it in one of the two",
        )
    if not facts.source:
        return not_applicable(
            SUBJECT,
            "none is set: `expertmesh up` makes one; services that are started one by one need "
            f"{TOKEN_VARIABLE} or ExpertMesh.fleetTokenFile",
        )
    if facts.error:
        return failure(SUBJECT, facts.error, "router and expert workers end with this sentence", MAKE)
    if facts.mode is not None and facts.mode & READABLE_BY_OTHERS:
        return warning(
            SUBJECT,
            f"{facts.source} has mode {facts.mode:o}: others than its owner may read it",
            "who has the token can register a worker, and sees hidden states",
            f"chmod 400 {facts.source}",
        )
    if facts.num_letters < LEAST_LETTERS:
        return warning(
            SUBJECT,
            f"the token of {facts.source} has {facts.num_letters} letters",
            "it can be guessed",
            MAKE,
        )
    return ok(SUBJECT, f"of {facts.source}, {facts.num_letters} letters")
