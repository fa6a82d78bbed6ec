"""Redis' protocol for the one command that has to be fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


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
