"""Spans of time on named tracks, and their export for a trace viewer."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that took time; start and end in monotonic nanoseconds."""

    name: str
    start_ns: int
    end_ns: int
    track: str
    args: dict[str, int | str] = field(default_factory=dict)


class Timeline:
    """Collects spans from any thread, at most so many. Pass None where nothing is recorded: it is free."""

    def __init__(self, most_spans: int | None = None) -> None:
        self._most_spans = most_spans
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> list[Span]:
        """What was recorded so far, in order of recording."""
        with self._lock:
            return list(self._spans)

    def add(self, name: str, start_ns: int, end_ns: int, track: str, **args: int | str) -> None:
        """Record one span."""
        with self._lock:
            if self._most_spans is None or len(self._spans) < self._most_spans:
                self._spans.append(Span(name, start_ns, end_ns, track, args))

    def write(self, path: Path) -> None:
        """Write all spans as Chrome trace JSON."""
        spans = self.spans
        tracks = {track: index for index, track in enumerate(dict.fromkeys(span.track for span in spans))}
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": index, "args": {"name": track}}
            for track, index in tracks.items()
        ]
        events = [
            {
                "ph": "X",
                "name": span.name,
                "pid": 0,
                "tid": tracks[span.track],
                "ts": span.start_ns / 1000,
                "dur": (span.end_ns - span.start_ns) / 1000,
                "args": span.args,
            }
            for span in spans
        ]
        path.write_text(json.dumps({"traceEvents": [*names, *events]}), encoding="utf-8")
