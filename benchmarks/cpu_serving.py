"""expertmesh beside its peers on the CPU of one machine: prefill, decode, ratios, and the machine's limits.

`python -m benchmarks.cpu_serving [--llama-cpp FOLDER --gguf FILE] [--vllm-python PYTHON]`

The model is six layers of DeepSeek-V2-Lite's shape with random weights, made at the first run. Contenders
take turns, `--rounds` times; before each turn the machine's ceilings are measured. With `--results FILE`
every turn is kept there, the tables are of all turns in it, and a run may be cut in pieces:
`--rounds 1 --only NAME`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine_ceilings import Ceilings
from benchmarks.serving.contender import (
    Absent,
    Checkpoints,
    Contender,
    llama_cpp_peer,
    ours,
    python_peer,
)
from benchmarks.serving.python_engine import ROOT
from benchmarks.serving.standings import Standings, Turn, keep, kept
from benchmarks.serving.workload import Workload


def measured_ceilings(threads: int) -> Ceilings:
    """Measure the machine in a process that is gone afterwards, with what it held."""
    command = [sys.executable, "-m", "benchmarks.machine_ceilings", "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Ceilings(**json.loads(done.stdout))


def take_turn(contender: Contender, workload: Workload) -> Turn:
    """Measure the machine, then the contender."""
    ceilings = measured_ceilings(workload.threads)
    turn = Turn(contender.key, ceilings, contender.measure(workload))
    summary = ", ".join(
        f"{name} {'/'.join(f'{speed:.1f}' for speed in speeds)}" for name, speeds in turn.speeds.items()
    )
    print(
        f"{contender.title}: {summary} tokens/s; {ceilings.read_gb_s:.1f} GB/s", file=sys.stderr, flush=True
    )
    return turn


def print_tables(contenders: Sequence[Contender], turns: Sequence[Turn], workload: Workload) -> None:
    """Print everything as markdown."""
    standings = Standings(contenders, turns, workload)
    for table in (
        standings.speeds_table(),
        standings.ratios_table(),
        standings.ceilings_table(),
        standings.limits_table(),
    ):
        print("\n".join(table), end="\n\n", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    defaults = Workload()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(".cache"), help="folder of the models; made there"
    )
    parser.add_argument("--ep-level", type=int, choices=(1, 2), default=2)
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--gguf", type=Path, help="the bfloat16 model in llama.cpp's Q8_0")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM for CPUs")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the contenders; default: all that are there"
    )
    parser.add_argument("--rounds", type=int, default=3, help="0 prints the tables of --results alone")
    parser.add_argument("--repetitions", type=int, default=defaults.repetitions, help="in each turn")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of everybody")
    parser.add_argument("--results", type=Path, help="file to keep turns in")
    return parser.parse_args()


def main() -> None:
    """Measure and print the tables."""
    options = parse()
    workload = Workload(repetitions=options.repetitions, threads=options.threads)
    checkpoints = Checkpoints.of(options.checkpoints)
    checkpoints.make()
    contenders = list(ours(checkpoints, options.ep_level))
    for peer in (
        llama_cpp_peer(checkpoints, options.llama_cpp, options.gguf),
        python_peer(
            checkpoints, "vllm", options.vllm_python, "give --vllm-python, an interpreter with vLLM for CPUs"
        ),
        python_peer(checkpoints, "transformers", Path(sys.executable), "install the extra `dev`"),
    ):
        if isinstance(peer, Absent):
            print(f"{peer.title} is skipped: {peer.way_out}", file=sys.stderr)
        else:
            contenders.append(peer)
    keys = [one.key for one in contenders]
    if unknown := set(options.only or ()) - set(keys):
        sys.exit(f"--only names {', '.join(sorted(unknown))}, but there are only {', '.join(keys)}")
    chosen = [one for one in contenders if options.only is None or one.key in options.only]
    turns = kept(options.results) if options.results else []
    for _ in range(options.rounds):
        for contender in chosen:
            turns.append(take_turn(contender, workload))
            if options.results:
                keep(options.results, turns[-1])
    print_tables(contenders, turns, workload)


if __name__ == "__main__":
    main()
