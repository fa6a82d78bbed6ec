"""What the cases of the online bench stand on: Redis, the sides with their stores filled, and the rounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import redis

from benchmarks.cores import Cores, cores, pin
from benchmarks.online_data import EventLog, Truth, View, write_parquet
from benchmarks.online_sides import HOST, Place
from benchmarks.online_tasks import Figures
from benchmarks.workers import Worker
from infra.redis.servers import single

PACKED, PACKED_LOG = "benchmarks.online_limits:PackedRows", "benchmarks.online_packed_log:PackedLog"
BARE_MGET = "benchmarks.online_limits:BareMget"
FEAST = "benchmarks.online_peer:Feast"
#: Entities of a view, of one that is written to, of one that Feast fills for its memory alone, and of a log.
_ENTITIES, _WRITTEN, _WEIGHED, _LOG_ENTITIES = 100_000, 20_000, 20_000, 1_000
_FEWEST, _FEWEST_IN_A_LOG = 1_000, 100

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a run is asked for. `isochron` is its side's name, None without it; `seconds` is a contender's turn."""

    folder: Path
    isochron: str | None
    peer: bool
    rounds: int
    scale: float
    seconds: float


class RedisServer:
    """One Redis for some of the cases, on its core, and the sides' places around it."""

    def __init__(self, options: Options, name: str, found: Cores, stack: ExitStack) -> None:
        # Scripts compare bytes as text: in another locale than C their order would not be that of numbers.
        os.environ["LC_ALL"] = "C"
        self.port = stack.enter_context(single()).port
        self.client = stack.enter_context(redis.Redis(HOST, self.port))
        self._options, self._name, self._cores = options, name, found
        self.move(found.redis)

    @property
    def version(self) -> str:
        return self.client.info("server")["redis_version"]

    def move(self, core: int | None) -> None:
        """Pins the server to another core."""
        pin(self.client.info("server")["process_id"], core)

    def place(self, side: str) -> Place:
        """A side's place; its folder does not exist before the side makes it."""
        folder = self._options.folder / f"{self._name}-{side.rpartition(':')[2].lower()}"
        return Place(self.port, folder, self._options.folder / "data")

    def worker(self, factory: str, side: str, *arguments: Any) -> Worker:
        """A worker on the client's core; the factory gets the side's name, its place, and the arguments."""
        return Worker(self._cores.client, factory, side, self.place(side), *arguments)

    def fill(self, side: str, method: str, what: View | EventLog) -> int:
        """Has a side store something; how many bytes of memory Redis took for it."""
        before = self.client.info("memory")["used_memory"]
        with Worker(self._cores.client, side, self.place(side)) as worker:
            worker.call(method, what)
        return self.client.info("memory")["used_memory"] - before


class Bench:
    """Everything a case may ask for, made when it is first asked for, gone when `stack` is closed."""

    def __init__(self, options: Options, stack: ExitStack, say: Say) -> None:
        self.options, self.say, self.cores = options, say, cores()
        self._stack = stack
        self._filled: set[tuple[str, str]] = set()
        self._logs: dict[int, LogStore] = {}
        shutil.rmtree(options.folder, ignore_errors=True)

    @property
    def plain(self) -> View:
        return View("plain", 50, self._entities(_ENTITIES))

    @property
    def written(self) -> View:
        return View("written", 50, self._entities(_WRITTEN))

    def wide(self, side: str) -> View:
        """The view whose memory is measured; a part of it where filling is slow."""
        return View("wide", 70, self._entities(_WEIGHED if side == FEAST else _ENTITIES))

    def _entities(self, number: int) -> int:
        return max(_FEWEST, round(number * self.options.scale))

    @cached_property
    def redis(self) -> RedisServer:
        """The server of the plain views."""
        return self.new_redis("plain")

    @cached_property
    def truth(self) -> Truth:
        """Of the view `plain`."""
        return Truth(self.plain.rows())

    def new_redis(self, name: str, stack: ExitStack | None = None) -> RedisServer:
        return RedisServer(self.options, name, self.cores, stack or self._stack)

    def sides(self, limit: str | None = PACKED) -> dict[str, str]:
        """The sides that take part, by what they stand for, Isochron first."""
        options = self.options
        found = {"isochron": options.isochron, "limit": limit, "peer": FEAST if options.peer else None}
        return {stands_for: side for stands_for, side in found.items() if side}

    def fill(self, side: str, view: View) -> None:
        """Has a side store a view of the shared Redis, once."""
        if (side, view.name) not in self._filled:
            self.say(f"filling {view.name}, {view.entities:,} entities: {side}")
            self.write_rows(view)
            self.redis.fill(side, "fill", view)
            self._filled.add((side, view.name))

    def write_rows(self, view: View) -> None:
        """The file that the view's source names."""
        write_parquet(view.rows().table(), self.options.folder / "data" / f"{view.name}.parquet")

    def log(self, per_day: int) -> LogStore:
        """The filled stores of a log."""
        if per_day not in self._logs:
            entities = max(_FEWEST_IN_A_LOG, round(_LOG_ENTITIES * self.options.scale))
            self._logs[per_day] = LogStore(self, EventLog(per_day, entities))
        return self._logs[per_day]

    def rounds(self, turns: Mapping[str, Callable[[], Figures]]) -> Runs:
        """All take their turn in every round; each round another one starts."""
        runs: Runs = {name: [] for name in turns}
        names = list(turns)
        for number in range(self.options.rounds):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                runs[name].append(turns[name]())
        return runs


Runs = dict[str, list[Figures]]


class LogStore:
    """A log in a Redis of its own: raw events packed, and Isochron's windows. `bytes_of` is the memory by side."""

    def __init__(self, bench: Bench, log: EventLog) -> None:
        self.log, self.redis = log, bench.new_redis(log.name)
        self.bytes_of: dict[str, int] = {}
        if bench.options.isochron:
            write_parquet(log.table(recent=False), bench.options.folder / "data" / f"{log.name}.parquet")
        for side in filter(None, (PACKED_LOG, bench.options.isochron)):
            bench.say(f"filling {log.name}, {log.entities:,} entities: {side}")
            self.bytes_of[side] = self.redis.fill(side, "fill_windows", log)
