"""What a reply says about its rows at the worker, as spans of a timeline."""

from __future__ import annotations

from common.exchange import wire
from common.timeline import Timeline


def add_reply_spans(timeline: Timeline | None, worker: str, header: wire.Header, num_rows: int) -> None:
    """Record how long rows lay at a worker after they had arrived, and how long it computed them.

    The first is on a track of its own: rows may arrive while the worker computes those before them.
    """
    if timeline is None:
        return
    about = {"layer_id": header.layer_id, "micro_batch": header.micro_batch, "round": header.round}
    rows: dict[str, int | str] = {**about, "rows": num_rows, "worker": worker}
    timeline.add("arrived", header.received_ns, header.compute_start_ns, f"{worker}: arrived", **rows)
    timeline.add("experts", header.compute_start_ns, header.compute_end_ns, worker, **rows)
