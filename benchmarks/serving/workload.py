"""What everybody who is measured has to do, and how the speeds are called.

Standard library only: engines of peers import this in environments of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

Speeds = dict[str, list[float]]
"""Tokens/s of every repetition, by the names that `prefill_name` and `decode_name` give."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One prompt to its first token, then batches of greedy answers; each of it `repetitions` times.

    Attributes:
        prefill_tokens: length of the one long prompt.
        prompt_tokens: length of each prompt before an answer.
        decode_tokens: length of each answer.
        batches: how many answers run at once, one batch after another.
        threads: for arithmetic, in each process that computes.
    """

    prefill_tokens: int = 512
    prompt_tokens: int = 16
    decode_tokens: int = 32
    batches: tuple[int, ...] = (1, 8, 32)
    repetitions: int = 2
    threads: int = 2

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "batches": tuple(fields["batches"])})

    def prefill_name(self) -> str:
        """The name of the speed of the long prompt."""
        return f"prefill {self.prefill_tokens}"

    def decode_name(self, batch: int) -> str:
        """The name of the speed of `batch` answers at once."""
        return f"decode, batch {batch}"

    def no_speeds(self) -> Speeds:
        """Every name, and no repetition yet."""
        names = (self.prefill_name(), *map(self.decode_name, self.batches))
        return {name: [] for name in names}

    def long_prompt(self, repetition: int) -> list[int]:
        """The prompt of one repetition; none is like another, so that no prefix is found in a cache."""
        return prompt(self.prefill_tokens, 1000 + repetition)

    def short_prompts(self, batch: int) -> list[list[int]]:
        """The prompts of a batch."""
        return [prompt(self.prompt_tokens, seed) for seed in range(batch)]


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids below 90 100 that differ from prompt to prompt."""
    return [(seed * 7919 + position * 104729) % 90000 + 100 for position in range(num_tokens)]
