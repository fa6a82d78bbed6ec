"""Redis' protocol: commands as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import hiredis


def pack(*words: str | bytes | int) -> bytes:
    """Any command."""
    return hiredis.pack_command(words)  # type: ignore[arg-type]


def mget(keys: Sequence[bytes]) -> bytes:
    """The command that asks for the values of keys.

    Keys of one kind have one length, so that whole runs of them are joined at once: several times faster than a
    general packer, which looks at every argument.
    """
    parts = [b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1)]
    for length, run in groupby(keys, len):
        head = b"$%d\r\n" % length
        parts += (head, (b"\r\n" + head).join(run), b"\r\n")
    return b"".join(parts)
