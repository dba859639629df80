"""`interface:NAME` as an address: what can be known before a container has its own."""

from __future__ import annotations

import fcntl
import socket
import struct

from common.errors import ConfigError

PREFIX = "interface:"
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface, by its name."""


def own_address(address: str) -> str:
    """The IPv4 address that `interface:NAME` stands for; any other address is returned as it is.

    Raises:
        ConfigError: there is no such interface, or it has no IPv4 address.
    """
    if not address.startswith(PREFIX):
        return address
    name = address.removeprefix(PREFIX)
    request = struct.pack("256s", name.encode()[:15])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            answer = fcntl.ioctl(asking, SIOCGIFADDR, request)
    except OSError as error:
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(
            f'"{address}" stands for the IPv4 address of that interface, but there is none '
            f"({error.strerror}): name another one of {names}, or write the address itself"
        ) from None
    # struct ifreq: 16 bytes of name, then a sockaddr_in, whose address stands at its fifth byte.
    return socket.inet_ntoa(answer[20:24])
