"""How long a step takes whose micro-batches take turns between router and expert workers. Pure.

The step has L layers and m micro-batches. Of one micro-batch in one layer, while nothing else goes on:
Ta  what the router computes: attention, gate, shared experts, sending, the sum of what comes home;
Ts  the shared experts' part of Ta, which the router computes while the micro-batch's own rows are away;
Te  what the slowest expert worker computes;
Tc  one way between them.
Tf = max(Ta, Te) is the stage that bounds the step once the pipeline is full.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one micro-batch in one layer: Ta, Ts, Te and Tc of the legend."""

    attention_s: float
    shared_s: float
    experts_s: float
    one_way_s: float

    @property
    def bound_s(self) -> float:
        """Tf."""
        return max(self.attention_s, self.experts_s)

    @property
    def micro_batches_needed(self) -> float:
        """As many fill the pipeline where Ta is about Te: m >= 2 (1 + Tc / Tf)."""
        return 2 * (1 + self.one_way_s / self.bound_s)


def full_pipeline_s(stages: Stages, num_layers: int, micro_batches: int) -> float:
    """T = (Ta + Te + 2 Tc) + Tf (m L - 1): MegaScale-Infer's formula, true of a pipeline that is full."""
    first = stages.attention_s + stages.experts_s + 2 * stages.one_way_s
    return first + stages.bound_s * (micro_batches * num_layers - 1)


def turns_s(stages: Stages, num_layers: int, micro_batches: int) -> float:
    """T on a machine for each process: every turn begins when its rows are home and the router is free.

    Where the pipeline is full this is full_pipeline_s, less the shared experts beside which the last rows
    travel. Too few micro-batches make it more.
    """
    router_free = worker_free = 0.0
    home = [0.0] * micro_batches
    for _ in range(num_layers):
        for index in range(micro_batches):
            sent = max(router_free, home[index]) + stages.attention_s - stages.shared_s
            router_free = sent + stages.shared_s
            worker_free = max(worker_free, sent + stages.one_way_s) + stages.experts_s
            home[index] = worker_free + stages.one_way_s
    return max(router_free, *home)
