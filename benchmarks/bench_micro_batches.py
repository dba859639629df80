"""Steps cut into 1, 2 and 3 micro-batches, beside what benchmarks.pipeline says of them.

`OMP_WAIT_POLICY=passive python -m benchmarks.bench_micro_batches DIR [--workers 1 2] [--repetitions 20]`
Writes three MoE layers of DeepSeek-V2-Lite's shape in W8A8 to DIR unless they are there, and runs the
router's model against real executors over links at ep_level 2, one thread each. The stages of a micro-batch
are the mean over steps that consist of one of them alone; whole steps alternate with these. Prints a markdown
table of medians in milliseconds, in brackets how much faster than with one micro-batch.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch

from benchmarks.pipeline import Stages, full_pipeline_s, turns_s
from benchmarks.v2_lite_shape import write_quantised_layers
from common import process_group
from common.exchange import ALL_TO_ALL, StepHeader
from common.exchange.links import LinksRouterExchange
from common.exchange.routing import RowShape
from common.placement import contiguous
from common.quantization.row_format import int8_layers
from common.timeline import Timeline
from expert_worker.messages import Linked
from router.batch import build_batch
from router.model.deepseek import DeepseekForCausalLM
from router.model.latent_cache import LatentCache
from router.model.loading import load_model
from router.model.recording import record_modules
from router.plan import Chunk, Plan
from router.sequence import Sequence as Answer
from tests.expert_worker.executor_child import (
    INCARNATION,
    JOIN_TIMEOUT_S,
    TERM,
    executor,
    prefix_of,
    prepare,
)

HOST, EPOCH, BLOCK_SIZE, NUM_BLOCKS = "127.0.0.1", 1, 16, 1024
MICRO_BATCHES = (1, 2, 3)
WARM_UP = 3
DECODED_AT = 64
"""Position of the tokens of the decode step: what they attend to is in the cache, as zeros."""


def prefill(num_tokens: int) -> Plan:
    """One prompt."""
    blocks = list(range(-(-num_tokens // BLOCK_SIZE)))
    prompt = Answer("prompt", _tokens(num_tokens, 0), num_tokens, max_tokens=1, block_table=blocks)
    return Plan((Chunk(prompt, 0, num_tokens, samples=True),))


def decode(num_sequences: int) -> Plan:
    """One token of each of several answers."""
    each = DECODED_AT // BLOCK_SIZE + 1
    chunks = []
    for number in range(num_sequences):
        blocks = list(range(number * each, (number + 1) * each))
        tokens = _tokens(DECODED_AT + 1, number)
        answer = Answer(str(number), tokens, DECODED_AT, max_tokens=2, block_table=blocks)
        chunks.append(Chunk(answer, DECODED_AT, 1, samples=True))
    return Plan(tuple(chunks))


def _tokens(count: int, seed: int) -> list[int]:
    return [(seed * 7919 + position * 104729) % 900 + 100 for position in range(count)]


WORKLOADS = {"prefill, 512 tokens": prefill(512), "decode, 96 sequences": decode(96)}


@dataclass(slots=True)
class Samples:
    """Seconds, once per repetition: of whole steps, and of the stages of their micro-batches."""

    steps: list[float] = field(default_factory=list)
    stages: list[Stages] = field(default_factory=list)


def each_stage(average: Callable[[Iterable[float]], float], samples: Sequence[Stages]) -> Stages:
    """Average stage by stage."""
    return Stages(*(average(times) for times in zip(*map(astuple, samples), strict=True)))


class Router:
    """The router's model with its end of the links."""

    def __init__(self, model: DeepseekForCausalLM, exchange: LinksRouterExchange, timeline: Timeline) -> None:
        self._model, self._exchange, self._timeline = model, exchange, timeline
        self._cache = LatentCache(model.config, NUM_BLOCKS, BLOCK_SIZE, model.dtype, "cpu")
        self._step_id = 0
        self.num_layers = len(model.config.moe_layer_ids)

    def step(self, plan: Plan, micro_batches: int) -> tuple[float, Stages]:
        """Run a step once: its seconds, and stages, which say something where it is one micro-batch."""
        self._step_id += 1
        parts = plan.split(micro_batches)
        batches = [build_batch(part, BLOCK_SIZE, "cpu", number) for number, part in enumerate(parts)]
        most = max(part.num_tokens for part in parts)
        num_spans, began = len(self._timeline.spans), time.monotonic()
        self._exchange.begin(StepHeader(TERM, EPOCH, self._step_id, ALL_TO_ALL, most, len(parts)))
        self._model(batches, self._cache, self._exchange)
        took_s = time.monotonic() - began
        spent = defaultdict[str, float](float)
        for span in self._timeline.spans[num_spans:]:
            spent[span.name] += (span.end_ns - span.start_ns) / 1e9 / self.num_layers
        received, computed, sent = (
            max(times) / self.num_layers for times in zip(*self._exchange.last_step_times(), strict=True)
        )
        busy_s = took_s / self.num_layers - spent["wait"]
        return took_s, Stages(busy_s, spent["shared_experts"], computed, (received + sent) / 2)


@asynccontextmanager
async def fleet(directory: Path, model: DeepseekForCausalLM, num_workers: int) -> AsyncIterator[Router]:
    """Executors with their experts, joined by a router."""
    config = model.config
    placement = contiguous(config.n_routed_experts, num_workers, config.moe_layer_ids)
    in_int8 = int8_layers(directory, config)
    shape = RowShape(config.hidden_size, config.num_experts_per_tok, model.dtype, in_int8)
    store, timeline = process_group.open_store(HOST), Timeline()
    record_modules(model, timeline)
    async with AsyncExitStack() as stack:
        links = []
        for rank in range(num_workers):
            child = await stack.enter_async_context(executor())
            options = {"dtype": "bfloat16", "int8_layers": sorted(in_int8)}
            child.send(prepare(directory, placement, rank, store, EPOCH, **options))
            at = (store.host, store.port, prefix_of(EPOCH, rank), 0, JOIN_TIMEOUT_S, HOST)
            links.append(await asyncio.to_thread(process_group.join_pair, *at))
            await child.until(Linked)
        names, incarnations = [f"w{rank}" for rank in range(num_workers)], [INCARNATION] * num_workers
        exchange = LinksRouterExchange(
            links, names, placement, shape, TERM, incarnations, 60.0, None, timeline
        )
        try:
            yield Router(model, exchange, timeline)
        finally:
            exchange.close()


def measure(router: Router, plan: Plan, repetitions: int) -> dict[int, Samples]:
    """By number of micro-batches; all alternate."""
    samples = {number: Samples() for number in MICRO_BATCHES}
    for repetition in range(WARM_UP + repetitions):
        for number, own in samples.items():
            alone = [router.step(part, 1)[1] for part in plan.split(number)]
            took_s, _ = router.step(plan, number)
            if repetition >= WARM_UP:
                own.steps.append(took_s)
                own.stages.append(each_stage(statistics.fmean, alone))
    return samples


def lines(name: str, num_workers: int, num_layers: int, found: dict[int, Samples]) -> None:
    """Print a line of the table for each number of micro-batches."""
    all_stages = {number: each_stage(statistics.median, own.stages) for number, own in found.items()}
    measured = {number: statistics.median(own.steps) for number, own in found.items()}
    expected = {number: turns_s(stages, num_layers, number) for number, stages in all_stages.items()}
    for number, stages in all_stages.items():
        formula_s = full_pipeline_s(stages, num_layers, number)
        times = [stages.attention_s, stages.shared_s, stages.experts_s, stages.one_way_s, stages.bound_s]
        cells = [
            *(f"{1000 * one:.2f}" for one in times),
            f"{stages.micro_batches_needed:.1f}",
            f"{1000 * formula_s:.1f}",
            f"{1000 * expected[number]:.1f} ({expected[1] / expected[number]:.2f})",
            f"{1000 * measured[number]:.1f} ({measured[1] / measured[number]:.2f})",
        ]
        print(f"| {num_workers} | {name} | {number} | {' | '.join(cells)} |", flush=True)


async def run(directory: Path, worker_counts: list[int], repetitions: int) -> None:
    """Measure and print."""
    print("| workers | step | m | Ta | Ts | Te | Tc | Tf | m needed | formula | turns | measured |")
    print("|---|---|" + "---|" * 10)
    for num_workers in worker_counts:
        model = load_model(directory, "bfloat16", "cpu", lambda *_: None)
        async with fleet(directory, model, num_workers) as router:
            for name, plan in WORKLOADS.items():
                lines(name, num_workers, router.num_layers, measure(router, plan, repetitions))


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.directory.parent.mkdir(parents=True, exist_ok=True)
    write_quantised_layers(options.directory)
    asyncio.run(run(options.directory.resolve(), options.workers, options.repetitions))


if __name__ == "__main__":
    main()
