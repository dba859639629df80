"""The journal: every request that is being answered, with all the tokens it has got so far.

A stream reads its entry from its own position, so a slow client holds up nobody; what it has not read yet is
bounded by the request's max_tokens. Every entry ends exactly once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import ExpertMeshError, QueueFull, RequestError
from router.messages import Submit

STOP, LENGTH, ABORTED = "stop", "length", "aborted"


@dataclass(frozen=True, slots=True)
class End:
    """Why an answer is over: `reason` is STOP, LENGTH or ABORTED, or `error` says what went wrong."""

    reason: str = ""
    error: ExpertMeshError | None = None


@dataclass(slots=True)
class Entry:
    """One request.

    Attributes:
        tokens: generated so far, a stop token included.
        logprobs: (logprob, top) per token where they were asked for.
        arrived_s, first_token_s, last_token_s: on the monotonic clock.
    """

    submit: Submit
    arrived_s: float = field(default_factory=time.monotonic)
    submitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    end: End | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.submit.request_id

    def finish(self, end: End) -> bool:
        """End the answer; False where it had ended before."""
        if self.end is not None:
            return False
        self.end = end
        self._changed.set()
        return True

    def take(self, event: dict[str, Any]) -> None:
        """Append the token of one step."""
        if self.end is not None:
            return
        self.last_token_s = time.monotonic()
        self.first_token_s = self.first_token_s or self.last_token_s
        self.tokens.append(int(event["token"]))
        if event.get("logprob") is not None:
            top = [(int(token_id), float(logprob)) for token_id, logprob in event.get("top") or ()]
            self.logprobs.append((float(event["logprob"]), top))
        if event.get("fin"):
            self.end = End(str(event["fin"]))
        self._changed.set()

    async def wait_beyond(self, num_tokens: int) -> None:
        """Return when there are more than `num_tokens` tokens, or the answer is over."""
        while len(self.tokens) <= num_tokens and self.end is None:
            self._changed.clear()
            await self._changed.wait()


class Journal:
    """All open entries by request_id. Owned by the event loop."""

    def __init__(self, max_waiting: Callable[[], int]) -> None:
        """`max_waiting` says how many requests may wait now."""
        self._max_waiting = max_waiting
        self._entries: dict[str, Entry] = {}
        self._waiting: set[str] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_waiting(self) -> int:
        """Requests without their first token."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Refuse a request where too many wait already.

        Raises:
            QueueFull: try again later.
        """
        max_waiting = self._max_waiting()
        if len(self._waiting) >= max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} requests wait already and ExpertMesh.maxQueuedRequests is "
                f"{max_waiting}: try again later"
            )

    def open(self, submit: Submit) -> Entry:
        """Take in a request.

        Raises:
            QueueFull: too many wait already.
            RequestError: its id is in use.
        """
        self.check_room()
        if submit.request_id in self._entries:
            raise RequestError(
                "request_id",
                f"request_id {submit.request_id!r} is in use already: choose another or leave it empty",
            )
        entry = Entry(submit)
        self._entries[submit.request_id] = entry
        self._waiting.add(submit.request_id)
        self._empty.clear()
        return entry

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        """Write down the tokens of one step; those of requests that were closed are dropped."""
        for event in events:
            entry = self._entries.get(str(event["id"]))
            if entry is not None:
                entry.take(event)
                self._waiting.discard(entry.request_id)

    def finish(self, request_ids: Iterable[str], end: End) -> list[str]:
        """End some answers; return the ids that were open."""
        ended = [name for name in request_ids if name in self._entries and self._entries[name].finish(end)]
        self._waiting.difference_update(ended)
        return ended

    def finish_all(self, end: End) -> list[str]:
        """End every answer that is open."""
        return self.finish(list(self._entries), end)

    def close(self, entry: Entry) -> None:
        """Forget an entry: its stream is over."""
        self._entries.pop(entry.request_id, None)
        self._waiting.discard(entry.request_id)
        if not self._entries:
            self._empty.set()

    def unfinished(self) -> list[Submit]:
        """What an engine needs to go on with every answer that is open, oldest first."""
        return [
            replace(entry.submit, generated=list(entry.tokens))
            for entry in self._entries.values()
            if entry.end is None
        ]

    async def wait_empty(self) -> None:
        """Return when no stream is open."""
        await self._empty.wait()
