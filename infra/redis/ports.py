"""Ports of this machine that a server can have."""

from __future__ import annotations

import secrets
import socket

HOST = "127.0.0.1"
# Below the ports that systems give to outgoing connections (Linux 32768, macOS 49152): there, a client that tries to
# reach a killed server may be given the server's own port, and so connect to itself and keep it from coming back.
_RANGE = range(16_384, 32_768)


def free_ports(number: int) -> list[int]:
    """So many ports of 127.0.0.1 that nobody listens at, or all there are. Another process may take one before you."""
    found: list[int] = []
    # Not `random`, which test tools seed: workers would all try the same ones.
    shuffled = secrets.SystemRandom().sample(_RANGE, len(_RANGE))
    for port in shuffled:
        if len(found) == number:
            break
        if _is_free(port):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
