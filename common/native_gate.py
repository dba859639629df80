"""The choice of experts by the native kernels of common/native: router/kernels/gate.py in one call.

A row gets the same bits in every company, at every number of threads and on every processor.
Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads, native_library
from common.model_config import ModelConfig
from common.native.compiler import LIBRARY
from common.native_library import open_library

FLOAT32 = torch.float32
_POINTER, _SIZE, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@dataclass(frozen=True, slots=True)
class GateRules:
    """How a checkpoint's experts are scored and weighed, as the kernel wants to be told.

    Attributes:
        is_softmax: scores are a softmax over all experts; else each is a sigmoid.
        is_corrected: a bias takes part in the choice, and a group is kept for its two best experts.
        is_normalized: weights are made to add up to 1 before they are multiplied by `factor`.
    """

    is_softmax: bool
    is_corrected: bool
    is_normalized: bool
    factor: float


def gate_rules(config: ModelConfig) -> GateRules:
    """Read the rules of a checkpoint."""
    # In V2's code norm_topk_prob takes the place of the scaling factor, but not for a single expert.
    is_v2 = config.family == "v2"
    is_normalized = config.norm_topk_prob and not (is_v2 and config.num_experts_per_tok == 1)
    factor = 1.0 if is_v2 and is_normalized else config.routed_scaling_factor
    return GateRules(
        config.scoring_func == "softmax", config.topk_method == "noaux_tc", is_normalized, factor
    )


class NativeGate:
    """The loaded library. Tensors are on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._choose = library.gate_choose_experts

    def choose_experts(
        self, logits: Tensor, bias: Tensor | None, config: ModelConfig
    ) -> tuple[Tensor, Tensor]:  # [T, E], [E] -> [T, K] int64, [T, K] float32
        """Score all experts, take K of them, weigh those; of equal scores the lower index comes first.

        Raises:
            ValueError: the tensors are not float32, or not of the experts of `config`.
        """
        rules = gate_rules(config)
        correction = None if bias is None or not rules.is_corrected else bias.contiguous()
        _check(logits, correction, config.n_routed_experts)
        logits = logits.contiguous()
        num_tokens, num_experts = logits.shape
        top_k = config.num_experts_per_tok
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        topk_weights = torch.empty(num_tokens, top_k, dtype=FLOAT32)
        failure = self._choose(
            *(compute_threads.count(), logits.data_ptr()),
            *(None if correction is None else correction.data_ptr(), num_tokens, num_experts),
            *(config.num_groups, config.num_kept_groups, top_k),
            *(rules.is_softmax, rules.is_corrected, rules.is_normalized, rules.factor),
            *(topk_ids.data_ptr(), topk_weights.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to choose experts for {num_tokens} tokens: send fewer at once")
        return topk_ids, topk_weights


def load(library: Path = LIBRARY) -> NativeGate:
    """Load the kernels from a built library. Raises ConfigError."""
    opened = open_library(library)
    tensors, counts, claims = [_POINTER] * 2, [_SIZE] * 5, [_NUMBER] * 3
    opened.gate_choose_experts.argtypes = [_NUMBER, *tensors, *counts, *claims, _FLOAT, *tensors]
    return NativeGate(opened)


@cache
def installed() -> NativeGate | None:
    """Return the kernels beside this package, or None where they were not built."""
    return None if native_library.why_unavailable() else load()


def _check(logits: Tensor, bias: Tensor | None, num_experts: int) -> None:
    """Refuse what the kernel, which gets addresses, would read as something else."""
    if logits.dtype is not FLOAT32 or (bias is not None and bias.dtype is not FLOAT32):
        dtypes = " and ".join(str(tensor.dtype) for tensor in (logits, bias) if tensor is not None)
        raise ValueError(f"experts cannot be chosen by {dtypes}: give float32 alone")
    if logits.shape[1] != num_experts or (bias is not None and len(bias) != num_experts):
        shapes = " and ".join(str(list(tensor.shape)) for tensor in (logits, bias) if tensor is not None)
        raise ValueError(f"{num_experts} experts cannot be chosen by {shapes}: give [T, E] and [E]")
