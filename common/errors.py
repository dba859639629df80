"""Every error expertmesh raises for somebody who must act.

ExpertMeshError
├── ConfigError            a value in the configuration, a flag or the environment (exit status 2)
├── CheckpointError        a file of the checkpoint, or what it says
├── RequestError           a field of a request
├── QueueFull              too many requests wait
├── NotReady               the fleet cannot serve now
├── StreamLost             a running answer cannot be continued
├── ReloadRefused          keys that cannot change while the services run
├── VersionConflict        the configuration in force is another than the caller thought
├── VersionUnknown         a version of the configuration that is not kept
├── ControlError           a peer on the control plane refused or is not there
│   └── EpochRefused       an expert worker cannot do what an epoch asks for
└── ExchangeError          the data plane
    ├── LinkError          a link could not be made
    ├── MessageError       a message that does not belong here
    └── WorkerLost         an expert worker died or stalled in the middle of a layer

Messages are one sentence: the value found, the rule, the way out.
"""

from __future__ import annotations


class ExpertMeshError(Exception):
    """Root of the tree. `grpc_status` names the status code a client sees."""

    grpc_status = "INTERNAL"


class ConfigError(ExpertMeshError):
    """A value in the configuration, a flag or the environment is wrong.

    `problems` has one sentence for each bad value; the message is the first, and how many follow. `paths` has
    the JSON path of each, where they are known.
    """

    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, first: str, *others: str, paths: tuple[str, ...] = ()) -> None:
        more = f" ({len(others)} more to correct: `expertmesh config check FILE` lists them)"
        super().__init__(f"{first}{more if others else ''}")
        self.problems = (first, *others)
        self.paths = paths


class CheckpointError(ExpertMeshError):
    """A file of the checkpoint is missing, damaged, or not of this model."""

    grpc_status = "FAILED_PRECONDITION"


class RequestError(ExpertMeshError):
    """A field of a request is wrong. `field` is its path in the request message."""

    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(ExpertMeshError):
    """Too many requests wait already. `retry_after_s` says when to try again."""

    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(ExpertMeshError):
    """The fleet cannot serve now. `reason` is a constant for programs, the message is for people."""

    grpc_status = "UNAVAILABLE"

    def __init__(self, message: str, reason: str = "NOT_READY") -> None:
        super().__init__(message)
        self.reason = reason


class StreamLost(ExpertMeshError):
    """A running answer cannot be continued."""

    grpc_status = "UNAVAILABLE"

    def __init__(self, message: str, reason: str = "WORKER_LOST") -> None:
        super().__init__(message)
        self.reason = reason


class ReloadRefused(ExpertMeshError):
    """A configuration differs from the one in force in keys that cannot change now. It changed nothing.

    `refusals` has a sentence for each of them by its JSON path; the message holds all sentences.
    """

    grpc_status = "FAILED_PRECONDITION"

    def __init__(self, refusals: dict[str, str]) -> None:
        super().__init__("; ".join(refusals.values()))
        self.refusals = refusals


class VersionConflict(ExpertMeshError):
    """The version in force is another than the caller expected: somebody else was quicker."""

    grpc_status = "ABORTED"


class VersionUnknown(ExpertMeshError):
    """No such version of the configuration is kept."""

    grpc_status = "NOT_FOUND"


class ControlError(ExpertMeshError):
    """A peer on the control plane refused a call or is not there."""

    grpc_status = "FAILED_PRECONDITION"


class EpochRefused(ControlError):
    """A worker cannot do what an epoch asks for, and goes on with what it serves. `worker` is its name."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"expert worker {worker} refuses: {reason}")
        self.worker = worker


class ExchangeError(ExpertMeshError):
    """Something on the data plane failed."""

    grpc_status = "UNAVAILABLE"


class LinkError(ExchangeError):
    """A link between a router and an expert worker could not be made, or was closed."""


class MessageError(ExchangeError):
    """A message arrived that does not belong to this term, epoch, step, layer or size."""


class WorkerLost(ExchangeError):
    """An expert worker died or stalled. Says who, where, in which phase, and for how long we waited."""

    def __init__(
        self,
        ep_rank: int,
        worker: str,
        layer_id: int,
        phase: str,
        num_bytes: int,
        waited_s: float,
        cause: str,
    ) -> None:
        super().__init__(
            f"expert worker {worker} (ep_rank {ep_rank}) was lost at layer {layer_id} in phase {phase}: "
            f"{cause}; {num_bytes} bytes outstanding, waited {waited_s:.3f} s"
        )
        self.ep_rank = ep_rank
        self.worker = worker
        self.layer_id = layer_id
        self.phase = phase
        self.num_bytes = num_bytes
        self.waited_s = waited_s
        self.cause = cause
