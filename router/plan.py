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

    def cut(self, num_tokens: int) -> tuple[Chunk, Chunk]:
        """The first `num_tokens` of it, and the rest."""
        head = Chunk(self.sequence, self.start, num_tokens, samples=False)
        rest = Chunk(self.sequence, self.start + num_tokens, self.num_tokens - num_tokens, self.samples)
        return head, rest


@dataclass(frozen=True, slots=True)
class Plan:
    """The chunks of one step, at most one per sequence; none means there is nothing to do."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """T, tokens of the step."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    def split(self, num_parts: int) -> tuple[Plan, ...]:
        """Cut the plan into at most `num_parts` plans of almost equal length, in order; chunks may be cut."""
        num_parts = max(min(num_parts, self.num_tokens), 1)
        ends = [self.num_tokens * (part + 1) // num_parts for part in range(num_parts)]
        parts: list[list[Chunk]] = [[] for _ in ends]
        part = position = 0
        for chunk in self.chunks:
            left = chunk
            while (room := ends[part] - position) < left.num_tokens:
                if room:
                    head, left = left.cut(room)
                    parts[part].append(head)
                    position += room
                part += 1
            parts[part].append(left)
            position += left.num_tokens
        return tuple(Plan(tuple(chunks)) for chunks in parts)

    def without(self, sequence: Sequence) -> Plan:
        """The plan without the chunk of a sequence."""
        return Plan(tuple(chunk for chunk in self.chunks if chunk.sequence is not sequence))

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token, in the order of the rows of the logits."""
        return tuple(chunk.sequence for chunk in self.chunks if chunk.samples)
