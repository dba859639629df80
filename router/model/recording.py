"""Puts what the model computes on a timeline, beside what the exchange does."""

from __future__ import annotations

import time

from torch import nn

from common.timeline import Timeline
from router.model.deepseek import MLA, DecoderLayer, MoE

TRACK = "router"


def record_modules(model: nn.Module, timeline: Timeline) -> None:
    """Record every attention and every MLP of shared experts as a span of the router's track."""
    for module in model.modules():
        if isinstance(module, MLA):
            _record(module, "attention", module.layer_id, timeline)
        elif isinstance(module, DecoderLayer) and module.fused_decode is not None:
            # With its norms and the gate: they are one call.
            _record(module.fused_decode, "attention", module.layer_id, timeline)
        elif isinstance(module, MoE):
            _record(module.shared_experts, "shared_experts", module.layer_id, timeline)


def _record(module: nn.Module, name: str, layer_id: int, timeline: Timeline) -> None:
    began_ns = 0

    def begin(*_: object) -> None:
        nonlocal began_ns
        began_ns = time.monotonic_ns()

    def end(*_: object) -> None:
        timeline.add(name, began_ns, time.monotonic_ns(), TRACK, layer_id=layer_id)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)
