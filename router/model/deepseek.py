"""DeepSeek-V2 and V3 as the router sees them: everything but the routed experts. Read it from top to bottom.

Parameter paths are the checkpoint's own names. A row gets the same bits whatever stands beside it.
Shapes: T tokens, B sequences that sample, K experts per token, E experts, G groups of experts, D hidden_size,
H heads, C kv_lora_rank, R qk_rope_head_dim, S tokens of a sequence, N tokens that decode, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.exchange import RouterExchange
from common.model_config import ModelConfig
from router.batch import Batch, PrefillSpan
from router.kernels import RouterKernels
from router.model.latent_cache import LatentCache
from router.model.linear import Linear
from router.model.rope import RotaryTable, softmax_scale

Computation = Generator[None, None, Tensor]
"""A computation that yields where it waits for rows that are away, so that another can go on meanwhile."""

LATENT_NORM_EPS = 1e-6
"""DeepSeek's code gives the norms inside attention this value, whatever rms_norm_eps says."""


# ------------------------------------------------------------------------- which experts, and how much


class Gate(nn.Module):
    """Chooses K of E experts for every token. Float32 throughout, whatever the model's dtype."""

    weight: Tensor
    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig, kernels: RouterKernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        bias = None
        if config.topk_method == "noaux_tc":
            bias = nn.Parameter(
                torch.empty(config.n_routed_experts, dtype=torch.float32), requires_grad=False
            )
        self.register_parameter("e_score_correction_bias", bias)

    def forward(
        self, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:  # [T, D] -> [T, K] int64, [T, K] float32
        """Return the chosen experts and the weight of each."""
        logits = self.kernels.gate_logits(hidden_states, self.weight)  # [T, E]
        return self.kernels.choose_experts(logits, self.e_score_correction_bias, self.config)


# -------------------------------------------------------------------------------------------- after attention


class MLP(nn.Module):
    """SwiGLU: the dense layers and the shared experts."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, kernels: RouterKernels, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.intermediate_size = intermediate_size
        self.gate_proj = Linear(hidden_size, intermediate_size, kernels, dtype)
        self.up_proj = Linear(hidden_size, intermediate_size, kernels, dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, kernels, dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [T, D] -> [T, D]
        """Transform every token for itself, as many at a time as the device takes."""
        at_once = self.kernels.mlp_rows(len(hidden_states), self.intermediate_size)
        transformed = [self._transform(rows) for rows in hidden_states.split(at_once)]
        return transformed[0] if len(transformed) == 1 else torch.cat(transformed)

    def _transform(self, rows: Tensor) -> Tensor:
        hidden = self.kernels.swiglu(self.gate_proj(rows), self.up_proj(rows))
        return self.down_proj(hidden)


class NoExperts(nn.Module):
    """Stands where a model has no shared experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # [T, D] -> [T, D]
        """Add nothing."""
        return torch.zeros_like(hidden_states)


class MoE(nn.Module):
    """Routed experts, which are elsewhere, and shared ones, which are here."""

    def __init__(
        self, config: ModelConfig, layer_id: int, kernels: RouterKernels, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.kernels = kernels
        self.gate = Gate(config, kernels)
        num_shared = config.n_shared_experts or 0
        shared_size = config.moe_intermediate_size * num_shared
        self.shared_experts = (
            MLP(config.hidden_size, shared_size, kernels, dtype) if num_shared else NoExperts()
        )

    def forward(
        self,
        hidden_states: Tensor,
        micro_batch: int,
        exchange: RouterExchange,
        chosen: tuple[Tensor, Tensor] | None = None,
    ) -> Computation:  # [T, D] -> [T, D]
        """Send the rows away, compute the shared experts meanwhile, add what comes home.

        `chosen` is what the gate says, where it has been asked already.
        """
        topk_ids, topk_weights = self.gate(hidden_states) if chosen is None else chosen
        dispatched = exchange.dispatch(self.layer_id, micro_batch, hidden_states, topk_ids, topk_weights)
        shared = self.shared_experts(hidden_states)  # computed while the rows are away
        yield  # so is what another micro-batch has to compute
        routed = exchange.combine(dispatched)  # float32: rows come home, weighted and summed
        del dispatched  # it holds the rows that came: six for every one that goes on from here
        # One rounding to the model's dtype, after the sum: the same bits however many workers took part.
        return self.kernels.add_routed(shared, routed)


# -------------------------------------------------------------------------------------------------- attention


class RMSNorm(nn.Module):
    """Scales a row to unit root mean square, then by a weight."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, size: int, eps: float, kernels: RouterKernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:  # [T, size] -> [T, size]
        """Normalize every row for itself."""
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, update: Tensor) -> Tensor:  # 2 x [T, size] -> [T, size]
        """Add the update to the residual, in place, and normalize every row of that."""
        return self.kernels.add_rms_norm(residual, update, self.weight, self.eps)


class BiasedRMSNorm(RMSNorm):
    """RMSNorm, then a bias: what msModelSlim makes of a norm where it takes outliers out of activations."""

    bias: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        """Take the place of `norm`."""
        super().__init__(len(norm.weight), norm.eps, norm.kernels, norm.weight.dtype)
        self.bias = nn.Parameter(torch.empty_like(norm.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, size] -> [T, size]
        """Normalize every row for itself, round, then add."""
        return super().forward(x) + self.bias

    def add(self, residual: Tensor, update: Tensor) -> Tensor:  # 2 x [T, size] -> [T, size]
        """Add the update to the residual, in place, normalize every row of that, round, then add."""
        return super().add(residual, update) + self.bias


class MLA(nn.Module):
    """Multi-head latent attention: a token's keys and values are one latent, kv_c, and one rotated key, k_pe.

    A prompt token expands the latents of its sequence to keys and values (plain). A generated token instead
    moves its query into the latent space and its result out of it (absorbed), which reads each cached latent
    once for all heads.
    """

    def __init__(
        self, config: ModelConfig, layer_id: int, kernels: RouterKernels, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.kernels = kernels
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scale = softmax_scale(config)

        hidden_size, has_bias = config.hidden_size, config.attention_bias
        q_size = self.num_heads * config.qk_head_dim
        self.has_q_lora = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, q_size, kernels, dtype)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank, kernels, dtype, has_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, kernels, dtype)
            self.q_b_proj = Linear(config.q_lora_rank, q_size, kernels, dtype)
        latent_size = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(hidden_size, latent_size, kernels, dtype, has_bias)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS, kernels, dtype)
        kv_size = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = Linear(self.kv_lora_rank, kv_size, kernels, dtype)
        self.o_proj = Linear(self.num_heads * self.v_head_dim, hidden_size, kernels, dtype, has_bias)

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LatentCache
    ) -> Tensor:  # [T, D], 2 x [T, R/2] -> [T, D]
        """Store the latents of all rows, then let every row attend to its own sequence."""
        q = self._queries(hidden_states)
        latents = self.kv_a_proj_with_mqa(hidden_states)  # kv_c and k_pe
        blocks, norm = cache.layer(self.layer_id), self.kv_a_layernorm
        self.kernels.rotate_and_store(
            q, latents, norm.weight, norm.bias, norm.eps, cos, sin, blocks, batch.slot_mapping
        )

        # As in most steps, all rows decode or are of one prompt: none has to be picked out.
        if len(batch.decode_rows) == len(hidden_states):
            return self.o_proj(self._attend_absorbed(q, batch, blocks).flatten(1))
        if batch.prefills[0].num_tokens == len(hidden_states):
            return self.o_proj(self._attend_plain(q, batch.prefills[0], blocks).flatten(1))
        output = torch.empty(
            len(hidden_states),
            self.num_heads,
            self.v_head_dim,
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        for span in batch.prefills:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            output[rows] = self._attend_plain(q[rows], span, blocks)
        if len(batch.decode_rows):
            decoding = batch.decode_rows
            output[decoding] = self._attend_absorbed(q[decoding], batch, blocks)
        return self.o_proj(output.flatten(1))

    def _queries(self, hidden_states: Tensor) -> Tensor:  # [T, D] -> [T, H, nope + R]
        """Project to queries, whose last R elements will carry the position."""
        if self.has_q_lora:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            q = self.q_proj(hidden_states)
        return q.unflatten(-1, (self.num_heads, -1))

    def _attend_plain(self, q: Tensor, span: PrefillSpan, blocks: Tensor) -> Tensor:
        """Attend with keys and values expanded from the latents; they live no longer than this call."""
        latents = self.kernels.gather_latents(blocks, span.block_table, span.end)  # [S, C + R]
        kv_c, k_pe = latents.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(kv_c).unflatten(-1, (self.num_heads, -1))  # [S, H, nope + v]
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1)
        tile = blocks.shape[1]
        return self.kernels.prefill_attention(q, k, v, span.start, self.scale, tile)

    def _attend_absorbed(self, q: Tensor, batch: Batch, blocks: Tensor) -> Tensor:
        """Attend in the latent space: kv_b_proj's key half goes to queries, its value half to results."""
        kv_b = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, nope + v, C]
        return self.kernels.absorbed_attention(
            q, kv_b, blocks, batch.block_tables, batch.context_lens, self.scale
        )  # [N, H, v]


# -------------------------------------------------------------------------------------------- the whole model


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP. What each makes is added to the residual by the next norm."""

    def __init__(
        self, config: ModelConfig, layer_id: int, kernels: RouterKernels, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.has_experts = layer_id in config.moe_layer_ids
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.self_attn = MLA(config, layer_id, kernels, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.mlp = (
            MoE(config, layer_id, kernels, dtype)
            if self.has_experts
            else MLP(config.hidden_size, config.intermediate_size, kernels, dtype)
        )
        # What router.model.fused_decode puts here takes the place of all but `mlp`, with the same bits.
        self.fused_decode: nn.Module | None = None

    def forward(
        self,
        residual: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        cache: LatentCache,
        exchange: RouterExchange,
    ) -> Computation:  # 2 x [T, D], 2 x [T, R/2] -> [T, D]
        """Compute one layer for all rows of a micro-batch.

        `update` is what the layer before made and the residual lacks; it is added in place. Returns what the
        residual lacks after this one.
        """
        chosen = None
        if self.fused_decode is not None and len(batch.decode_rows) == len(residual):
            blocks = cache.layer(self.layer_id)
            hidden_states, chosen = self.fused_decode(residual, update, cos, sin, batch, blocks)
        else:
            norm = self.input_layernorm
            hidden_states = norm(residual) if update is None else norm.add(residual, update)
            attended = self.self_attn(hidden_states, cos, sin, batch, cache)
            hidden_states = self.post_attention_layernorm.add(residual, attended)
            del attended
        if self.has_experts:
            return (yield from self.mlp(hidden_states, batch.micro_batch, exchange, chosen))
        return self.mlp(hidden_states)


class Embedding(nn.Module):
    """The vector of every token id."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:  # [T] -> [T, D]
        """Look the ids up."""
        return F.embedding(input_ids, self.weight)


class DeepseekModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig, kernels: RouterKernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_id, kernels, dtype) for layer_id in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype)
        self.rotary = RotaryTable(config)

    def forward(self, batch: Batch, cache: LatentCache, exchange: RouterExchange) -> Computation:  # -> [B, D]
        """Compute the rows of a micro-batch; return those whose logits are wanted, normalized."""
        residual = self.embed_tokens(batch.input_ids)
        cos, sin = self.rotary.lookup(batch.positions, batch.num_positions)
        first, *others = self.layers
        update = yield from first(residual, None, cos, sin, batch, cache, exchange)
        for layer in others:
            update = yield from layer(residual, update, cos, sin, batch, cache, exchange)
        return self.norm.add(residual[batch.logits_rows], update[batch.logits_rows])


class DeepseekForCausalLM(nn.Module):
    """The model and its vocabulary."""

    def __init__(
        self, config: ModelConfig, kernels: RouterKernels, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.model = DeepseekModel(config, kernels, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, kernels, dtype)

    @torch.inference_mode()
    def forward(
        self, micro_batches: Sequence[Batch], cache: LatentCache, exchange: RouterExchange
    ) -> Tensor:  # -> [B, V], in the model's dtype: the sampler widens the rows that need it
        """Run one step; the exchange is an argument because each epoch brings another.

        A sequence may go on in the next micro-batch: at every layer that one comes after the one before.

        Raises:
            WorkerLost: an expert worker did not answer. The step may run again: it writes the same rows.
        """
        hidden_states = torch.cat(take_turns([self.model(batch, cache, exchange) for batch in micro_batches]))
        if self.config.tie_word_embeddings:
            return self.kernels.linear(hidden_states, self.model.embed_tokens.weight, None)
        return self.lm_head(hidden_states)


def take_turns(computations: Sequence[Computation]) -> list[Tensor]:
    """Run computations side by side: where one waits for its rows, the next goes on."""
    results: dict[int, Tensor] = {}
    waiting = deque(enumerate(computations))
    while waiting:
        index, computation = waiting.popleft()
        try:
            next(computation)
        except StopIteration as done:
            results[index] = done.value
        else:
            waiting.append((index, computation))
    return [results[index] for index in range(len(computations))]
