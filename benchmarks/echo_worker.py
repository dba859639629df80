"""An expert worker without experts, for timing the exchange alone: as many rows go home as came.

`python -m benchmarks.echo_worker JSON` joins a router by every transport and serves all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common import int8_rows
from common.exchange import ExpertExchange, Received, link_choice
from common.exchange.collective import CollectiveExpertExchange, join_group
from common.exchange.link_choice import LINKS, SHARED_MEMORY, Meeting
from common.exchange.links import LinksExpertExchange
from common.exchange.routing import RowShape
from common.placement import Placement, contiguous
from expert_worker.step_loop import serve

HOST = "127.0.0.1"
TERM, EPOCH, INCARNATION, JOIN_S = 1, 1, 1, 120.0
LAYERS = {"bfloat16": 1, "bfloat16, quantised at the worker": 2, "int8": 3}
"""Forms of rows: each has a layer. The second is what W8A8 experts would do with the first."""
DTYPE = torch.bfloat16
LINKED, COLLECTIVE = (LINKS, SHARED_MEMORY), "collective"


@dataclass(frozen=True, slots=True)
class Bench:
    """One group: workers, experts, choices per token, the length of a row, and how these travel."""

    port: int
    ep_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    hidden_size: int
    transports: Sequence[str]

    @property
    def placement(self) -> Placement:
        """Contiguous."""
        return contiguous(self.n_routed_experts, self.ep_size, LAYERS.values())

    @property
    def shape(self) -> RowShape:
        """Of every row."""
        return RowShape(self.hidden_size, self.num_experts_per_tok, DTYPE, frozenset({LAYERS["int8"]}))

    def meeting(self, ep_rank: int, transport: str) -> Meeting:
        """Where the router and a worker agree on a link of that kind."""
        return Meeting(HOST, self.port, f"{transport}-{ep_rank}", JOIN_S, HOST, transport)


def start(bench: Bench, ep_rank: int) -> subprocess.Popen[bytes]:
    """Start one worker process."""
    spec = json.dumps({**asdict(bench), "ep_rank": ep_rank})
    return subprocess.Popen([sys.executable, "-m", "benchmarks.echo_worker", spec])


class Answers:
    """What stands in for the experts' output: memory that was written to before."""

    def __init__(self, hidden_size: int) -> None:
        self._rows = torch.zeros(0, hidden_size, dtype=DTYPE)

    def __call__(self, received: Received) -> Tensor:
        num_rows = len(received.rows)
        if num_rows > len(self._rows):
            self._rows = torch.zeros(2 * num_rows, self._rows.shape[1], dtype=DTYPE)
        if received.layer_id == LAYERS["bfloat16, quantised at the worker"]:
            int8_rows.quantize_rows(received.rows)
        return self._rows[:num_rows]


@torch.inference_mode()  # as in the services
def answer(exchange: ExpertExchange, answers: Answers) -> None:
    """Answer whatever arrives."""
    serve(exchange, answers, lambda: False)


def main() -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    spec = json.loads(sys.argv[1])
    ep_rank = spec.pop("ep_rank")
    bench = Bench(**spec)
    experts = bench.placement.experts_of(ep_rank)
    ends: list[ExpertExchange] = []
    for transport in LINKED:
        if transport not in bench.transports:
            continue
        exchange = LinksExpertExchange(lambda *_: None)
        link = link_choice.join_router(bench.meeting(ep_rank, transport))
        exchange.add_router(TERM, EPOCH, INCARNATION, link, bench.shape, experts)
        ends.append(exchange)
    if COLLECTIVE in bench.transports:
        collective = CollectiveExpertExchange(lambda *_: None)
        group = join_group(HOST, bench.port, "group", 1 + ep_rank, 1 + bench.ep_size, JOIN_S, HOST)
        collective.add_router(TERM, EPOCH, INCARNATION, group, bench.shape, experts)
        ends.append(collective)
    for end in ends:
        threading.Thread(target=answer, args=(end, Answers(bench.hidden_size)), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
