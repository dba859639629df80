"""The shared experts really run while the rows are away: spans of a real layer and a real worker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common import process_group
from common.exchange import StepHeader
from common.exchange.link_choice import Meeting, join_worker
from common.exchange.links import LinksRouterExchange
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.placement import contiguous
from common.timeline import Span, Timeline
from expert_worker.messages import Linked
from router.model.deepseek import take_turns
from router.model.loading import load_model
from router.model.recording import record_modules
from tests.expert_worker.executor_child import (
    INCARNATION,
    JOIN_TIMEOUT_S,
    TERM,
    executor,
    prefix_of,
    prepare,
)
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.distributed]

NUM_TOKENS, NUM_STEPS = 256, 20
MOE = "model.layers.1.mlp"
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 512,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 2,
    "n_shared_experts": 2,
    "torch_dtype": "float32",
}


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def common_ns(one: Span, other: Span) -> int:
    return min(one.end_ns, other.end_ns) - max(one.start_ns, other.start_ns)


@pytest.mark.parametrize("ep_level", [1, 2])
async def test_shared_experts_compute_while_a_worker_computes_the_routed_ones(
    tmp_path: Path, ep_level: int
) -> None:
    write_checkpoint(tmp_path / "model", family="v3", num_shards=1, **SHAPE)
    config = ModelConfig.from_directory(tmp_path / "model")
    placement = contiguous(config.n_routed_experts, 1, config.moe_layer_ids)
    moe = load_model(tmp_path / "model", "float32", "cpu", lambda *_: None).get_submodule(MOE)
    timeline = Timeline()
    record_modules(moe, timeline)
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        child.send(prepare(tmp_path / "model", placement, 0, store))
        link = await asyncio.to_thread(
            join_worker,
            Meeting(store.host, store.port, prefix_of(1, 0), JOIN_TIMEOUT_S, "127.0.0.1", "auto"),
        )
        await child.until(Linked)
        shape = RowShape(config.hidden_size, config.num_experts_per_tok, torch.float32)
        exchange = LinksRouterExchange(
            [link], ["w0"], placement, shape, TERM, [INCARNATION], 5.0, None, timeline
        )
        for step_id in range(NUM_STEPS):
            exchange.begin(StepHeader(TERM, 1, step_id, ep_level, NUM_TOKENS))
            with torch.inference_mode():
                rows = torch.randn(NUM_TOKENS, config.hidden_size)
                (output,) = take_turns([moe(rows, 0, exchange)])
            assert output.shape == (NUM_TOKENS, config.hidden_size)
        exchange.close()

    spans = timeline.spans
    shared, routed = named(spans, "shared_experts"), named(spans, "experts")
    assert len(shared) == len(routed) == NUM_STEPS
    for mine, theirs, sent, waited in zip(
        shared, routed, named(spans, "dispatch"), named(spans, "wait"), strict=True
    ):
        # The rows leave before the shared experts begin, and nobody waits for them before they are done.
        assert sent.start_ns < mine.start_ns < mine.end_ns <= waited.start_ns
        assert theirs.start_ns > sent.start_ns
    # Computed at the same time, on a machine whose cores others may want too.
    assert max(common_ns(mine, theirs) for mine, theirs in zip(shared, routed, strict=True)) > 0

    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"shared_experts", "experts"} <= {event["name"] for event in events}
