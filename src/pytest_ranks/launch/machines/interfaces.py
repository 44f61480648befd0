"""Which network interface reaches another machine: gloo has to be told, or it resolves host names."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from pytest_ranks.errors import UnavailableError

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_towards(host: str) -> str:
    """Return the interface whose address this machine uses to reach a host.

    Raises:
        UnavailableError: there is no way to the host, or no interface has the address.
    """
    own = own_address(host)
    name = _interface_of(own)
    if name is None:
        raise UnavailableError(
            f"no network interface of this machine has the address {own}, which leads to {host}: "
            "set GLOO_SOCKET_IFNAME to the interface's name."
        )
    return name


def own_address(host: str) -> str:
    """Return the address of this machine from which it reaches a host; nothing is sent.

    Raises:
        UnavailableError: there is no way to the host.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return plain_address(probe.getsockname()[0])
    except OSError as error:
        raise UnavailableError(f"{host} cannot be reached from this machine: {error}.") from None


def plain_address(address: str) -> str:
    """Return an address without its zone, and an IPv4 address that IPv6 wraps as itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    wrapped = getattr(parsed, "ipv4_mapped", None)
    return str(wrapped or parsed)


def _interface_of(address: str) -> str | None:
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback:
        return "lo"
    if parsed.version == 6:
        return _of_ipv6(parsed.packed.hex())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name)[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                if answer[20:24] == parsed.packed:
                    return name
    return _of_route(int(parsed))  # a second address of an interface: its network tells


def _of_ipv6(wanted: str) -> str | None:
    for line in _lines("/proc/net/if_inet6"):
        number, *_, name = line.split()
        if number == wanted:
            return name
    return None


def _of_route(address: int) -> str | None:
    found: tuple[int, str] | None = None
    for line in _lines("/proc/net/route")[1:]:
        name, destination, _, _, _, _, _, mask, *_ = line.split()
        network, bits = (socket.ntohl(int(text, 16)) for text in (destination, mask))
        if bits and address & bits == network and (found is None or bits > found[0]):
            found = (bits, name)
    return found[1] if found is not None else None


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
