"""What one step computes: which tokens of which sequences. Pure and torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of tokens of one sequence. May begin in its prompt and end in its answer, after a preemption.

    Attributes:
        start: position of the first token; all positions before it are in the cache.
        num_tokens: at least 1; `sequence.tokens` and `sequence.block_table` cover all of them.
        samples: whether the last token is the last known one, so that its logits give the next.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks of one step, at most one per sequence; none means there is nothing to do."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """T, tokens of the step."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token, in the order of the rows of the logits."""
        return tuple(chunk.sequence for chunk in self.chunks if chunk.samples)
