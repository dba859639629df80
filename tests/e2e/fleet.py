"""Starts a whole fleet with `expertmesh up`, as a user would, and ends it: real processes, real gRPC."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
READY = re.compile(r"^ready grpc=(\S+) admin=(\S+)")


@dataclass
class Answer:
    """What one Generate call streamed. How it finished holds times, which are not compared."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finished: generation_pb2.Finished = field(default_factory=generation_pb2.Finished, compare=False)


@dataclass
class Fleet:
    """A running `expertmesh up`."""

    process: subprocess.Popen[str]
    grpc_address: str
    admin_address: str
    stderr: list[str]

    def generation(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(self.grpc_address))

    def status(self) -> admin_pb2.GetStatusResponse:
        with grpc.insecure_channel(self.admin_address) as channel:
            return admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5)

    def wait_until(
        self, claim: Callable[[admin_pb2.GetStatusResponse], object], deadline_s: float = 60.0
    ) -> admin_pb2.GetStatusResponse:
        """Poll the status until the claim holds."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            status = self.status()
            if claim(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"still not so after {deadline_s} s:\n{status}\n{self.log()}")

    def executors(self) -> list[psutil.Process]:
        """The torch children of the expert workers, in the order of their parents' start."""
        return self._children("expert_worker.executor")

    def engine(self) -> psutil.Process:
        """The torch child of the router."""
        return self._children("router.engine_process")[0]

    @contextmanager
    def without_executor(self, index: int) -> Iterator[None]:
        """Kill an executor, whose agent starts no other before the end of the block."""
        executor = self.executors()[index]
        agent = executor.parent()
        assert agent is not None
        agent.suspend()
        executor.kill()
        try:
            yield
        finally:
            agent.resume()

    def _children(self, module: str) -> list[psutil.Process]:
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in everyone if module in " ".join(one.cmdline())]

    def log(self) -> str:
        return "".join(self.stderr[-80:])


def generate(
    fleet: Fleet,
    prompt: str | Sequence[int],
    *,
    timeout: float = 60.0,
    **sampling: object,
) -> Answer:
    """One call to the end of its stream; errors are grpc.RpcError."""
    answer = Answer()
    request = generation_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams(**sampling))  # type: ignore[arg-type]
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    for response in fleet.generation().Generate(request, timeout=timeout):
        match response.WhichOneof("event"):
            case "chunk":
                answer.text += response.chunk.text
                answer.token_ids.extend(response.chunk.token_ids)
                for entry in response.chunk.logprobs:
                    answer.logprobs.append(entry.logprob)
                    answer.top.append([(one.token_id, one.logprob) for one in entry.top])
            case "finished":
                answer.finished = response.finished
    return answer


def command(*arguments: str) -> list[str]:
    """The `expertmesh` command line, run by this interpreter."""
    return [sys.executable, "-m", "expertmesh", *arguments]


@contextmanager
def fleet_of(model: Path, *flags: str, **environment: str) -> Iterator[Fleet]:
    """`expertmesh up` on `model`, ready to serve; everything it started is gone afterwards."""
    process = subprocess.Popen(
        command("up", "--model", str(model), "--port", "0", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    stderr: list[str] = []
    collector = threading.Thread(target=_collect, args=(process, stderr), daemon=True)
    collector.start()
    family: set[psutil.Process] = set()
    try:
        addresses = _await_ready(process, stderr)
        fleet = Fleet(process, addresses[0], addresses[1], stderr)
        yield fleet
        family = (
            set(psutil.Process(process.pid).children(recursive=True)) if process.poll() is None else set()
        )
    finally:
        _end(process)
        collector.join(STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for one in alive:
            one.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if alive:
        raise AssertionError(f"still alive after `expertmesh up` ended: {alive}")


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    if process.stderr is not None:
        lines.extend(iter(process.stderr.readline, ""))


def _await_ready(process: subprocess.Popen[str], stderr: list[str]) -> tuple[str, str]:
    found: list[tuple[str, str]] = []

    def read() -> None:
        for line in process.stdout or ():
            if match := READY.match(line):
                found.append((match[1], match[2]))
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(START_TIMEOUT_S)
    if not found:
        raise AssertionError(
            f"`expertmesh up` did not get ready (exit {process.poll()}):\n{''.join(stderr[-80:])}"
        )
    return found[0]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
