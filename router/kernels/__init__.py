"""The operations the router needs from its device. A device is a module that has them all.

Shapes: T tokens, S keys of a sequence, N tokens on the decode path, H heads, C kv_lora_rank,
R qk_rope_head_dim, E experts, K experts per token, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from common.device import find_device
from common.errors import ConfigError
from common.int8_reference import PackedInt8
from common.layer_weights import LayerWeights
from common.model_config import ModelConfig


class DecodeLayer(Protocol):
    """A layer up to its experts, for rows that are all generated tokens.

    It gives the bits of the operations below, one after another: residual and update, norm, attention, norm,
    gate.
    """

    def __call__(
        self,
        residual: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bring the residual [T, D] up to date, in place.

        Args are those of `rotate_and_store` and `absorbed_attention`; the update [T, D] is what the layer
        before made and the residual lacks, or None.

        Returns:
            [T, D] for experts or MLP; what `choose_experts` returns, [T, 0] where the layer has no experts.
        """


class RouterKernels(Protocol):
    """What a module in this package must define. No result depends on other rows of the same call."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply rows: [T, in], [out, in], [out] -> [T, out], in the dtype of x, which is the weight's."""

    def gate_logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply rows by the gate's weight, in float32: [T, D], [E, D] float32 -> [T, E] float32."""

    def pack_int8(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedInt8:
        """Lay out an int8 weight: [out, in] int8, [out] float32, [out] int32; it may be kept."""

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise every row for itself: [T, in] -> [T, in] int8, [T] float32; max|row| becomes 127."""

    def quantize_rows_static(self, x: Tensor, scale: float, offset: float) -> Tensor:
        """Quantise all rows alike: round(x / scale) + offset within int8, [T, in] -> [T, in] int8."""

    def int8_linear(self, rows: Tensor, row_scales: Tensor | None, packed: PackedInt8) -> Tensor:
        """Multiply int8 rows: [T, in] int8, [T] float32 -> [T, out] float32.

        The sums, with the bias, are exact int32; float32(sums) * scale * row_scales, in this order.
        """

    def quantizing_linear(self, x: Tensor, packed: PackedInt8, bias: Tensor | None) -> Tensor:
        """Quantise every row for itself, multiply, add the bias in float32: [T, in], [out] -> [T, out].

        Rounded once, to the dtype of x.
        """

    def int8_mlp(self, x: Tensor, gate_up: PackedInt8, down: PackedInt8) -> Tensor:
        """Run rows through a SwiGLU in int8, [2F, D] and [D, F], quantising twice: [T, D] -> [T, D].

        gate, up and their product stay float32, on an NPU they have the dtype of x; so has the result.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise rows in float32, round, apply the weight: [T, D], [D] -> [T, D]."""

    def add_rms_norm(self, residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add the update to the residual, in place, and normalise that: 2 x [T, D], [D] -> [T, D]."""

    def add_routed(self, shared: Tensor, routed: Tensor) -> Tensor:
        """Add what routed experts made to what shared ones did, rounding once: [T, D], [T, D] float32.

        `shared` may be written to.
        """

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, rounded once: 2 x [T, F] -> [T, F]."""

    def mlp_rows(self, num_rows: int, intermediate_size: int) -> int:
        """Return how many of so many rows go through an MLP of linear layers at a time; at least 1."""

    def choose_experts(
        self, logits: Tensor, bias: Tensor | None, config: ModelConfig
    ) -> tuple[Tensor, Tensor]:
        """Choose experts by the checkpoint's rules and weigh them.

        Args:
            logits: [T, E] float32.
            bias: [E] float32, what the choice is corrected by where topk_method is noaux_tc.
            config: says the rules.

        Returns:
            [T, K] int64, experts distinct within a row; [T, K] float32.
        """

    def rotate_and_store(
        self,
        q: Tensor,
        latents: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Give queries and keys their positions, and normalised latents with these keys to the cache.

        Neighbouring pairs turn by their angle: the last R elements of each head of a query, in place, and
        k_pe.

        Args:
            q: [T, H, nope + R].
            latents: [T, C + R], kv_c and k_pe as they were projected.
            norm_weight: [C], of the norm of kv_c.
            norm_bias: [C], what is added after that, or None.
            eps: of that norm.
            cos: [T, R/2] float32.
            sin: [T, R/2] float32.
            cache: [blocks, block_size, C + R].
            slot_mapping: [T] int64, block * block_size + offset.
        """

    def gather_latents(self, cache: Tensor, block_table: Tensor, length: int) -> Tensor:
        """Read the first `length` rows of a sequence: [blocks, block_size, C + R], [n] -> [length, C + R]."""

    def prefill_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, tile: int
    ) -> Tensor:
        """Attend within one sequence: query i stands at position start + i and sees keys 0 ... start + i.

        Args:
            q: [T, H, Dq].
            k: [S, H, Dq], at least start + T keys.
            v: [S, H, Dv].
            start: position of the first query.
            scale: what scores are multiplied with.
            tile: tokens of a KV block.

        Returns:
            [T, H, Dv] in the dtype of q; scores, softmax and sums are float32.
        """

    def absorbed_attention(
        self,
        q: Tensor,
        kv_b: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Attend to cached latents in their own space, each query to a sequence of its own.

        A head's part of a query that carries no position goes into that space by the first lines of kv_b,
        what the query finds comes out by the others.

        Args:
            q: [N, H, nope + R].
            kv_b: [H, nope + v, C].
            cache: [blocks, block_size, C + R]; slots of no token may hold anything.
            block_tables: [N, most blocks of any query] int64, padded with any valid block.
            context_lens: [N] int64 on the CPU, keys each query sees, at least 1.
            scale: what scores are multiplied with.

        Returns:
            [N, H, v] in the dtype of q, as is what lies between the products; scores, softmax and sums are
            float32.
        """

    def decode_layer(self, weights: LayerWeights, config: ModelConfig) -> DecodeLayer | None:
        """Make one operation of a layer up to its experts; None where these weights have none here."""


def load_kernels(device: str) -> RouterKernels:
    """Import the module of `device` and nothing else, so vendor packages stay optional.

    Raises:
        ConfigError: there is no such device, or no kernels for it.
    """
    module = f"{__name__}.{find_device(device).name}"
    try:
        return cast(RouterKernels, import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(
            f"device {device!r} has no router kernels ({module} is missing): choose device 'cpu'"
        ) from error
