"""The Redis of `make redis-up` and `make redis-down`: a single server that stays when the command has ended.

It keeps its data (append-only file) and answers on 127.0.0.1 only; `infra/compose.yaml` is the same in Docker.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import redis

from infra.redis.node import PATIENCE, Node, PortTaken, ServerNotStarted, connect
from infra.redis.ports import HOST
from infra.redis.programs import ProgramMissing
from infra.redis.waiting import comes_true

_PID_FILE = "redis.pid"


class NotStopped(Exception):
    """A server that did not end; the text says which."""


def up(folder: Path, port: int) -> str:
    """Starts it with the data in `folder`, if it is not up; returns when it answers, with what to tell the person.

    Raises ServerNotStarted, ProgramMissing.
    """
    place = f"Redis at {HOST}:{port}, data in {folder}"
    if _is_up(folder, port):
        return f"{place}: is up already"
    home = folder.resolve()
    home.mkdir(parents=True, exist_ok=True)
    Node(home, port, ("appendonly yes", f'pidfile "{home / _PID_FILE}"'), guarded=False).start()
    return f"{place}: is up"


def down(folder: Path, port: int) -> str:
    """Stops it in good order, if it is up; its data stays. Returns what to tell the person. Raises NotStopped."""
    place = f"Redis at {HOST}:{port}, data in {folder}"
    if not _is_up(folder, port):
        return f"{place}: is not up"
    with closing(connect(port)) as client:
        client.shutdown(nosave=True)  # no snapshot beside the append-only file, which is complete
    if not comes_true(lambda: not _is_up(folder, port), PATIENCE):
        raise NotStopped(f"{place}: still runs {PATIENCE:g} s after it was told to stop")
    return f"{place}: is stopped"


def _is_up(folder: Path, port: int) -> bool:
    """Whether the one that answers at the port is the one that was started in this folder."""
    try:
        started = int((folder / _PID_FILE).read_text())
        with closing(connect(port)) as client:
            return client.info("server")["process_id"] == started
    except (FileNotFoundError, ValueError, redis.RedisError):
        return False


def main(words: Sequence[str]) -> int:
    """What the Makefile calls. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.redis.development", description="Redis for development")
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=Path("data/redis"), help="where its data stays")
    parser.add_argument("--port", type=int, default=6379)
    told = parser.parse_args(words)
    try:
        print(up(told.folder, told.port) if told.verb == "up" else down(told.folder, told.port))
    except PortTaken as error:
        print(f"{error}\nTake another one: make redis-up REDIS_PORT=6380", file=sys.stderr)
        return 1
    except (ServerNotStarted, ProgramMissing, NotStopped) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
