"""One Redis process: configured by a file in a folder of its own, started, killed, paused, gone with its starter."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.redis.guard import Guard
from infra.redis.ports import HOST
from infra.redis.programs import find
from infra.redis.waiting import comes_true

#: Seconds a server has to answer after its start, a group of them to find together, and one to end when asked to.
PATIENCE = 30.0
_FAREWELL = 5.0
#: Seconds for an answer to one question whether it is ready, which is asked again.
_PROBE = 0.2
_LOG_LINES = 12
#: What every server of ours is told. A later line wins, so that a caller can say otherwise.
_USUAL = (
    f"bind {HOST}",
    "daemonize no",
    'save ""',
    "appendonly no",
    "maxmemory-policy noeviction",
    # A stopped master would otherwise wait for its replicas.
    "shutdown-timeout 0",
)
_SENTINEL_USUAL = (f"bind {HOST}", "daemonize no")


class ServerNotStarted(Exception):
    """A server that ended, or did not answer in time. `log` is what it wrote last, and part of the text."""

    def __init__(self, server: str, problem: str, log: str) -> None:
        self.server, self.problem, self.log = server, problem, log
        super().__init__(f"{server} {problem}. Its last words:\n{log or '(none)'}")


class PortTaken(ServerNotStarted):
    """Another process listens at the port."""


def connect(port: int, **options: Any) -> redis.Redis:
    """A client of what listens at that port of 127.0.0.1, which tries once, for 5 s. Close it."""
    return redis.Redis(HOST, port, **{"socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0), **options})


class Node:
    """A Redis server, or with `sentinel` a Sentinel, at `port` of 127.0.0.1; `folder` holds its file, log and data.

    `lines` are directives as redis.conf writes them. `access` is what redis-py needs to come in as one who may do
    everything (user, TLS). The process dies with this one unless `guarded` is False. Not safe for use by two threads at
    a time.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        lines: Sequence[str] = (),
        *,
        sentinel: bool = False,
        access: Mapping[str, Any] | None = None,
        guarded: bool = True,
    ) -> None:
        self.port = port
        self._folder, self._sentinel, self._access, self._guarded = folder, sentinel, dict(access or {}), guarded
        self._configuration, self._log = folder / "redis.conf", folder / "server.log"
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        folder.mkdir(parents=True, exist_ok=True)
        usual = _SENTINEL_USUAL if sentinel else _USUAL
        # Written here and not at each start: a Sentinel keeps in it what it knows.
        self._configuration.touch(mode=0o600)
        self._configuration.write_text("\n".join((*usual, f"port {port}", f'dir "{folder.resolve()}"', *lines, "")))

    def __str__(self) -> str:
        return f"{'Sentinel' if self._sentinel else 'Redis'} at {HOST}:{self.port}"

    def runs(self) -> bool:
        """Whether it has a process, which may be paused."""
        if self._process and self._process.poll() is not None:
            self._forget()
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The number of its process; None when it has none."""
        return self._process.pid if self._process else None

    def connect(self, **options: Any) -> redis.Redis:
        """A client of this very process that may do everything and tries once. Close it."""
        return connect(self.port, **{**self._access, **options})

    def command(self, *words: str | int) -> Any:
        """The answer to one command, given by one who may do everything."""
        with closing(self.connect(decode_responses=True)) as client:
            return client.execute_command(*words)

    def info(self, seconds: float = 1.0) -> dict[str, Any]:
        """What INFO says. Raises redis.RedisError when the server does not answer within so many seconds."""
        with closing(self.connect(decode_responses=True, socket_timeout=seconds)) as client:
            return client.info()

    def start(self) -> None:
        """Starts the process, with the data that its folder holds; returns when it answers. Raises ServerNotStarted."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Starts the process without waiting for it. Nothing happens if it runs."""
        if self.runs():
            return
        program = find("redis-server")
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [program.path, str(self._configuration), *(["--sentinel"] if self._sentinel else [])],
                env=program.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for who started it, who then ends it
            )
        if self._guarded:
            self._guard = Guard(self._process.pid)

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        """Returns when the process answers and has loaded its data. Raises ServerNotStarted and ends it otherwise."""
        if comes_true(lambda: not self.runs() or self.answers(), seconds) and self.runs():
            return
        ended, log = not self.runs(), self.log()
        self.kill()
        if "Address already in use" in log:
            raise PortTaken(str(self), "found its port taken by another process", log)
        raise ServerNotStarted(str(self), "ended at its start" if ended else f"gave no answer in {seconds:g} s", log)

    def answers(self) -> bool:
        """Whether this very process, and not another one at its port, answers and has loaded its data."""
        try:
            info = self.info(_PROBE)
        except redis.RedisError:
            return False
        return info["process_id"] == self.pid and not info.get("loading")

    def log(self, lines: int = _LOG_LINES) -> str:
        """What it wrote last since its last start."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-lines:])

    def kill(self) -> None:
        """Ends the process at once, as a crash would (SIGKILL). Nothing happens if there is none."""
        self._signal(signal.SIGKILL)
        self._reap(None)

    def stop(self) -> None:
        """Ends the process in good order; one that does not end in 5 s is killed."""
        self.ask_to_end()
        if not self._reap(_FAREWELL):
            self.kill()

    def ask_to_end(self) -> None:
        """Asks the process to end in good order (SIGTERM), also a paused one; `stop` then waits for it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Ends it if it runs, starts it at the same port with the data its folder holds. Raises ServerNotStarted."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """The process stands still (SIGSTOP): its port takes connections, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The process goes on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self.runs():
            self._process.send_signal(number)

    def _reap(self, seconds: float | None) -> bool:
        """Waits for the end of a process that was told to end; False if it still runs after so many seconds."""
        if not self._process:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._forget()
        return True

    def _forget(self) -> None:
        """To be called as soon as the process is reaped: its number may become another's."""
        if self._guard:
            self._guard.dismiss()
        self._process = self._guard = None
