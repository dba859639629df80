"""Groups of one router and all of its expert workers: rank 0 is the router, rank 1 + ep_rank a worker.

NCCL groups are made the way torch makes its own, but have never run. HCCL groups have run with the real
torch_npu on a fake HCCL (docs/npu.md), never on NPUs.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as dist

from common.errors import LinkError
from common.exchange.collective_windows import WindowGroup, register
from common.npu_windows import WindowLayout
from common.process_group import IDLE, calm_loop_threads, delete_keys, first_line, gloo_device, release

logger = logging.getLogger(__name__)

GOODBYE_S = 1.0

LEAST_WAIT_S = 0.001
POLL_S = 0.0001
HCCL_BUFFER_MB = 200
"""Of each HCCL group, twice: CANN's own default, said here so that HCCL_BUFFSIZE, which may be set for other
groups of the process, does not decide how much device memory the lanes take."""


class PendingCollective:
    """A collective under way; keep it until it `is_done`, for it keeps its tensors."""

    def __init__(self, work: Any, waits_on_host: bool, *tensors: Tensor) -> None:
        self._work = work
        self._waits_on_host = waits_on_host
        self._tensors = tensors

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not: `wait` says which, at once."""
        return bool(self._work.is_completed())

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end; None: until the limit of its lane. An expired wait may be repeated.

        Raises:
            LinkError: a rank is gone, or the time passed.
        """
        try:
            if not self._waits_on_host:
                self._wait_for_device(timeout_s)
            elif timeout_s is None:
                self._work.wait()
            else:
                self._work.wait(timedelta(seconds=max(timeout_s, LEAST_WAIT_S)))
        except RuntimeError as error:
            raise LinkError(f"the group failed: {first_line(error)}") from error

    def _wait_for_device(self, timeout_s: float | None) -> None:
        # Asked again and again, because each way to wait costs something else: the libraries end the process
        # when a wait of theirs expires, and a stream that waits holds up what is on it. Streams are few and
        # shared, so that even one that was asked for just now may be another group's.
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._work.is_completed():
            if time.monotonic() > deadline:
                raise LinkError(f"the group failed: nothing came within {timeout_s:.1f} s")
            time.sleep(POLL_S)
        self._work.wait()  # at once, and raises what went wrong


class Lane:
    """One process group: its collectives must be begun in the same order on every rank.

    Splits count entries of the first dimension, one per worker in ep_rank order.
    """

    def __init__(self, group: Any, size: int, waits_on_host: bool) -> None:
        self._group = group
        self._size = size
        self._waits_on_host = waits_on_host
        self._lock = threading.Lock()

    def scatter(self, sent: Tensor, splits: Sequence[int]) -> PendingCollective:
        """Send every worker its part; the router's half of an all-to-all whose other half is `receive`."""
        return self._all_to_all(_nothing_like(sent), sent, [0] * self._size, [0, *splits])

    def receive(self, buffer: Tensor) -> PendingCollective:
        """Fill the buffer with this worker's part of what the router scatters."""
        return self._all_to_all(
            buffer, _nothing_like(buffer), [buffer.shape[0], *[0] * (self._size - 1)], [0] * self._size
        )

    def gather(self, buffer: Tensor, splits: Sequence[int]) -> PendingCollective:
        """Fill the buffer with every worker's part; the router's half, whose other half is `send`."""
        # An all-to-all because HCCL has no gather, and because the parts differ in size at ep_level 2.
        return self._all_to_all(buffer, _nothing_like(buffer), [0, *splits], [0] * self._size)

    def send(self, part: Tensor) -> PendingCollective:
        """Send this worker's part of what the router gathers."""
        return self._all_to_all(
            _nothing_like(part), part, [0] * self._size, [part.shape[0], *[0] * (self._size - 1)]
        )

    def broadcast(self, tensor: Tensor) -> PendingCollective:
        """Fill the tensor of every worker with the router's, which must have the same size."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._begin(lambda group: group.broadcast([tensor], options), tensor)

    def limit(self, timeout: timedelta) -> None:
        """Let every later collective fail after this time; on a device none does, see `wait`."""
        if self._waits_on_host:
            with self._lock:
                self._open_group()._set_default_timeout(timeout)

    def close(self) -> None:
        """Drop the group from a thread of its own: Gloo blocks there until what was begun has ended."""
        with self._lock:
            owned, self._group = [self._group], None  # no name but the reaper's may keep the group alive
        if owned[0] is not None:
            release(owned)

    def _all_to_all(
        self, received: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int]
    ) -> PendingCollective:
        options = dist.AllToAllOptions()
        return self._begin(
            lambda group: group.alltoall_base(received, sent, received_splits, sent_splits, options),
            received,
            sent,
        )

    def _begin(self, begin: Callable[[Any], Any], *tensors: Tensor) -> PendingCollective:
        try:
            with self._lock:
                return PendingCollective(begin(self._open_group()), self._waits_on_host, *tensors)
        except RuntimeError as error:
            raise LinkError(f"the group failed: {first_line(error)}") from error

    def _open_group(self) -> Any:
        group = self._group
        if group is None:
            raise LinkError("the group is closed: join a new one")
        return group


@dataclass(frozen=True, slots=True)
class CollectiveGroup:
    """The lanes of an epoch.

    Attributes:
        metadata: always Gloo, so that an idle worker waits on its host and no device spins.
        dispatch: rows to the workers.
        combine: replies; a lane of its own because a worker takes the next rows while it computes a reply.
        size: ranks of every lane.
        device: where the tensors of dispatch and combine must be; those of metadata are on the CPU.
        sums: where sums in float64 are made.
        windows: what rows travel through where they can, beside dispatch and combine; None: there are none.
        transport: what carries rows, and why, for people.
    """

    metadata: Lane
    dispatch: Lane
    combine: Lane
    size: int
    device: torch.device
    sums: torch.device
    windows: WindowGroup | None = None
    transport: str = "collective"

    def limit(self, timeout_s: float) -> None:
        """Let every later collective fail after this time."""
        for lane in (self.metadata, self.dispatch, self.combine):
            lane.limit(timedelta(seconds=timeout_s))

    def leave(self, goodbye: Sequence[Tensor] | None, is_quiet: bool) -> None:
        """Scatter a goodbye, one part for each worker, as far as that goes in GOODBYE_S; then close."""
        try:
            if goodbye is not None:
                self.metadata.scatter(torch.cat([*goodbye]), [part.numel() for part in goodbye]).wait(
                    GOODBYE_S
                )
        except LinkError as error:
            logger.debug("no goodbye: %s", error)
        self.close(is_quiet)

    def close(self, is_quiet: bool = False) -> None:
        """Drop all lanes; never blocks. `is_quiet`: nobody writes to the windows any more."""
        for lane in (self.metadata, self.dispatch, self.combine):
            lane.close()
        if self.windows is not None:
            self.windows.close(is_quiet)


class _Opener(Protocol):
    """Makes the process group of one collective library."""

    def __call__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, data_address: str
    ) -> Any: ...


def _open_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta, data_address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo_device(data_address)]
    options._threads = 1
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _open_nccl(store: dist.Store, rank: int, size: int, timeout: timedelta, data_address: str) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # which address it uses is NCCL_SOCKET_IFNAME's to say
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


def _open_hccl(store: dist.Store, rank: int, size: int, timeout: timedelta, data_address: str) -> Any:
    hccl: Any = import_module("torch_npu")._C._distributed_c10d.ProcessGroupHCCL  # likewise HCCL_IF_IP
    options = hccl.Options()
    # The watchdog takes the process down when a collective takes longer. Deadlines are ours: see `wait`.
    options._timeout = IDLE
    options.hccl_config = {"hccl_buffer_size": HCCL_BUFFER_MB}
    return hccl(store, rank, size, options)


def _hccl_name(group: Any, rank: int) -> str:
    return str(group.get_hccl_comm_name(rank))


@dataclass(frozen=True, slots=True)
class _Backend:
    """One collective library.

    Attributes:
        name_of: how the library's own log calls a group; where it has names.
        device: where the tensors of its collectives must be.
        waits_on_host: False where `wait` only makes the current stream wait.
        sums: where float64 exists; torch_npu computes float32 instead, without an error.
        has_windows: whether ranks may write to one another's memory, see common.exchange.collective_windows.
    """

    open: _Opener
    device: str
    waits_on_host: bool
    sums: str
    name_of: Callable[[Any, int], str] | None = None
    has_windows: bool = False


_BACKENDS = {
    "gloo": _Backend(_open_gloo, "cpu", True, "cpu"),
    "nccl": _Backend(_open_nccl, "cuda", False, "cuda"),
    "hccl": _Backend(_open_hccl, "npu", False, "cpu", _hccl_name, True),
}


def join_group(
    host: str,
    port: int,
    prefix: str,
    rank: int,
    size: int,
    timeout_s: float,
    data_address: str,
    backend: str = "gloo",
    layout: WindowLayout | None = None,
) -> CollectiveGroup:
    """Join the group `prefix` of `size` ranks; rank 0 deletes its keys from the store once all are up.

    Args:
        backend: gloo, nccl or hccl.
        layout: of hccl, said by rank 0: windows for rows, made where every rank can make them.

    Raises:
        LinkError: the store or a rank was not there within timeout_s, or this torch lacks the backend.
        KeyError: a backend of another name.
    """
    deadline = time.monotonic() + timeout_s
    rows, lanes, windows = _BACKENDS[backend], list[Lane](), None

    def left() -> timedelta:
        return timedelta(seconds=max(deadline - time.monotonic(), LEAST_WAIT_S))

    try:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=left())
        for name, kind in (("metadata", _BACKENDS["gloo"]), ("dispatch", rows), ("combine", rows)):
            scoped = dist.PrefixStore(f"{prefix}/{name}", store)
            group = kind.open(scoped, rank, size, left(), data_address)
            lane = Lane(group, size, kind.waits_on_host)
            lanes.append(lane)
            lane.limit(left())
            _meet(lane, rank, size, kind.device, left().total_seconds())
            lane.limit(IDLE)
            if kind.name_of is not None:
                logger.info(
                    "rank %d of %d: the group for %s is %s", rank, size, name, kind.name_of(group, rank)
                )
            del group  # a lane that is closed must be the last to hold it
        if rows.has_windows:
            scoped = dist.PrefixStore(f"{prefix}/windows", store)
            windows = _join_windows(scoped, rank, size, layout, lanes[0], left, data_address)
        if rank == 0:
            delete_keys(store, prefix)
    except (ImportError, AttributeError, OSError, RuntimeError, LinkError) as error:
        for lane in lanes:
            lane.close()
        if windows is not None:
            windows.close(is_quiet=False)
        raise LinkError(
            f"group {prefix} of {size} ranks over {host}:{port} was not made with {backend} within "
            f"{timeout_s:.1f} s: {first_line(error)}"
        ) from error
    calm_loop_threads()
    metadata, dispatch, combine = lanes
    return CollectiveGroup(
        metadata, dispatch, combine, size, torch.device(rows.device), torch.device(rows.sums), windows
    )


def _join_windows(
    store: dist.Store,
    rank: int,
    size: int,
    layout: WindowLayout | None,
    metadata: Lane,
    left: Callable[[], timedelta],
    data_address: str,
) -> WindowGroup | None:
    words = torch.zeros(len(fields(WindowLayout)), dtype=torch.int64)
    if rank:
        metadata.receive(words).wait(left().total_seconds())
        layout = WindowLayout(*words.tolist()) if words.any() else None
    else:
        if layout is not None:
            words = torch.tensor(astuple(layout))
        metadata.scatter(words.repeat(size - 1), [len(words)] * (size - 1)).wait(left().total_seconds())
    if layout is None:
        return None

    def meet(holds: bool) -> bool:
        return _all_hold(metadata, rank, size, holds, left().total_seconds())

    owned = [_open_hccl(store, rank, size, left(), data_address)]
    windows = register(owned[0], rank, size, layout, meet)
    if windows is None:
        release(owned)
    else:
        logger.info("rank %d of %d: the group for windows is %s", rank, size, windows.name)
    return windows


def _meet(lane: Lane, rank: int, size: int, device: str, timeout_s: float) -> None:
    # Once rank 0 has heard from everybody, nobody needs the store any more. NCCL connects only here.
    words = torch.zeros(size - 1 if rank == 0 else 1, dtype=torch.int64, device=device)
    met = lane.send(words) if rank else lane.gather(words, [1] * (size - 1))
    met.wait(timeout_s)


def _all_hold(lane: Lane, rank: int, size: int, holds: bool, timeout_s: float) -> bool:
    """Whether something holds at every rank, said to all of them; returns once all have come."""
    word = torch.tensor([int(holds)])
    if rank:
        lane.send(word).wait(timeout_s)
        lane.receive(word).wait(timeout_s)
        return bool(word)
    words = torch.zeros(size - 1, dtype=torch.int64)
    lane.gather(words, [1] * (size - 1)).wait(timeout_s)
    all_hold = holds and bool(words.all())
    lane.scatter(torch.full((size - 1,), int(all_hold)), [1] * (size - 1)).wait(timeout_s)
    return all_hold


def _nothing_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty((0, *tensor.shape[1:]))
