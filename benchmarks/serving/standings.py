"""The results of a comparison: kept in a file, line by line, and told in markdown tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine_ceilings import Ceilings
from benchmarks.serving.contender import Contender
from benchmarks.serving.workload import Speeds, Workload


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's work, once, and the ceilings of the machine just before it."""

    key: str
    ceilings: Ceilings
    speeds: Speeds


def keep(file: Path, turn: Turn) -> None:
    """Append a turn to a file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(turn)) + "\n")


def kept(file: Path) -> list[Turn]:
    """Every turn that a file holds; none if it is not there."""
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Turn(row["key"], Ceilings(**row["ceilings"]), row["speeds"]) for row in rows]


class Standings:
    """All turns, contender by contender."""

    def __init__(self, contenders: Sequence[Contender], turns: Sequence[Turn], workload: Workload) -> None:
        self._turns = {one.key: [turn for turn in turns if turn.key == one.key] for one in contenders}
        self._contenders = [one for one in contenders if self._turns[one.key]]
        self._names = list(workload.no_speeds())
        self._sizes = ((workload.prefill_tokens, 1), *((batch, batch) for batch in workload.batches))

    def speeds_table(self) -> Iterator[str]:
        """Tokens/s: median (lowest to highest) of all repetitions, and GB/s read just before."""
        yield from _head("tokens/s", *self._names, "read GB/s")
        for one in self._contenders:
            samples = (self._samples(one, name) for name in self._names)
            reads = [turn.ceilings.read_gb_s for turn in self._turns[one.key]]
            yield _row(one.title, *map(_spread, samples), _spread(reads))

    def ratios_table(self) -> Iterator[str]:
        """Each of ours over the best peer, and over our own loopback."""
        yield from _head("ratio", *self._names)
        peers = [one for one in self._contenders if not one.is_ours]
        loopback = [one for one in self._contenders if one.key == "loopback"]
        for one in self._contenders:
            if not one.is_ours:
                continue
            if peers:
                yield _row(f"{one.title} / best peer", *self._ratios(one, peers))
            if loopback and one.key == "two-workers":
                yield _row(f"{one.title} / loopback", *self._ratios(one, loopback))

    def limits_table(self) -> Iterator[str]:
        """What a step must read and compute, the tokens/s this allows, and how much of it was reached."""
        yield from _head("", "work", "MB", "GOP", "limit tokens/s", "set by", "reached", "share")
        for one in self._contenders:
            ceilings = self._median_ceilings(one)
            speed = ceilings.int8_gop_s if one.arithmetic == "int8" else ceilings.bfloat16_gflop_s
            for name, (num_tokens, num_logits) in zip(self._names, self._sizes, strict=True):
                size = one.weights.step_bytes(num_tokens)
                operations = one.weights.step_operations(num_tokens, num_logits)
                limit = one.weights.limit(num_tokens, num_logits, ceilings, speed)
                reached = statistics.median(self._samples(one, name))
                is_read = size / ceilings.read_gb_s > operations / speed
                yield _row(
                    *(one.title, name, f"{size / 1e6:.0f}", f"{operations / 1e9:.1f}", f"{limit:.1f}"),
                    *("reading" if is_read else "arithmetic", f"{reached:.1f}", f"{reached / limit:.0%}"),
                )

    def ceilings_table(self) -> Iterator[str]:
        """What the machine could do, turn by turn: median (lowest to highest)."""
        ceilings = [turn.ceilings for turns in self._turns.values() for turn in turns]
        yield from _head("read GB/s", "int8 GOP/s", "bfloat16 GFLOP/s")
        yield _row(*(_spread([asdict(one)[name] for one in ceilings]) for name in Ceilings.__slots__))

    def _samples(self, contender: Contender, name: str) -> list[float]:
        return [speed for turn in self._turns[contender.key] for speed in turn.speeds[name]]

    def _ratios(self, contender: Contender, others: Sequence[Contender]) -> Iterator[str]:
        for name in self._names:
            best = max(statistics.median(self._samples(other, name)) for other in others)
            yield f"{statistics.median(self._samples(contender, name)) / best:.2f}"

    def _median_ceilings(self, contender: Contender) -> Ceilings:
        ceilings = [turn.ceilings for turn in self._turns[contender.key]]
        median: Callable[[str], float] = lambda name: statistics.median(asdict(one)[name] for one in ceilings)  # noqa: E731
        return Ceilings(*map(median, Ceilings.__slots__))


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _head(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield "|---" * len(titles) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
