"""The five lines at the heart: rows are away while shared experts run, and the sum is rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from common.exchange import Dispatched
from router.model.deepseek import MoE
from tests.oracle import Oracle
from tests.router.driver import Driver, NaiveExchange, random_prompts
from tests.tiny_checkpoint import write_checkpoint


class WatchedExchange(NaiveExchange):
    """Notes when rows leave and when they are waited for."""

    def __init__(self, directory: Path, driver: Driver) -> None:
        super().__init__(directory, driver.config, driver.model.dtype)
        self.events: list[str] = []

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        self.events.append(f"dispatch {layer_id}")
        return super().dispatch(layer_id, micro_batch, hidden_states, topk_ids, topk_weights)

    def combine(self, dispatched: Dispatched) -> Tensor:
        self.events.append(f"combine {dispatched.layer_id}")
        return super().combine(dispatched)


def test_shared_experts_run_between_dispatch_and_combine(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2", vocab_size=128)
    driver = Driver(tmp_path)
    driver.exchange = watched = WatchedExchange(tmp_path, driver)
    for module in driver.model.modules():
        if isinstance(module, MoE):
            layer_id = module.layer_id
            module.shared_experts.register_forward_hook(
                lambda *_, layer_id=layer_id: watched.events.append(f"shared {layer_id}")
            )
    driver.finish(driver.sequence([1, 2, 3]))
    assert watched.events == [
        f"{event} {layer_id}" for layer_id in (1, 2, 3) for event in ("dispatch", "shared", "combine")
    ]


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_bfloat16_stays_near_the_float64_oracle(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family, vocab_size=256, torch_dtype="bfloat16")
    driver, oracle = Driver(tmp_path), Oracle(tmp_path)
    (prompt,) = random_prompts((30,), 256)
    logits = driver.finish(driver.sequence([*prompt, 5, 6], num_prompt_tokens=30))[0]
    expected = oracle.logits([*prompt, 5, 6])[-1].float()
    assert (logits - expected).abs().mean() < 0.03 * expected.std()
