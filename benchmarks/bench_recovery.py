"""How long a stream pauses when an expert worker is lost: from the signal to the next token at the client.

`python -m benchmarks.bench_recovery [--model examples/demo_model] [--expert-workers 2] [--kills 20]
[--redundant-experts N]`

`expertmesh up` on this machine and one greedy stream that is asked for again when it has ended. Once tokens
have flowed for ten seconds, the executor of a random worker is killed (SIGKILL) or stopped (SIGSTOP). The
pause ends with the token after the longest gap in what the client gets: tokens of steps that were computed
before may arrive after the signal. Beside it stands what the router counts itself (`recovery_seconds`, from
the moment it has noticed), and how long a bare interpreter takes to import torch, as every new executor must.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import grpc
import psutil

from protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

READY = re.compile(r"ready grpc=(\S+) admin=(\S+)")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
PATIENCE_S = 120.0
QUIET_S = 10.0
"""Least time between a recovery and the next signal: what dies again soon is started again ever later."""
PROMPT = "Once upon a time"


class Stream:
    """Token after token, read by a thread of its own. `arrivals_s` grows with every one."""

    def __init__(self, target: str) -> None:
        self.arrivals_s: list[float] = []
        self._stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(target))
        threading.Thread(target=self._read, daemon=True).start()

    def wait_beyond(self, count: int) -> None:
        """Return when more than `count` tokens have arrived."""
        deadline_s = time.monotonic() + PATIENCE_S
        while len(self.arrivals_s) <= count:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"no token within {PATIENCE_S:g} s")
            time.sleep(0.001)

    def pause_after(self, moment_s: float) -> float:
        """Seconds from a moment to the end of the longest gap that ended after it."""
        gaps = [(end - begin, end) for begin, end in pairwise(self.arrivals_s) if end > moment_s]
        return max(gaps)[1] - moment_s

    def _read(self) -> None:
        sampling = generation_pb2.SamplingParams(temperature=0.0, ignore_eos=True)
        request = generation_pb2.GenerateRequest(text=PROMPT, sampling=sampling)
        try:
            while True:
                for response in self._stub.Generate(request):
                    if response.HasField("chunk"):
                        self.arrivals_s.append(time.monotonic())
        except grpc.RpcError:
            return  # the fleet ends; before that, whoever waits for a token says so


class Fleet:
    """A running `expertmesh up`."""

    def __init__(self, process: subprocess.Popen[str], target: str, admin: str) -> None:
        self.target = target
        self._process = process
        self._stub = admin_pb2_grpc.AdminServiceStub(grpc.insecure_channel(admin))

    def status(self) -> admin_pb2.GetStatusResponse:
        """What the router says of itself."""
        return self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5)

    def executors(self) -> list[psutil.Process]:
        """The torch children of the expert workers."""
        everyone = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in everyone if "expert_worker.executor" in " ".join(one.cmdline())]


@contextmanager
def fleet_of(arguments: argparse.Namespace) -> Iterator[Fleet]:
    """A fleet that serves."""
    command = [sys.executable, "-m", "expertmesh", "up", "--model", str(arguments.model), "--port", "0"]
    command += ["--expert-workers", str(arguments.expert_workers)]
    command += ["--redundant-experts", str(arguments.redundant_experts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            found = next((found for line in process.stdout or () if (found := READY.match(line))), None)
            if found is None:
                raise SystemExit("the fleet did not start: `expertmesh up` says why")
            yield Fleet(process, found[1], found[2])
        finally:
            process.terminate()


def pauses(arguments: argparse.Namespace, how: signal.Signals) -> tuple[list[float], list[float]]:
    """Seconds as the client sees them, and as the router counts them."""
    seen, counted = [], []
    with fleet_of(arguments) as fleet:
        stream = Stream(fleet.target)
        stream.wait_beyond(10)
        for number in range(arguments.kills):
            time.sleep(QUIET_S + random.random())
            executor = random.choice(fleet.executors())
            moment_s = time.monotonic()
            executor.send_signal(how)
            while fleet.status().recoveries <= number:
                time.sleep(0.02)
            stream.wait_beyond(len(stream.arrivals_s))
            seen.append(stream.pause_after(moment_s))
            counted.append(fleet.status().recovery_seconds)
    return seen, counted


def import_s() -> float:
    """The median of five interpreters that import torch and end."""
    took_s = []
    for _ in range(5):
        began_s = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        took_s.append(time.monotonic() - began_s)
    return statistics.median(took_s)


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--redundant-experts", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    sys.stdout.write("| lost by | losses | pause s, median | worst | recovery_seconds, median | worst |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for how in SIGNALS:
        columns = [f"{statistics.median(one):.2f} | {max(one):.2f}" for one in pauses(arguments, how)]
        sys.stdout.write(f"| {how.name} | {arguments.kills} | {' | '.join(columns)} |\n")
        sys.stdout.flush()
    sys.stdout.write(f"\nimporting torch takes {import_s():.2f} s\n")


if __name__ == "__main__":
    main()
