"""Redis' protocol: commands as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import hiredis


def pack(*words: str | bytes | int) -> bytes:
    """Any command."""
    return hiredis.pack_command(words)  # type: ignore[arg-type]


def mget(keys: Sequence[bytes]) -> bytes:
    """The command that asks for the values of keys."""
    return command([b"MGET"], keys)


def command(*words: Sequence[bytes]) -> bytes:
    """A command of many words, many of them as long as the one before.

    Keys of one kind have one length, and so have rows, so that whole runs of them are joined at once: several times
    faster than a general packer, which looks at every argument.
    """
    parts = [b"*%d\r\n" % sum(map(len, words))]
    for some in words:
        for length, run in groupby(some, len):
            head = b"$%d\r\n" % length
            parts += (head, (b"\r\n" + head).join(run), b"\r\n")
    return b"".join(parts)
