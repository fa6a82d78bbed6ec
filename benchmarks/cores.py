"""Which core runs what: a round trip on a loopback swings severalfold when client and server share one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TASKS = "/proc/{pid}/task"


@dataclass(frozen=True)
class Cores:
    """The cores of clients, Redis and HTTP servers. With two, Redis moves: to the server's core while clients in one
    process are measured, to the client's while a server is. With one, or where processes cannot be pinned (then they
    are None), all share.
    """

    client: int | None
    redis: int | None
    redis_beside_server: int | None
    server: int | None

    def told(self) -> str:
        """For the notes of a result."""
        if self.client is None:
            return "processes not pinned"
        return (
            f"cores: client {self.client}, Redis {self.redis}; "
            f"over HTTP client {self.client}, Redis {self.redis_beside_server}, server {self.server}"
        )


def cores() -> Cores:
    """Of those that this process may use."""
    if not hasattr(os, "sched_getaffinity") or not Path(_TASKS.format(pid="self")).is_dir():
        return Cores(None, None, None, None)
    found = sorted(os.sched_getaffinity(0))
    client, redis, server = (found * 3)[:3] if len(found) < 3 else found[:3]
    if len(found) == 2:
        return Cores(client, redis, client, redis)
    return Cores(client, redis, redis, server)


def pin(pid: int, core: int | None) -> None:
    """Moves all threads of a process to a core; what it starts later stays there too. Without a core does nothing."""
    if core is None:
        return
    for task in Path(_TASKS.format(pid=pid)).iterdir():
        os.sched_setaffinity(int(task.name), {core})


def cpu_seconds(session: int) -> float:
    """Processor time that the processes of a session have used, children that ended included; Linux only (else 0)."""
    tick = os.sysconf("SC_CLK_TCK")
    total = 0
    for facts in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold anything; what follows it are single words.
            words = facts.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[3]) == session:
            total += sum(int(word) for word in words[11:15])
    return total / tick
