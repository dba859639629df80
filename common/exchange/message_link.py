"""A link as the exchange sees it: messages in order, between one router and one expert worker."""

from __future__ import annotations

import socket
from typing import Protocol

from torch import Tensor


class MessageLink(Protocol):
    """Any thread may post; one thread receives. After a LinkError the link is of no further use.

    Attributes:
        came_ns: when the message came that was received last, by this host's monotonic clock; it may have
            been there for a while.
        transport: what carries the messages, and why where there was a choice: a part of a sentence.
        readable: becomes readable when a message has come; None where a thread has to wait in `receive`.
        keeps_memory: whether messages lie in the same few places again and again.
        is_backlogged: whether something that was posted waits until `readable` can be written to.
    """

    came_ns: int
    transport: str
    keeps_memory: bool

    @property
    def readable(self) -> socket.socket | None:
        """See above."""

    @property
    def is_backlogged(self) -> bool:
        """See above."""

    def message(self, num_bytes: int) -> Tensor:
        """Memory to write a message into, flat uint8 on the CPU, at least num_bytes long.

        Any number of messages may be written before the first of them is posted.
        """

    def post(self, message: Tensor) -> None:
        """Send the front of what `message` returned. Does not wait for the peer. Raises LinkError."""

    def settle(self, timeout_s: float) -> None:
        """Let go of what was posted; returns at once where the peer is known to have it. Raises LinkError."""

    def expect(self, num_bytes: int) -> None:
        """Be ready for one more message of at most num_bytes. Raises LinkError."""

    def receive(self) -> Tensor | None:
        """The next message, at least as long as it says itself; None: `readable`, and nothing has come.

        Raises:
            LinkError: the peer or the link is gone, or the message is longer than was expected.
        """

    def done(self, message: Tensor) -> None:
        """Give back the memory of a received message, which is not looked at any more."""

    def close(self) -> None:
        """Drop the link. Never blocks."""
