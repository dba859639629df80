"""What a trace of the exchange says: how long each part takes, and how much happens side by side. Pure."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROUTER = "router"
AT_ROUTER = ("attention", "shared_experts")
AT_WORKER = "experts"
ARRIVED = "arrived"
"""From the arrival of rows at a worker to the beginning of their computation."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Figures of one trace; times in microseconds.

    Attributes:
        medians_us: median duration by name of span.
        counts: spans by name.
        waiting_us: what the router waited for rows, in all.
        experts_us: time in which at least one worker computed.
        overlap: share of that time in which the router computed too.
        arrived_meanwhile: share of the messages that arrived at a worker while it computed another.
    """

    medians_us: dict[str, float]
    counts: dict[str, int]
    waiting_us: float
    experts_us: float
    overlap: float
    arrived_meanwhile: float

    def json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def summarize(trace: dict[str, Any]) -> TraceSummary:
    """Summarize a Chrome trace as common.timeline writes it."""
    spans: dict[str, list[Interval]] = defaultdict(list)
    computing: dict[str, list[Interval]] = defaultdict(list)
    arrivals: list[tuple[str, float]] = []
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        interval = (event["ts"], event["ts"] + event["dur"])
        spans[event["name"]].append(interval)
        if event["name"] == AT_WORKER:
            computing[event["args"]["worker"]].append(interval)
        elif event["name"] == ARRIVED:
            arrivals.append((event["args"]["worker"], event["ts"]))
    busy = {worker: union(intervals) for worker, intervals in computing.items()}
    early = [is_inside(at, busy.get(worker, ())) for worker, at in arrivals]
    experts = union(spans.get(AT_WORKER, ()))
    router = union(interval for name in AT_ROUTER for interval in spans.get(name, ()))
    experts_us = length(experts)
    return TraceSummary(
        medians_us={
            name: statistics.median(end - begin for begin, end in intervals)
            for name, intervals in spans.items()
        },
        counts={name: len(intervals) for name, intervals in spans.items()},
        waiting_us=sum(end - begin for begin, end in spans.get("wait", ())),
        experts_us=experts_us,
        overlap=length(intersection(experts, router)) / experts_us if experts_us else 0.0,
        arrived_meanwhile=sum(early) / len(early) if early else 0.0,
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in disjoint intervals, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The points in both; each argument is disjoint and in order."""
    common: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            common.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return common


def is_inside(point: float, intervals: Sequence[Interval]) -> bool:
    """Whether a point lies in an interval and not on its edge; intervals are disjoint and in order."""
    index = bisect_left(intervals, (point,)) - 1
    return index >= 0 and point < intervals[index][1]


def length(intervals: Iterable[Interval]) -> float:
    """The sum of the lengths."""
    return sum(end - begin for begin, end in intervals)
