"""A real engine process at the other end of a real socketpair, for tests."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.channel import Fatal, decode, encode
from router.messages import TO_FRONT, Configure, Loaded, Lost, Rejected, Stats, Submit, Tokens, Tune

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0


@dataclass
class Answer:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[list[float]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


class EngineChild:
    """Speaks for the front."""

    def __init__(self, end: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.seen: list[Any] = []
        self._end = end
        self._arrived: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._end.makefile("rb") as lines:
            for line in lines:
                self._arrived.put(decode(line, TO_FRONT))
        self._arrived.put(None)

    def send(self, *messages: object) -> None:
        self._end.sendall(b"".join(encode(message) for message in messages))

    def next(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The next message; None when the engine closed the channel."""
        message = self._arrived.get(timeout=timeout_s)
        self.seen.append(message)
        return message

    def until(self, wanted: type, claim: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message of a class for which a claim holds."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            message = self.next()
            if isinstance(message, wanted) and claim(message):
                return message
            if message is None or isinstance(message, Fatal):
                raise AssertionError(f"waited for {wanted.__name__}, the engine ended: {message}")
        raise AssertionError(f"no {wanted.__name__} in {START_TIMEOUT_S} s")

    def answer(self, requests: Iterable[Submit]) -> dict[str, Answer]:
        """Submit requests together and collect their answers."""
        answers = {request.request_id: Answer() for request in requests}
        self.send(*requests)
        while any(answer.finish_reason is None and answer.error is None for answer in answers.values()):
            message = self.next()
            match message:
                case Tokens():
                    for event in message.events:
                        note(answers[str(event["id"])], event)
                case Rejected():
                    answers[message.request_id].error = message.message
                case Fatal() | Lost() | None:
                    raise AssertionError(f"the engine ended, or its epoch: {message}")
        return answers

    def idle(self) -> Stats:
        """The Stats of an engine with nothing left to do."""
        stats = self.until(Stats, lambda stats: stats.num_running == stats.num_waiting == 0)
        assert isinstance(stats, Stats)
        return stats

    def hang_up(self) -> None:
        """Close the front's end."""
        self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


def note(answer: Answer, event: dict[str, Any]) -> None:
    """Add one event to an answer."""
    assert answer.finish_reason is None
    answer.tokens.append(event["token"])
    answer.finish_reason = event["fin"]
    if "logprob" in event:
        answer.logprobs.append(event["logprob"])
        answer.top.append(event["top"])


def tune(ep_level: int = 2, micro_batches: int = 1, **other: Any) -> Tune:
    """How rows are exchanged: everything at once, unless said otherwise."""
    fields: dict[str, Any] = {
        "tune_id": 0,
        "ep_level": ep_level,
        "micro_batches": micro_batches,
        "chunk_rows": 0,
        "buffer_factors": [[0, 8.0]],
        "cutoff_factor": None,
        "cutoff_min_rows": 4096,
        "is_grouped": True,
        "max_batch_size": 8,
        "max_prefill_tokens": 64,
        "deadline_floor_s": 0.25,
    }
    return Tune(**fields | other)


def configure(model_path: Path, **overrides: Any) -> Configure:
    """The Configure of a small engine with its experts in its own process; overrides may be a Tune's."""
    fields: dict[str, Any] = {
        "model_path": str(model_path),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "kv_cache_bytes": 8 << 20,
        "block_size": 16,
        "max_seq_len": None,
        "term": 1,
        "data_address": "127.0.0.1",
        "exchange": "links",
        "same_host_transport": "auto",
        "experts_in_process": True,
        "trace_file": None,
    }
    tuned = {name: overrides.pop(name) for name in Tune.__dataclass_fields__ if name in overrides}
    return Configure(**fields | {"tune": asdict(tune(**tuned))} | overrides)


@contextmanager
def engine_process() -> Iterator[EngineChild]:
    """A started engine process without a configuration. Killed at the end, if it still lives."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "router.engine_process", "--channel-fd", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    child = EngineChild(ours, process)
    try:
        yield child
    finally:
        process.kill()
        process.wait(10)
        ours.close()


@contextmanager
def engine(model_path: Path, **overrides: Any) -> Iterator[tuple[EngineChild, Loaded]]:
    """A loaded engine."""
    with engine_process() as child:
        child.send(configure(model_path, **overrides))
        yield child, child.until(Loaded)
