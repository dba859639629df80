"""Row-invariant arithmetic on CPUs: a row gets the same bits whatever rows, chunks or threads surround it.

Shapes: M rows, K in-features, N out-features, T tokens, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common import compute_threads

# Measured with torch 2.13 (MKL for float32, oneDNN for bfloat16) on x86-64 with AVX512-BF16, M 1..1999:
#   float32   M below 16 takes other kernels (1, 2-3, some more). From 16 rows on, a row is independent of
#             M, of its position and of the alignment of x, if N is a multiple of 16. Otherwise threads cut
#             N where a column falls into another kernel: (K, N) = (120, 24) and (100, 18) differ with
#             3 threads, N <= 10 with one. K may be anything.
#   bfloat16  no difference seen from 2 rows on, for any K and N; 4 rows take half the time of 16.
#   float16   no difference seen from 16 rows on; fewer were not tried.
# torch may choose another kernel for tiny M * K * N (4096 or less). No difference was seen there, but as a
# precaution MIN_IN_FEATURES and OUT_MULTIPLE, with 16 rows where the weight is small, keep products above it.
# What differs elsewhere is found by tests/kernels/test_row_invariance.py on the machine that runs it.
MIN_ROWS = 16
MIN_ROWS_BFLOAT16 = 4
SMALL_WEIGHT = 1024
MIN_IN_FEATURES = 32
OUT_MULTIPLE = 16
MAX_ROWS = 1024
"""Rows of one product; more are cut, so that no product is larger than what was measured."""
HEAD_ROWS = 16
"""Rows of one batched product, always exactly this many."""
MAX_SUM = 16384
"""Elements of one sum."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [M, K], [N, K] -> [M, N]
    """Multiply every row by the weight; the bias is added after the product was rounded."""
    if weight.shape[1] < MIN_IN_FEATURES:
        missing = MIN_IN_FEATURES - weight.shape[1]
        x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, missing))
    x = x.contiguous()
    num_odd = weight.shape[0] % OUT_MULTIPLE
    if not num_odd:
        output = _product(x, weight)
    else:
        # Only the odd tail is padded: a vocabulary of any size costs no second copy of its matrix.
        num_even = weight.shape[0] - num_odd
        tail = F.pad(weight[num_even:], (0, 0, 0, OUT_MULTIPLE - num_odd))
        odd = _product(x, tail)[:, :num_odd]
        output = torch.cat([_product(x, weight[:num_even]), odd], dim=1) if num_even else odd.contiguous()
    return output if bias is None else output + bias


def _product(x: Tensor, weight: Tensor) -> Tensor:  # [M, K], [N, K] with N % 16 == 0 -> [M, N]
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, weight.shape[0])
    may_be_few = x.dtype == torch.bfloat16 and weight.numel() > SMALL_WEIGHT
    min_rows = MIN_ROWS_BFLOAT16 if may_be_few else MIN_ROWS
    if num_rows < min_rows:
        padded = x.new_zeros(min_rows, x.shape[1])
        padded[:num_rows] = x
        return _product(padded, weight)[:num_rows]
    if num_rows <= MAX_ROWS:
        with compute_threads.whole_team():
            return F.linear(x, weight)
    return torch.cat([_product(rows, weight) for rows in x.split(MAX_ROWS)])


def per_head_linear(x: Tensor, weight: Tensor) -> Tensor:  # [T, H, I], [H, O, I] -> [T, H, O]
    """Multiply the rows of every head by that head's weight; its strides may decide about the last bit."""
    num_tokens, num_out = x.shape[0], weight.shape[1]
    if num_out % OUT_MULTIPLE:
        weight = F.pad(weight, (0, 0, 0, -num_out % OUT_MULTIPLE))
    if weight.shape[2] < MIN_IN_FEATURES:
        missing = MIN_IN_FEATURES - weight.shape[2]
        x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, missing))
    output = x.new_empty(num_tokens, x.shape[1], num_out)
    rows = x.new_zeros(x.shape[1], HEAD_ROWS, x.shape[2])  # [H, 16, I]
    for first in range(0, num_tokens, HEAD_ROWS):
        count = min(HEAD_ROWS, num_tokens - first)
        rows[:, :count] = x[first : first + count].transpose(0, 1)
        with compute_threads.whole_team():
            if weight.stride(2) == 1:
                # bmm copies a transposed second matrix in bfloat16, which takes 5 times the product's time.
                product = torch.bmm(weight, rows.transpose(1, 2)).transpose(1, 2)  # [H, 16, O]
            else:
                product = torch.bmm(rows, weight.transpose(1, 2))  # [H, 16, O]
        output[first : first + count] = product[:, :count, :num_out].transpose(0, 1)
    return output


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [M, F] -> [M, F]
    """Return silu(gate) * up, computed in float32 and rounded once."""
    # Not F.silu or torch.sigmoid: they round the elements at the end of a thread's share in another way.
    x = gate.float()
    return (x / (1 + torch.exp(-x)) * up.float()).to(gate.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [M, K], [K] -> [M, K]
    """Scale every row to unit root mean square in float32, round to its dtype, then apply the weight."""
    wide = x.float()
    mean = row_sum(wide * wide) / x.shape[-1]
    return weight * (wide * torch.rsqrt(mean + eps)).to(x.dtype)


def row_sum(x: Tensor) -> Tensor:  # [..., K] -> [..., 1]
    """Add up the last dimension."""
    # torch.sum gave every row of one length the same bits. Longer rows are cut as a precaution: torch may
    # share a single row of 32768 elements or more among threads.
    if x.shape[-1] > MAX_SUM:
        x = torch.cat([part.sum(dim=-1, keepdim=True) for part in x.split(MAX_SUM, dim=-1)], dim=-1)
    return x.sum(dim=-1, keepdim=True)


def softmax(x: Tensor) -> Tensor:  # [..., K] float32 -> [..., K]
    """Return exp(x) over its sum along the last dimension. At least one element of a row is finite."""
    weights = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return weights / row_sum(weights)
