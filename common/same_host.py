"""Two processes find out whether they can share memory: by doing it, over a socket only they know of.

The expert worker offers a Unix socket with a random name; the router, which is told the name and a secret on
the store, tries to reach it and hands a small segment over. An address alone proves nothing: hosts may
have the same one, and containers of one host none in common.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.errors import LinkError
from common.shared_segments import is_supported, make_segment, map_sealed

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROOF_BYTES, SECRET_BYTES = 32, 32
ANSWER_S = 5.0
"""How long either side waits for the other once the socket is connected."""
AGREED = b"agreed"
_credentials = struct.Struct("=iII")
"""pid, uid, gid."""


class NotShared(LinkError):
    """The two processes have no memory in common; the message says why."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker says of itself on the store.

    Attributes:
        boot: which start of which kernel it runs on.
        name: of its socket, in the abstract namespace; empty where it makes no offer.
        secret: what a caller must know.
        refusal: why it makes no offer.
    """

    boot: str = ""
    name: str = ""
    secret: str = ""
    refusal: str = ""

    def text(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Offer:
        """Raises NotShared."""
        try:
            given = json.loads(text)
            return cls(**{field: str(given[field]) for field in ("boot", "name", "secret", "refusal")})
        except (ValueError, KeyError, TypeError):
            raise NotShared("the worker's offer of shared memory cannot be read") from None


class Host:
    """A worker's end: a listening socket, until the router has come or has decided not to."""

    def __init__(self) -> None:
        """Listen. Raises NotShared where this system cannot share memory in this way."""
        if not is_supported() or not boot_id():
            raise NotShared("this system has no sealed memory, or no boot id")
        self.offer = Offer(boot_id(), f"expertmesh-{secrets.token_hex(16)}", secrets.token_hex(SECRET_BYTES))
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.bind(f"\0{self.offer.name}")
            self._listener.listen(1)
        except OSError as error:
            raise NotShared(f"no Unix socket can be opened: {error.strerror}") from error

    def accept(self) -> socket.socket:
        """Prove to the router, which has said that it comes, that memory is shared. Raises NotShared."""
        self._listener.settimeout(ANSWER_S)
        end: socket.socket | None = None
        try:
            end, _ = self._listener.accept()
            end.settimeout(ANSWER_S)
            check_user(end)
            self._show_proof(end)
            if end.recv(len(AGREED)) != AGREED:
                raise NotShared("the router saw no shared memory")
        except (OSError, LinkError) as error:
            if end is not None:
                end.close()
            raise NotShared(f"memory is not shared: {error}") from error
        return end

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    def _show_proof(self, end: socket.socket) -> None:
        secret, fds, _, _ = socket.recv_fds(end, 2 * SECRET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if len(fds) != 1 or not hmac.compare_digest(secret, self.offer.secret.encode()):
                raise NotShared("somebody came who does not know the secret of this link")
            end.sendall(map_sealed(fds[0])[:PROOF_BYTES].numpy().tobytes())
        finally:
            for fd in fds:
                os.close(fd)


def reach(offer: Offer) -> socket.socket:
    """The router's end: connect to a worker. Raises NotShared where it is elsewhere."""
    if offer.refusal:
        raise NotShared(offer.refusal)
    if not is_supported() or offer.boot != boot_id():
        raise NotShared("the worker is on another host")
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        end.settimeout(ANSWER_S)
        try:
            end.connect(f"\0{offer.name}")
        except OSError:
            raise NotShared("the worker is in another network namespace of this host") from None
        check_user(end)
    except NotShared:
        end.close()
        raise
    return end


def prove(end: socket.socket, secret: str) -> None:
    """See whether the worker sees what is written here. Raises NotShared, and closes the socket."""
    proof = secrets.token_bytes(PROOF_BYTES)
    try:
        segment = make_segment(0, PROOF_BYTES)
        fd = segment.fd
        if fd is None:
            raise NotShared("a new segment has no descriptor")
        try:
            segment.memory.copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
            socket.send_fds(end, [secret.encode()], [fd])
        finally:
            os.close(fd)
        if end.recv(PROOF_BYTES) != proof:
            raise NotShared("the worker does not see this process's memory")
        end.sendall(AGREED)
    except (OSError, LinkError) as error:
        end.close()
        raise NotShared(f"memory is not shared: {error}") from error


def check_user(end: socket.socket) -> None:
    """Refuse a peer that runs as somebody else. Raises NotShared."""
    peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _credentials.size)
    _, uid, _ = _credentials.unpack(peer)
    if uid != os.geteuid():
        raise NotShared(f"one process runs as user {uid} and the other as {os.geteuid()}")


def boot_id() -> str:
    """Which start of which kernel this is; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""
