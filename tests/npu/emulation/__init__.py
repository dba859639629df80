"""What CANN would compute, written from the documentation of torch_npu 2.13.0 (torch_npu/_op_plugin_docs.py).

Every emulation takes the arguments of the real operator's schema and refuses what its documentation excludes.
It returns None in the place of a result that the documentation leaves undefined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.npu.emulation import attention, matmul, routing, rows, windows

EMULATED: dict[str, Callable[..., Any]] = {
    "npu::npu_attention_to_ffn": windows.attention_to_ffn,
    "npu::npu_dequant_swiglu_quant": rows.dequant_swiglu_quant,
    "npu::npu_dynamic_quant": rows.dynamic_quant,
    "npu::npu_ffn_to_attention": windows.ffn_to_attention,
    "npu::npu_format_cast": matmul.format_cast,
    "npu::npu_fused_infer_attention_score": attention.fused_infer_attention_score,
    "npu::npu_grouped_matmul": matmul.grouped_matmul,
    "npu::npu_grouped_matmul_swiglu_quant": matmul.grouped_matmul_swiglu_quant,
    "npu::npu_moe_gating_top_k": routing.gating_top_k,
    "npu::npu_moe_init_routing_v2": routing.init_routing_v2,
    "npu::npu_quant_matmul": matmul.quant_matmul,
    "npu::npu_quantize": rows.quantize,
    "npu::npu_rms_norm": rows.rms_norm,
    "npu::npu_rotary_mul": rows.rotary_mul,
    "npu::npu_swiglu": rows.swiglu,
}
