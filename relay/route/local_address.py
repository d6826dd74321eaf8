"""Whether an address is one of this machine. †"""

from __future__ import annotations

import socket

_NO_MACHINE = "192.0.2.1"
"""An address that no machine has (RFC 5737)."""


def is_local_address(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it.

    Where the machine may bind to any address (`ip_nonlocal_bind`), the function instead asks which
    source address the machine would use to talk to that one.
    """
    if _binds(_NO_MACHINE):
        return _speaks_to_itself(address)
    return _binds(address)


def _binds(address: str) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _speaks_to_itself(address: str) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # a datagram socket sends nothing when it connects
            return bool(probe.getsockname()[0] == address)
    except OSError:
        return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
