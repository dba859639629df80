"""One answer in the making: its tokens, how far they are computed, where their cache lives. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.replica_choice import request_key


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one sequence are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_k: how many of the likeliest tokens may be drawn; 0 is all of them.
        top_p: the least mass of likeliest tokens that may be drawn; 1 is all of them.
        seed: the noise of a token is a function of this seed and the token's position.
        logprobs: how many alternatives to report; 0 reports the drawn token alone, None nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature <= 0.0 or self.top_k == 1


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated after it. Owned by the scheduler, which alone changes it.

    A position below `num_prompt_tokens` is computed by the prefill path, any other by the decode path,
    however often it is computed: a replay gives the same bits.

    Attributes:
        tokens: prompt and generated tokens.
        num_prompt_tokens: how many of `tokens` are the prompt.
        max_tokens: most tokens to generate.
        request_key: what tells its rows from those of others where an expert has replicas.
        num_computed: leading tokens whose rows are in the cache.
        block_table: KV blocks in the order of positions.
    """

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    request_key: int = field(init=False)

    def __post_init__(self) -> None:
        self.request_key = request_key(self.request_id)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not in the cache yet; 1 while the sequence decodes."""
        return len(self.tokens) - self.num_computed
