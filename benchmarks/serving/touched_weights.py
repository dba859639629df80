"""How many bytes of weights a step has to read, how many operations to do, and how fast that can be at most.

Counted are weights: each once for all tokens of a step, a routed expert only if a token of the step chose it.
Not counted are the cache, attention over it, activations, and embeddings, of which a token reads one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_ceilings import Ceilings
from common.checkpoint import Checkpoint

ROUTED = re.compile(r"\.mlp\.experts\.\d+\.")
WEIGHT = re.compile(r"\.weight$")
Q8_0_BYTES = 34 / 32
"""Of an element in llama.cpp's Q8_0: blocks of 32 int8 with a float16 scale."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model: what it takes to read, and how many weights each token is multiplied by."""

    num_bytes: float
    num_weights: int


@dataclass(frozen=True, slots=True)
class TouchedWeights:
    """The weights of a mixture of experts.

    Attributes:
        always: what every token needs, without lm_head.
        lm_head: what every token needs whose successor is wanted.
        routed: all routed experts of all layers.
        num_experts: of a layer.
        experts_per_token: chosen by a token in each layer.
    """

    always: Part
    lm_head: Part
    routed: Part
    num_experts: int
    experts_per_token: int

    def step_bytes(self, num_tokens: int) -> float:
        """Bytes that a step reads, if every expert is as likely to be chosen as any other."""
        share_chosen = 1 - (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.always.num_bytes + self.lm_head.num_bytes + share_chosen * self.routed.num_bytes

    def step_operations(self, num_tokens: int, num_logits: int) -> float:
        """Multiplications and additions of a step."""
        routed = self.routed.num_weights * self.experts_per_token / self.num_experts
        return 2 * ((self.always.num_weights + routed) * num_tokens + self.lm_head.num_weights * num_logits)

    def limit(self, num_tokens: int, num_logits: int, ceilings: Ceilings, giga_operations_s: float) -> float:
        """Tokens/s if reading and arithmetic overlap completely and nothing else takes time."""
        reading_s = self.step_bytes(num_tokens) / ceilings.read_gb_s / 1e9
        arithmetic_s = self.step_operations(num_tokens, num_logits) / giga_operations_s / 1e9
        return num_tokens / max(reading_s, arithmetic_s)


def stored_weights(directory: Path) -> TouchedWeights:
    """The weights of a checkpoint, as large as they are stored."""
    checkpoint = Checkpoint(directory)
    return _count(directory, checkpoint, checkpoint.num_bytes)


def q8_0_weights(directory: Path) -> TouchedWeights:
    """The weights of a checkpoint, as large as they are in llama.cpp's Q8_0."""
    checkpoint = Checkpoint(directory)
    return _count(directory, checkpoint, lambda name: checkpoint.num_elements(name) * Q8_0_BYTES)


def _count(directory: Path, checkpoint: Checkpoint, size: Callable[[str], float]) -> TouchedWeights:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))

    def part(belongs: Callable[[str], object]) -> Part:
        names = [name for name in checkpoint.names if belongs(name)]
        weights = sum(checkpoint.num_elements(name) for name in names if WEIGHT.search(name))
        return Part(sum(map(size, names)), weights)

    def is_always(name: str) -> bool:
        return not (ROUTED.search(name) or name.startswith(("lm_head.", "model.embed_tokens.")))

    return TouchedWeights(
        always=part(is_always),
        lm_head=part(lambda name: name.startswith("lm_head.")),
        routed=part(ROUTED.search),
        num_experts=config["n_routed_experts"],
        experts_per_token=config["num_experts_per_tok"],
    )
