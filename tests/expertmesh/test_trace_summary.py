"""Overlap, counted by hand and against a brute force over single microseconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.timeline import Timeline
from expertmesh.trace_summary import intersection, length, summarize, union


def event(name: str, begin: int, end: int, worker: str = "") -> dict[str, object]:
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "args": {"worker": worker}}


def test_the_overlap_is_the_share_of_the_workers_time_in_which_the_router_computes() -> None:
    spans = [
        event("experts", 0, 10),
        event("experts", 5, 20),  # two workers at a time count once
        event("attention", 8, 12),
        event("shared_experts", 11, 13),
        event("wait", 13, 20),
        {"ph": "M", "name": "thread_name"},
    ]
    summary = summarize({"traceEvents": spans})
    assert summary.experts_us == 20
    assert summary.overlap == 5 / 20
    assert summary.waiting_us == 7
    assert summary.counts["experts"] == 2
    assert summary.medians_us["experts"] == 12.5


def test_messages_that_arrive_while_their_own_worker_computes_are_counted() -> None:
    spans = [
        event("arrived", 0, 0, "a"),
        event("experts", 0, 10, "a"),
        event("arrived", 5, 10, "a"),  # beside the first
        event("experts", 10, 20, "a"),
        event("arrived", 15, 15, "b"),  # only the other computes
        event("experts", 15, 30, "b"),
        event("arrived", 29, 30, "b"),
        event("experts", 30, 31, "b"),
    ]
    assert summarize({"traceEvents": spans}).arrived_meanwhile == 2 / 4


def test_a_trace_without_workers_overlaps_nothing() -> None:
    summary = summarize({"traceEvents": [event("attention", 0, 5)]})
    assert (summary.overlap, summary.arrived_meanwhile) == (0.0, 0.0)


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1])))


@given(intervals, intervals)
def test_unions_and_intersections_hold_the_points_they_should(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    def points(spans: object) -> set[int]:
        return {point for begin, end in spans for point in range(begin, end)}  # type: ignore[attr-defined]

    assert points(union(one)) == points(one)
    assert points(intersection(union(one), union(other))) == points(one) & points(other)
    assert length(union(one)) == len(points(one))


def test_a_timeline_that_is_full_keeps_its_first_spans() -> None:
    timeline = Timeline(most_spans=2)
    for index in range(5):
        timeline.add(f"span {index}", index, index + 1, "router")
    assert [span.name for span in timeline.spans] == ["span 0", "span 1"]
