"""The expert worker's child process (`python -m expert_worker.executor`): torch, local experts, links.

The main thread computes, one thread reads the channel, one per epoch prepares, and one per link receives.
Shapes: R rows, D hidden_size.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from common import compute_threads
from common.channel import ChildChannel, Fatal, Shutdown
from common.device import find_device, free_memory, open_device
from common.errors import ConfigError, ControlError
from common.exchange import Received
from common.exchange.collective import CollectiveExpertExchange
from common.exchange.links import LinksExpertExchange
from common.lifeline import obey_parent_only
from common.logs import configure_logging
from common.progress_counter import ProgressCounter
from expert_worker.arithmetic import arithmetic_hash
from expert_worker.epoch_loading import EpochLoading, Layers
from expert_worker.joining import JoinGroup, JoinLink
from expert_worker.kernels import ExpertKernels, load_kernels
from expert_worker.messages import TO_EXECUTOR, Check, Configure, Forget, LinkClosed, Prepare, Ready
from expert_worker.shard import Shard
from expert_worker.step_loop import serve

logger = logging.getLogger(__name__)

END_GRACE_S = 2.0
"""How long a computation may still take when the parent is gone."""

BAD_INPUT_STATUS = 2


class EpochTables:
    """Which experts compute for which epoch. Links fill it from their threads, the main thread reads it."""

    def __init__(self) -> None:
        self._layers: dict[tuple[int, int], Layers] = {}
        self._buffer_bytes: dict[tuple[int, int], int] = {}
        self._in_force: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, term: int, epoch: int, layers: Layers, buffer_bytes: int) -> None:
        """Know the experts of an epoch that is prepared, and what it may take beside their weights."""
        with self._lock:
            self._layers[term, epoch] = layers
            self._buffer_bytes[term, epoch] = buffer_bytes

    def buffer_bytes(self, term: int) -> int:
        """What the epoch in force has for its buffers already; 0 without one, or before its first rows."""
        with self._lock:
            return self._buffer_bytes.get((term, self._in_force.get(term, 0)), 0)

    def forget(self, term: int) -> None:
        """A router is gone: let go of its epochs."""
        with self._lock:
            self._in_force.pop(term, None)
            self._keep(lambda of_term, _: of_term != term)

    def layers(self, term: int, epoch: int) -> Layers:
        """The experts of an epoch. Its first rows mean that it is in force: older ones are let go."""
        with self._lock:
            if self._in_force.get(term) != epoch:
                self._in_force[term] = epoch
                self._keep(lambda of_term, number: of_term != term or number >= epoch)
            return self._layers[term, epoch]

    def _keep(self, is_wanted: Callable[[int, int], bool]) -> None:
        for key in [key for key in self._layers if not is_wanted(*key)]:
            del self._layers[key], self._buffer_bytes[key]


class Executor:
    """The executor at one end of a channel."""

    def __init__(self, channel: ChildChannel, progress: ProgressCounter) -> None:
        self._channel = channel
        self._progress = progress
        self._tables = EpochTables()
        self._is_told_to_stop = False

    def run(self) -> int:
        """Serve until Shutdown or the end of the channel; the exit status."""
        messages = iter(self._channel)
        try:
            first = next(messages, Shutdown())
            if isinstance(first, Shutdown):
                return 0
            if not isinstance(first, Configure):
                raise ControlError(f"the first message is {type(first).__name__}, but it must be Configure")
            compute_threads.settle(first.threads, first.device)
            compute_threads.sleep_at_once()
            torch.set_float32_matmul_precision("highest")
            device, kernels = open_device(first.device), load_kernels(first.device)
            joining = self._open(first, kernels)
            loading = self._start(first, joining, device, kernels)
            threading.Thread(
                target=self._read, args=(messages, loading, joining), name="channel", daemon=True
            ).start()
            serve(joining.exchange, self._outputs, lambda: self._is_told_to_stop)
            return 0
        except (BrokenPipeError, ConnectionResetError):
            return 1  # nobody is left to tell
        except ConfigError as error:
            return self._end(error, BAD_INPUT_STATUS)
        except Exception as error:
            logger.error("the executor failed", exc_info=error)
            return self._end(error, 1)

    def _open(self, configure: Configure, kernels: ExpertKernels) -> JoinLink | JoinGroup:
        if configure.exchange == "links":
            exchange = LinksExpertExchange(self._link_closed)
            place = configure.data_address, configure.same_host_transport
            return JoinLink(exchange, *place, self._progress)
        group = CollectiveExpertExchange(self._link_closed, kernels.expand_rows)
        return JoinGroup(group, configure.data_address, find_device(configure.device).collective)

    def _start(
        self,
        configure: Configure,
        joining: JoinLink | JoinGroup,
        device: torch.device,
        kernels: ExpertKernels,
    ) -> EpochLoading:
        shard = Shard(kernels, device)
        loading = EpochLoading(
            shard,
            joining,
            self._tables.add,
            self._channel.send,
            partial(free_memory, configure.device),
            self._tables.buffer_bytes,
        )
        self._channel.send(Ready(str(device), arithmetic_hash(kernels, device)))
        return loading

    def _outputs(self, received: Received) -> Tensor:  # rows [R, D] -> [R, D]
        self._progress.tick()
        compute_threads.fit_torch(len(received.rows))
        layers = self._tables.layers(received.term, received.epoch)
        experts = layers[received.layer_id]
        return experts.forward(
            received.rows,
            received.tokens_per_expert,
            self._progress.tick,
            received.row_scales,
            received.is_grouped,
            received.output,
        )

    def _read(self, messages: Iterator[Any], loading: EpochLoading, joining: JoinLink | JoinGroup) -> None:
        """Do what the agent says, beside the computation."""
        try:
            for message in messages:
                match message:
                    case Prepare():
                        loading.prepare(message)
                    case Check():
                        loading.check(message)
                    case Forget():
                        loading.forget(message.term)
                        joining.exchange.forget(message.term)
                        self._tables.forget(message.term)
                    case Shutdown():
                        break
        except (OSError, ControlError) as error:
            logger.error("the agent cannot be understood: %s", error)
        self._is_told_to_stop = True
        joining.exchange.close()
        # Without a parent nobody needs what the main thread may still compute.
        time.sleep(END_GRACE_S)
        os._exit(1)

    def _link_closed(self, term: int, epoch: int, reason: str) -> None:
        with contextlib.suppress(OSError):  # without an agent this process is about to end
            self._channel.send(LinkClosed(term, epoch, reason))

    def _end(self, error: Exception, status: int) -> int:
        self._channel.send(Fatal(type(error).__name__, str(error)))
        return status


def main() -> None:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m expert_worker.executor", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--progress-fd", type=int, required=True, help="the inherited progress counter")
    arguments = parser.parse_args()
    serve_channel(arguments.channel_fd, arguments.progress_fd)


def serve_channel(channel_fd: int, progress_fd: int) -> NoReturn:
    """Serve the agent at the other end of an inherited socket, then end the process."""
    obey_parent_only()
    configure_logging("info", "executor")
    channel = ChildChannel(channel_fd, TO_EXECUTOR)
    with torch.inference_mode():
        status = Executor(channel, ProgressCounter(progress_fd)).run()
    logging.shutdown()
    sys.stderr.flush()
    # Threads that wait on links, and links that wait for peers, must not hold up the end of the process.
    os._exit(status)


if __name__ == "__main__":
    main()
