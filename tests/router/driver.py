"""Runs the router's model step by step, without an engine: sequences, blocks, a plan, logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor

from common.device import open_device
from common.exchange import Dispatched, Extra, RouterExchange, RowOrigins, StepHeader
from common.exchange.loopback import LoopbackExchange
from common.model_config import ModelConfig
from expert_worker.in_process import open_experts
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource
from router.batch import build_batch
from router.model.latent_cache import LatentCache
from router.model.loading import load_model
from router.plan import Chunk, Plan
from router.sequence import Sequence

BLOCK_SIZE = 16


class NaiveExchange:
    """A RouterExchange that runs the experts at once, one after the other, on the rows that chose them."""

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        self._num_experts = config.n_routed_experts
        experts = {layer_id: tuple(range(self._num_experts)) for layer_id in config.moe_layer_ids}
        shard = Shard(load_kernels("cpu"), torch.device("cpu"))
        source = ShardSource(directory, str(dtype).removeprefix("torch."))
        self._layers = shard.hold(source, experts, lambda loaded, total: None)
        self._sums: dict[tuple[int, int], Tensor] = {}
        self.extra = Extra()

    def begin(self, header: StepHeader, origins: SequenceOf[RowOrigins] = ()) -> None:
        raise NotImplementedError

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        num_tokens, num_chosen = topk_ids.shape
        slots = topk_ids.flatten().argsort(stable=True)  # sorted by expert
        counts = torch.bincount(topk_ids.flatten(), minlength=self._num_experts)
        rows = hidden_states[slots // num_chosen]
        outputs = torch.empty(num_tokens * num_chosen, hidden_states.shape[1])
        outputs[slots] = self._layers[layer_id].forward(rows, counts).float()
        products = outputs.unflatten(0, (num_tokens, num_chosen)) * topk_weights.unsqueeze(-1)
        total = products.new_zeros(num_tokens, hidden_states.shape[1], dtype=torch.float64)
        for slot in range(num_chosen):
            total += products[:, slot]
        self._sums[layer_id, micro_batch] = total.float()
        return Dispatched(layer_id, micro_batch, num_tokens)

    def combine(self, dispatched: Dispatched) -> Tensor:
        return self._sums.pop((dispatched.layer_id, dispatched.micro_batch))

    def close(self) -> None:
        self._sums.clear()


def own_experts(directory: Path, config: ModelConfig, dtype: torch.dtype, device: str) -> LoopbackExchange:
    """All experts on `device` in this process, as an engine without expert workers has them."""
    experts = {layer_id: tuple(range(config.n_routed_experts)) for layer_id in config.moe_layer_ids}
    name = str(dtype).removeprefix("torch.")
    return LoopbackExchange(
        open_experts(directory, name, device, experts, lambda loaded, total: None), experts
    )


class Driver:
    """A loaded model with a cache of its own and the experts in the same process."""

    def __init__(
        self,
        directory: Path,
        dtype: str = "auto",
        num_blocks: int = 512,
        micro_batches: int = 1,
        device: str = "cpu",
    ) -> None:
        self.device = open_device(device)
        self.model = load_model(directory, dtype, device, lambda loaded, total: None)
        self.config = self.model.config
        self.cache = LatentCache(self.config, num_blocks, BLOCK_SIZE, self.model.dtype, self.device)
        self.exchange: RouterExchange = (
            NaiveExchange(directory, self.config, self.model.dtype)
            if device == "cpu"
            else own_experts(directory, self.config, self.model.dtype, device)
        )
        self.micro_batches = micro_batches
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ids = itertools.count()

    def sequence(
        self, tokens: SequenceOf[int], num_prompt_tokens: int | None = None, room: int = 0
    ) -> Sequence:
        """Make a sequence with blocks for its tokens and `room` more."""
        num_prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        sequence = Sequence(str(next(self._ids)), list(tokens), num_prompt, max_tokens=room + 1)
        num_blocks = -(-(len(tokens) + room) // BLOCK_SIZE)
        sequence.block_table = [self._free.pop() for _ in range(num_blocks)]
        return sequence

    def step(self, *chunks: Chunk) -> Tensor:
        """Compute the chunks together; return the logits of those that sample, widened to float32."""
        parts = Plan(chunks).split(self.micro_batches)
        batches = [build_batch(part, BLOCK_SIZE, self.device, number) for number, part in enumerate(parts)]
        return self.model(batches, self.cache, self.exchange).float()

    def finish(self, *sequences: Sequence, chunk_size: int | None = None) -> Tensor:
        """Compute all that is pending, `chunk_size` tokens of each a step; return the last logits."""
        rows: dict[str, Tensor] = {}
        while pending := [sequence for sequence in sequences if sequence.num_pending]:
            chunks = []
            for sequence in pending:
                num_tokens = min(sequence.num_pending, chunk_size or sequence.num_pending)
                is_last = num_tokens == sequence.num_pending
                chunks.append(Chunk(sequence, sequence.num_computed, num_tokens, is_last))
                sequence.num_computed += num_tokens
            logits = self.step(*chunks)
            sampled = Plan(tuple(chunks)).sampled
            rows |= {sequence.request_id: row for sequence, row in zip(sampled, logits, strict=True)}
        return torch.stack([rows[sequence.request_id] for sequence in sequences])

    def greedy(self, sequences: SequenceOf[Sequence], num_tokens: int) -> list[list[int]]:
        """Continue all sequences together with the likeliest tokens."""
        for _ in range(num_tokens):
            logits = self.finish(*sequences)
            for sequence, token_id in zip(sequences, logits.argmax(-1).tolist(), strict=True):
                sequence.tokens.append(token_id)
        return [sequence.tokens[sequence.num_prompt_tokens :] for sequence in sequences]


def random_prompts(lengths: SequenceOf[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Draw a prompt of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
