"""What the engine checks before it agrees to run its next steps differently. Pure and torch-free."""

from __future__ import annotations

from router.messages import ProposeTune, Tune

EP_LEVELS = (1, 2)


def problem_of(proposal: ProposeTune) -> str:
    """Say why an engine could not run steps like this; empty where it could."""
    try:
        tune = Tune(**proposal.tune)
    except TypeError as error:
        return f"this engine takes other settings than the front sends: {error}"
    if tune.ep_level not in EP_LEVELS:
        return f"ep_level is {tune.ep_level}, but this engine knows 1 and 2 only"
    least = {
        "micro_batches": (tune.micro_batches, 1),
        "chunk_rows": (tune.chunk_rows, 0),
        "cutoff_min_rows": (tune.cutoff_min_rows, 1),
        "max_batch_size": (proposal.max_batch_size, 1),
        "max_prefill_tokens": (proposal.max_prefill_tokens, 1),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            return f"{name} is {value}, but it must be at least {bound}"
    factors = [factor for _, factor in tune.buffer_factors]
    if not factors or min(factors) <= 0:
        return f"the buffer factors are {factors}, but there must be one, and all above 0"
    if tune.cutoff_factor is not None and tune.cutoff_factor <= 0:
        return f"the cutoff factor is {tune.cutoff_factor:g}, but it must be above 0"
    if proposal.deadline_floor_s <= 0:
        return f"deadline_floor_s is {proposal.deadline_floor_s:g}, but it must be above 0"
    return ""
