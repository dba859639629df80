"""What an expert worker's agent and its executor say to each other. Torch-free; carried by common.channel."""

from __future__ import annotations

from dataclasses import dataclass

from common.channel import Fatal, Shutdown, by_name

# ---------------------------------------------------------------- agent -> executor


@dataclass(frozen=True, slots=True)
class Configure:
    """The first message.

    Attributes:
        threads: torch threads; None leaves torch's default.
        data_address: address of this host on the data plane.
        exchange: how rows arrive, "links" or "collective".
        same_host_transport: of links, "auto", "sharedMemory" or "links".
    """

    device: str
    threads: int | None
    data_address: str
    exchange: str
    same_host_transport: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load what the epoch needs and is missing, then join the link. Answered by Loading..., Loaded, Linked.

    Attributes:
        layers: [[layer_id, [expert ids in local order]], ...].
        int8_layers: the layers whose rows the router sends in int8 at ep_level 2.
        exchange, host, port, prefix, timeout_s: how rows arrive, and where the link to the router is agreed
            on (fleet.proto, LinkAddress).
        buffer_bytes: what is needed beside the weights.
        ep_level: the exchange the epoch is to begin with; 0: not said.
    """

    term: int
    epoch: int
    incarnation: int
    ep_rank: int
    ep_size: int
    model_path: str
    dtype: str
    layers: list[list[int | list[int]]]
    int8_layers: list[int]
    exchange: str
    host: str
    port: int
    prefix: str
    timeout_s: float
    buffer_bytes: int
    ep_level: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """Could the executor take part in an epoch of a router with these needs? Answered by Checked.

    Attributes:
        check_id: what the answer calls it.
        buffer_bytes, ep_level: as in Prepare.
    """

    check_id: int
    term: int
    buffer_bytes: int
    ep_level: int


@dataclass(frozen=True, slots=True)
class Forget:
    """A router is gone: drop its links. Weights stay."""

    term: int


# ---------------------------------------------------------------- executor -> agent


@dataclass(frozen=True, slots=True)
class Ready:
    """Torch is imported and the device answers. `arithmetic` is the hash of a fixed computation on it."""

    device: str
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Loading:
    """Some weights of the epoch were read."""

    term: int
    epoch: int
    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """All weights of the epoch are in memory; the executor waits at the link's address.

    Attributes:
        grouped_matmul: how the experts of a layer are run, and why: one sentence part.
    """

    term: int
    epoch: int
    loaded_bytes: int
    grouped_matmul: str


@dataclass(frozen=True, slots=True)
class Linked:
    """The link of the epoch is up."""

    term: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """All weights are in memory, but the executor cannot do what the epoch asks for; nothing has changed.

    Attributes:
        reason: one sentence.
    """

    term: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """Answers Check. `refusal`: why it could not, empty where it could."""

    check_id: int
    refusal: str


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    """The epoch cannot be prepared; links and weights in force are untouched.

    Attributes:
        kind: name of the class in common.errors.
    """

    term: int
    epoch: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The link of an epoch ended: the router dropped it, or died."""

    term: int
    epoch: int
    reason: str


TO_EXECUTOR = by_name(Configure, Prepare, Check, Forget, Shutdown)
TO_AGENT = by_name(Ready, Loading, Loaded, Linked, Refused, Checked, PrepareFailed, LinkClosed, Fatal)
