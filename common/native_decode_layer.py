"""What a layer does to generated tokens before its experts, by one call of the native kernels.

The bits are those of the kernels that it calls one after another, in common/native/decode_layer.cpp.
Shapes: T tokens, D hidden_size, H heads, C kv_lora_rank, R qk_rope_head_dim, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from common import compute_threads
from common.int8_reference import PackedInt8
from common.layer_weights import LayerWeights
from common.model_config import ModelConfig
from common.native_gate import gate_rules
from common.native_int8 import PackedWeight
from common.native_library import PATHS, best_path, open_library

_POINTER, _SIZE, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Layer(ctypes.Structure):
    """DecodeLayer of the C++ file."""

    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "q_a", "q_a_norm", "q", "kv_a", "kv_a_norm")),
        *((name, _POINTER) for name in ("kv_a_norm_bias", "kv_b", "o", "post_norm", "gate", "gate_bias")),
        *((name, _SIZE) for name in ("hidden_size", "q_lora_rank", "heads", "nope", "rope", "latents")),
        *((name, _SIZE) for name in ("values", "block_size", "experts", "groups", "kept_groups", "top_k")),
        *((name, _NUMBER) for name in ("is_softmax", "is_by_best_two", "is_normalized")),
        *((name, _FLOAT) for name in ("eps", "latent_eps", "scale", "factor")),
    )


class _Rows(ctypes.Structure):
    """DecodeRows of the C++ file."""

    _fields_ = (
        *((name, _POINTER) for name in ("residual", "update", "cos", "sin", "slots", "tables", "lengths")),
        *(("cache", _POINTER), ("tokens", _SIZE), ("table_stride", _SIZE)),
    )


class NativeDecodeLayer:
    """The call for one layer. Keeps the weights it points at."""

    def __init__(self, weights: LayerWeights, config: ModelConfig) -> None:
        """Raises ConfigError where the kernels were not built, ValueError where they cannot take weights."""
        library = open_library()
        self._decode = library.decode_layer
        self._decode.argtypes = [_NUMBER] * 3 + [_POINTER] * 5
        self._path = PATHS.index(best_path(library))
        self._dtype = weights.kv_b.dtype
        if not takes(weights):
            raise ValueError("these weights are not all of the dtypes and layouts that the kernels read")
        self._weights = weights
        self._layer = _described(weights, config)
        self._top_k = config.num_experts_per_tok if weights.gate is not None else 0

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
        """Bring the residual up to date, and prepare what experts, or a dense MLP, are given.

        Args:
            residual: [T, D], without gaps; the update [T, D] of the layer before, if any, and what attention
                makes are added in place.
            update: see above.
            cos: [T, R / 2] float32, like sin.
            slot_mapping: [T] int64.
            block_tables: [T, most blocks of any token] int64.
            context_lens: [T] int64.
            cache: [blocks, block_size, C + R].

        Returns:
            [T, D]; the chosen experts [T, K] int64 and their weights [T, K] float32, without a gate [T, 0].
        """
        num_tokens = residual.shape[0]
        hidden_states = torch.empty(residual.shape, dtype=self._dtype)
        topk_ids = torch.empty(num_tokens, self._top_k, dtype=torch.int64)
        topk_weights = torch.empty(num_tokens, self._top_k, dtype=torch.float32)
        self._layer.block_size = cache.shape[1]
        rows = _Rows(
            residual.data_ptr(),
            None if update is None else update.data_ptr(),
            *(cos.data_ptr(), sin.data_ptr(), slot_mapping.data_ptr(), block_tables.data_ptr()),
            *(context_lens.data_ptr(), cache.data_ptr(), num_tokens, block_tables.shape[1]),
        )
        failure = self._decode(
            *(self._path, compute_threads.count(), self._dtype is torch.bfloat16),
            *(ctypes.addressof(self._layer), ctypes.addressof(rows)),
            *(hidden_states.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to compute {num_tokens} rows: send fewer at once")
        return hidden_states, topk_ids, topk_weights


def takes(weights: LayerWeights) -> bool:
    """Whether the kernels read weights like these: packed by them, of one dtype, without gaps."""
    floats = weights.floats
    dtype = floats[0].dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(one.dtype == dtype and one.is_contiguous() for one in floats)
        and all(isinstance(one, PackedWeight) for one in weights.packed)
    )


def _described(weights: LayerWeights, config: ModelConfig) -> _Layer:
    q_a, q_a_norm = (None, None) if weights.q_a is None else weights.q_a
    gate, gate_bias = (None, None) if weights.gate is None else weights.gate
    kv_a_norm, kv_a_norm_bias = weights.kv_a_norm
    rules = gate_rules(config)
    return _Layer(
        *(_address(weights.input_norm), _address(q_a), _address(q_a_norm), _address(weights.q)),
        *(_address(weights.kv_a), _address(kv_a_norm), _address(kv_a_norm_bias), _address(weights.kv_b)),
        *(_address(weights.o), _address(weights.post_norm), _address(gate)),
        _address(gate_bias) if rules.is_corrected else None,
        *(config.hidden_size, config.q_lora_rank or 0, config.num_attention_heads, config.qk_nope_head_dim),
        *(config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim, 0),
        *(config.n_routed_experts, config.num_groups, config.num_kept_groups, config.num_experts_per_tok),
        *(rules.is_softmax, rules.is_corrected, rules.is_normalized),
        *(config.rms_norm_eps, weights.latent_eps, weights.scale, rules.factor),
    )


def _address(weight: Tensor | PackedInt8 | None) -> int | None:
    if isinstance(weight, PackedWeight):
        return ctypes.addressof(weight.view)
    return weight.data_ptr() if isinstance(weight, Tensor) else None
