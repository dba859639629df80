"""What the engine checks before it agrees to run its next steps differently. Pure and torch-free."""

from __future__ import annotations

from router.messages import Tune

EP_LEVELS = (1, 2)


def problem_of(tune: Tune) -> str:
    """Say why an engine could not run steps like this; empty where it could."""
    if tune.ep_level not in EP_LEVELS:
        return f"ep_level is {tune.ep_level}, but this engine knows 1 and 2 only"
    for name in ("micro_batches", "max_batch_size", "max_prefill_tokens"):
        if getattr(tune, name) < 1:
            return f"{name} is {getattr(tune, name)}, but it must be at least 1"
    if tune.chunk_rows < 0 or tune.cutoff_min_rows < 1 or not tune.buffer_factors:
        return (
            f"chunk_rows {tune.chunk_rows}, cutoff_min_rows {tune.cutoff_min_rows} and buffer_factors "
            f"{tune.buffer_factors} bound nothing that could be sent"
        )
    if tune.deadline_floor_s <= 0:
        return f"deadline_floor_s is {tune.deadline_floor_s:g}, but it must be above 0"
    return ""
