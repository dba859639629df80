"""Two-rank Gloo groups between a router and an expert worker, and the store they are agreed on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as dist

from common.errors import LinkError

IDLE = timedelta(days=20)
"""An idle receiver waits without a deadline; Gloo wants a number."""

MOST_FREE, MOST_FREE_BYTES = 4, 1 << 25
"""Receive buffers of one size class that a link keeps, and the largest of them that it does."""

_devices: dict[str, Any] = {}
_devices_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class StoreServer:
    """A store that listens on one address only. Keep the object: dropping it ends the server."""

    host: str
    port: int
    store: dist.TCPStore


class PendingTransfer:
    """A send or receive under way; keeps its buffer and its group alive until it was waited for."""

    def __init__(self, work: Any, buffer: Tensor, group: Any) -> None:
        self.buffer = buffer
        self._work = work
        self._group = group

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end; None waits without a deadline. An expired wait kills the pair.

        Raises:
            LinkError: the peer is gone, or the time passed.
        """
        try:
            self._work.wait(IDLE if timeout_s is None else timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError as error:
            raise LinkError(f"the link failed: {first_line(error)}") from error


class PairLink:
    """One connected pair over Gloo, as a common.exchange.message_link.MessageLink.

    A message goes in order, from any thread. Gloo has to be given the memory of a message before it comes,
    and can only be waited for.
    """

    readable = None
    is_backlogged = False
    keeps_memory = False

    def __init__(self, group: Any, rank: int, device: Any, transport: str) -> None:
        self.transport = transport
        self.came_ns = 0
        self._group: Any = group
        self._device = device
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._posted: list[PendingTransfer] = []
        self._expected: SimpleQueue[PendingTransfer | None] = SimpleQueue()
        self._free: dict[int, list[Tensor]] = {}

    def message(self, num_bytes: int) -> Tensor:
        """Memory for the next message."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def post(self, message: Tensor) -> None:
        """Begin to send; the message must not change until it was let go of. Raises LinkError."""
        group = self._open_group()
        try:
            transfer = PendingTransfer(group.send([message], self._peer, 0), message, group)
        except RuntimeError as error:
            raise LinkError(f"the link failed: {first_line(error)}") from error
        with self._lock:
            self._posted.append(transfer)

    def settle(self, timeout_s: float) -> None:
        """Wait until Gloo has taken the bytes of everything posted. Raises LinkError."""
        with self._lock:
            posted, self._posted = self._posted, []
        for transfer in posted:
            transfer.wait(timeout_s)

    def expect(self, num_bytes: int) -> None:
        """Give Gloo memory for one more message, of its size class: made once, then used again."""
        size = 1 << max(num_bytes - 1, 0).bit_length()
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        group = self._open_group()
        try:
            transfer = PendingTransfer(group.recv([buffer], self._peer, 0), buffer, group)
        except RuntimeError as error:
            raise LinkError(f"the link failed: {first_line(error)}") from error
        self._expected.put(transfer)

    def receive(self) -> Tensor:
        """Wait for the next message that is expected. Raises LinkError."""
        transfer = self._expected.get()
        if transfer is None:
            raise LinkError("the link is closed: join a new one")
        transfer.wait()  # a peer that has nothing to say costs nothing: no deadline here
        self.came_ns = time.monotonic_ns()
        return transfer.buffer

    def done(self, message: Tensor) -> None:
        """Keep the memory of a message for later ones."""
        if message.numel() > MOST_FREE_BYTES:
            return
        with self._lock:
            free = self._free.setdefault(message.numel(), [])
            if len(free) < MOST_FREE:
                free.append(message)

    def close(self) -> None:
        """Drop the group from a thread of its own: dropping one with a pending operation may block."""
        with self._lock:
            owned, self._group = [self._group, *self._posted], None  # only the reaper keeps the group alive
            self._posted = []
        with contextlib.suppress(Empty):
            while True:
                owned.append(self._expected.get_nowait())
        self._expected.put(None)
        release(owned)

    def _open_group(self) -> Any:
        group = self._group
        if group is None:
            raise LinkError("the link is closed: join a new one")
        return group


def release(owned: list[Any]) -> None:
    """Empty `owned` from a reaper thread, which may block there; the caller keeps no other reference."""
    threading.Thread(target=owned.clear, name="link-reaper", daemon=True).start()


def open_store(host: str) -> StoreServer:
    """Open a store on a free port of `host` and of no other address. Raises LinkError."""
    try:
        family = socket.getaddrinfo(host, None)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((host, 0))
        listener.listen(128)
        port = int(listener.getsockname()[1])
        descriptor = listener.detach()  # the store owns it from here on
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=True
        )
    except (OSError, RuntimeError) as error:
        raise LinkError(
            f"no store can be opened on {host}: {first_line(error)}; check data_address"
        ) from error
    return StoreServer(host, port, store)


def reach_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to a store. Raises LinkError."""
    try:
        return dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
    except (OSError, RuntimeError) as error:
        raise LinkError(f"the store {host}:{port} cannot be reached: {first_line(error)}") from error


def scope(store: dist.TCPStore, prefix: str) -> dist.PrefixStore:
    """The store as one link sees it."""
    return dist.PrefixStore(prefix, store)


def join_pair(
    host: str,
    port: int,
    prefix: str,
    rank: int,
    timeout_s: float,
    data_address: str,
    transport: str = "links",
) -> PairLink:
    """Join the two-rank group `prefix`; rank 0 is the router and deletes the keys once both are up.

    Raises:
        LinkError: the store or the peer was not there within timeout_s.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        store = reach_store(host, port, timeout_s)
        scoped = scope(store, prefix)
        device = gloo_device(data_address)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [device]
        options._threads = 1
        options._timeout = timeout
        group = gloo(scoped, rank, 2, options)
        if rank == 1:
            scoped.set("worker_is_up", "1")
        else:
            scoped.wait(["worker_is_up"], timeout)
            delete_keys(store, prefix)
        group._set_default_timeout(IDLE)
    except (OSError, RuntimeError) as error:
        raise LinkError(
            f"link {prefix} over {host}:{port} was not made within {timeout_s:.1f} s: {first_line(error)}"
        ) from error
    calm_loop_threads()
    return PairLink(group, rank, device, transport)


def gloo_device(data_address: str) -> Any:
    """The one Gloo device, with its loop thread, that all groups of an address share."""
    with _devices_lock:
        if data_address not in _devices:
            _devices[data_address] = dist.ProcessGroupGloo.create_device(hostname=data_address)
        return _devices[data_address]


def delete_keys(store: dist.TCPStore, prefix: str) -> None:
    """Delete what a group left in the store; it needs none of it once all of its ranks are up."""
    for key in store.list_keys():
        if key.startswith(f"{prefix}/"):
            store.delete_key(key)


def calm_loop_threads() -> None:
    """Put Gloo's loop threads on SCHED_BATCH, where the system allows it."""
    # On a shared core Gloo's loop thread preempts the thread it serves and costs a scheduler tick (4 ms).
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            _calm(task)


def _calm(task: Path) -> None:
    with contextlib.suppress(OSError):
        if (task / "comm").read_text().strip() == "gloo_tcp_loop":
            os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


def built_backends() -> tuple[str, ...]:
    """The collective libraries that this build of torch holds; HCCL comes with torch-npu instead."""
    return tuple(name.lower() for name in ("Gloo", "NCCL") if hasattr(dist, f"ProcessGroup{name}"))


def first_line(error: BaseException) -> str:
    """What torch says, without the stack that it appends."""
    return (str(error).splitlines() or [type(error).__name__])[0]
