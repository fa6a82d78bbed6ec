"""The cases of the online bench: who runs, what is checked before anything is timed, what is measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from benchmarks import bare_asgi, online_json
from benchmarks.cores import pin
from benchmarks.http_load import ask, run_load
from benchmarks.http_servers import Server, free_port, running
from benchmarks.online_bench import BARE_MGET, PACKED, PACKED_LOG, Bench, LogStore, Runs
from benchmarks.online_data import Values
from benchmarks.online_sides import difference
from benchmarks.online_tasks import Figures
from benchmarks.report import Goal
from benchmarks.workers import Worker

READS, WRITES = "benchmarks.online_tasks:Reads", "benchmarks.online_tasks:Writes"
#: How far sums and means of floats may lie apart, as docs/values.md allows.
_TOLERANCE = 1e-9
#: Requests whose answers are compared before any is timed.
_CHECKED = 5
_CONNECTIONS = 16
#: Different requests that go over the connections.
_REQUESTS = 64
#: A turn over HTTP, in turns of one process: a slow server must answer often enough.
_HTTP_TURNS = 3.0
_CALL = {"p50": "us", "p99": "us", "cpu": "us"}
_WRITE = {"rate": "rows/s", "p99": "us", "cpu": "us"}
_HTTP = {"rate": "req/s", "p50": "ms", "p99": "ms", "cpu": "us"}


class CaseFailed(Exception):
    """A case without a figure of Isochron: it gave no answer, or a wrong one."""


@dataclass
class Outcome:
    """The rounds of `isochron`, `limit` and `peer`, as far as they ran, and of others by name; what is to be noted."""

    runs: Runs
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One comparison. `units` are of the quantities it measures, `goals` by quantity."""

    name: str
    run: Callable[[Bench], Outcome]
    units: Mapping[str, str]
    goals: Mapping[str, tuple[Goal, ...]] = field(default_factory=dict)


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    found = [
        Case("read_1", partial(_read, rows=1), _CALL, {"p50": (Goal(1.5, "limit"),)}),
        Case("read_100", partial(_read, rows=100), _CALL, {"p50": (Goal(1.3, "limit"),)}),
        Case("read_100_nulls", partial(_read, rows=100, sparse=True), _CALL),
        Case("sdk_1", partial(_read, rows=1, opener="sdk_reader"), _CALL),
        Case("sdk_100", partial(_read, rows=100, opener="sdk_reader"), _CALL, {"p50": (Goal(10, "peer", "faster"),)}),
        Case("http_1", partial(_http, rows=1), _HTTP, {"rate": (Goal(15, "peer", "at least"),)}),
        Case("http_100", partial(_http, rows=100), _HTTP, {"rate": (Goal(50, "peer", "at least"),)}),
        Case("write_1", partial(_write, rows=1), _WRITE, {"rate": (Goal(0.7, "limit", "at least"),)}),
        Case("write_1000", partial(_write, rows=1_000), _WRITE, {"rate": (Goal(0.7, "limit", "at least"),)}),
        Case("memory", _memory, {"bytes": "B/entity"}, {"bytes": (Goal(1.05, "limit"),)}),
    ]
    for per_day in (5, 200):
        name = f"windows_{per_day}"
        found.append(Case(f"{name}_memory", partial(_log_memory, per_day=per_day), {"bytes": "kB/entity"}, _SIX_KB))
        for rows in (1, 100):
            for path in ("numpy", "compiled"):
                run = partial(_windows, per_day=per_day, rows=rows, compiled=path == "compiled")
                found.append(Case(f"{name}_{rows}_{path}", run, _CALL, {"p50": _window_goals(per_day, rows, path)}))
    return found


_SIX_KB = {"bytes": (Goal(6.0),)}


def _window_goals(per_day: int, rows: int, path: str) -> tuple[Goal, ...]:
    """Against the bare MGET; against the packed string where its events are many: for one entity a round trip is most
    of either.
    """
    times = 2.0 if path == "numpy" else 1.2 if rows == 1 else 1.3
    packed = (Goal(12, "peer", "faster"),) if per_day == 200 and rows == 100 else ()
    return (Goal(times, "limit"), *packed)


# -- plain views ----------------------------------------------------------------------------------------------------


def _read(bench: Bench, rows: int, opener: str = "reader", sparse: bool = False) -> Outcome:
    """Reads in one process."""
    view, sides = bench.plain, bench.sides()
    requests = view.sparse_requests(rows) if sparse else view.requests(rows)
    openers = {name: (side, opener if name == "isochron" else "reader") for name, side in sides.items()}
    openers["bare socket"] = (PACKED, "bare_reader")
    for side in sides.values():
        bench.fill(side, view)
    bench.redis.move(bench.cores.redis)
    with ExitStack() as stack:
        workers = _workers(
            stack, {n: (bench.redis, READS, side, op, (view,), requests) for n, (side, op) in openers.items()}
        )
        notes = _check_reads(workers, requests[:_CHECKED], bench.truth.answer)
        return Outcome(_rounds(bench, workers), notes)


def _workers(stack: ExitStack, asked: Mapping[str, tuple]) -> dict[str, Worker]:
    return {n: stack.enter_context(server.worker(factory, *rest)) for n, (server, factory, *rest) in asked.items()}


def _rounds(bench: Bench, workers: Mapping[str, Worker]) -> Runs:
    return bench.rounds({n: partial(w.call, "measure", bench.options.seconds) for n, w in workers.items()})


def _check_reads(
    workers: Mapping[str, Worker],
    requests: list[list[int]],
    right: Callable[[list[int]], Values],
    tolerance: float = 0.0,
) -> list[str]:
    notes: list[str] = []
    for keys in requests:
        notes += _check({name: worker.call("answer", keys) for name, worker in workers.items()}, right(keys), tolerance)
    return notes[:1]


def _check(answers: Mapping[str, Values], right: Values, tolerance: float = 0.0) -> list[str]:
    """Notes where a peer's values differ. Raises CaseFailed where another's do: nobody may measure a wrong answer."""
    notes = []
    for name, answer in answers.items():
        if wrong := difference(answer, right, tolerance):
            if name != "peer":
                raise CaseFailed(f"values of {name} differ: {wrong}")
            notes.append(f"the peer's values differ: {wrong}")
    return notes


def _write(bench: Bench, rows: int) -> Outcome:
    """Writes in one process, to a view of their own."""
    view, sides = bench.written, bench.sides()
    for side in sides.values():
        bench.fill(side, view)
    bench.redis.move(bench.cores.redis)
    with ExitStack() as stack:
        workers = _workers(stack, {n: (bench.redis, WRITES, side, view, rows) for n, side in sides.items()})
        notes = []
        for name, worker in workers.items():
            answer, right = worker.call("newest_wins")
            notes += _check({name: answer}, right)
        return Outcome(_rounds(bench, workers), notes)


def _memory(bench: Bench) -> Outcome:
    """What Redis takes for an entity, each side in a server of its own."""
    runs, notes = {}, []
    for name, side in bench.sides().items():
        view = bench.wide(side)
        bench.say(f"filling {view.name}, {view.entities:,} entities: {side}")
        bench.write_rows(view)
        with ExitStack() as stack:
            server = bench.new_redis("wide", stack)
            runs[name] = [{"bytes": server.fill(side, "fill", view) / view.entities}]
        notes.append(f"{name}: {view.entities:,} entities x {view.features} features")
    return Outcome(runs, notes)


# -- over HTTP ------------------------------------------------------------------------------------------------------


def _http(bench: Bench, rows: int) -> Outcome:
    """Servers with one worker each, 16 connections."""
    view = bench.plain
    asked = view.requests(rows, _REQUESTS)
    bodies = [online_json.request(view, keys) for keys in asked]
    right = online_json.answer(bench.truth, asked[0])
    file = bench.options.folder / f"answer-{rows}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(right)
    with ExitStack() as stack:
        servers, notes = {}, []
        for name, side in bench.sides(limit=None).items():
            bench.fill(side, view)
            port = free_port()
            with Worker(bench.cores.client, side, bench.redis.place(side)) as worker:
                command = worker.call("server", view, port)
            servers[name] = stack.enter_context(running(command, port, bench.cores.server, bodies[0]))
        port = free_port()
        bare = running(bare_asgi.command(file, port), port, bench.cores.server, bodies[0])
        servers["limit"] = stack.enter_context(bare)
        for name, server in servers.items():
            notes += _check_json(name, ask(server.address, server.request(bodies[0])), right)
        # The load comes from this process.
        pin(os.getpid(), bench.cores.client)
        bench.redis.move(bench.cores.redis_beside_server)
        seconds = bench.options.seconds * _HTTP_TURNS
        runs = bench.rounds({name: partial(_load, server, bodies, seconds) for name, server in servers.items()})
    notes += [f"load generator busy for {_busy(turns):.0%} of the {name}'s time" for name, turns in runs.items()]
    return Outcome(runs, [*notes, f"an answer of {len(right):,} bytes"])


def _check_json(name: str, answer: bytes, right: bytes) -> list[str]:
    wrong = online_json.difference(answer, right)
    if wrong and name != "peer":
        raise CaseFailed(f"the answer of {name} differs: {wrong}")
    return [f"the peer's answer differs: {wrong}"] if wrong else []


def _load(server: Server, bodies: list[bytes], seconds: float) -> Figures:
    """A turn: answers a second, milliseconds of an answer, the server's processor time an answer in microseconds."""
    requests = [server.request(body) for body in bodies]
    before = server.cpu_seconds()
    load = run_load(server.address, requests, _CONNECTIONS, seconds)
    cpu = (server.cpu_seconds() - before) / max(load.answers, 1)
    p50, p99 = (load.percentile(percent) * 1e3 for percent in (50, 99))
    return {"rate": load.rate, "p50": p50, "p99": p99, "cpu": cpu * 1e6, "busy": load.cpu / load.seconds}


def _busy(turns: list[Figures]) -> float:
    return max(turn["busy"] for turn in turns)


# -- windows --------------------------------------------------------------------------------------------------------


def _windows(bench: Bench, per_day: int, rows: int, compiled: bool) -> Outcome:
    """Windowed reads as of one time, in one process. The limit fetches what Isochron fetches and decodes nothing."""
    store, isochron = bench.log(per_day), bench.options.isochron
    log, server = store.log, store.redis
    requests = log.requests(rows)
    asked: dict[str, tuple] = {"peer": (server, READS, PACKED_LOG, "window_reader", (log, False), requests)}
    if isochron:
        asked["isochron"] = (server, READS, isochron, "window_reader", (log, compiled), requests)
    with ExitStack() as stack:
        workers = _workers(stack, asked)
        checked = [*requests[:_CHECKED], [log.unknown, *requests[0]]]
        _check_reads(workers, checked, partial(workers["peer"].call, "answer"), _TOLERANCE)
        notes = ["peer: raw events in one packed string by hand, Feast has no windows online"]
        if isochron:
            fetched = _fetched_keys(bench, store, isochron, requests)
            workers["limit"] = stack.enter_context(server.worker(READS, BARE_MGET, "reader", (), fetched))
            size = workers["limit"].call("size", fetched[0])
            notes.append(f"limit: MGET of {len(fetched[0]):,} keys, {size / rows:,.0f} bytes an entity")
        return Outcome(_rounds(bench, workers), notes)


def _fetched_keys(bench: Bench, store: LogStore, isochron: str, requests: list[list[int]]) -> list[list[bytes]]:
    """For each request the keys in Redis that Isochron fetches."""
    with Worker(bench.cores.client, isochron, store.redis.place(isochron)) as worker:
        return [worker.call("window_keys", store.log, keys) for keys in requests]


def _log_memory(bench: Bench, per_day: int) -> Outcome:
    store = bench.log(per_day)
    per_entity = {side: taken / store.log.entities / 1e3 for side, taken in store.bytes_of.items()}
    stands_for = {bench.options.isochron: "isochron", PACKED_LOG: "peer"}
    runs = {stands_for[side]: [{"bytes": taken}] for side, taken in per_entity.items()}
    return Outcome(runs, ["peer: raw events in one packed string by hand"])
