"""The embedded engine: DuckDB reads, filters, joins, sorts and spills; windows are folded by the shared algebra."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, EventLog, Events, evaluate
from feature_store.definitions.aggregation import reach
from feature_store.definitions.erasure import Erasures, LoadErasures, no_erasures
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.engines.duckdb.matching import NONE, Matches, distinct, match
from feature_store.engines.duckdb.scan import CREATED, ROW, TIME, Scan, quote, scan
from feature_store.engines.duckdb.sorting import Chunk, SortedRows, numbers
from feature_store.engines.duckdb.spine import SortedSpine
from feature_store.engines.engine import ROW_TIME, Reading, Spine
from feature_store.errors import ConfigError, MemoryLimitReached, SourceError
from feature_store.plan.historical import AsOfStage, WindowStage
from feature_store.stores.offline.parquet import open_source
from feature_store.timestamps import BEGINNING, arrow_timestamps

#: A view without keys has one entity; it joins on this constant.
_NO_KEY = "__only"

#: What DuckDB may hold in memory where the repository does not say; beyond it, it spills to disk.
DEFAULT_MEMORY_LIMIT = "4GB"


Worked = TypeVar("Worked")


class DuckDBEngine:
    """Runs plans on one machine. `root` is the repository's folder, where relative source paths start.

    `memory_limit` is DuckDB's budget; beside it lie the spine, the result, and a chunk of sorted rows. `erasures` says
    whose records are left out, each time something is read.
    """

    def __init__(self, root: Path, memory_limit: str | None = None, erasures: LoadErasures = no_erasures) -> None:
        self._root, self._erasures = root, erasures
        self._memory_limit = memory_limit or DEFAULT_MEMORY_LIMIT
        self._spill = tempfile.mkdtemp(prefix="isochron-")
        # Results are ordered by us where order matters. Times are read as microseconds, which no session zone shifts.
        settings = {"preserve_insertion_order": "false", "temp_directory": self._spill}
        try:
            self._connection = duckdb.connect(config={**settings, "memory_limit": self._memory_limit})
        except duckdb.Error as error:
            shutil.rmtree(self._spill, ignore_errors=True)
            raise ConfigError(f"memory_limit '{memory_limit}' is no size; write it like 4GB or 500MB.") from error

    def close(self) -> None:
        self._connection.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    @cached_property
    def _threads(self) -> int:
        return self._connection.sql("SELECT current_setting('threads')").fetchall()[0][0]

    @contextmanager
    def _session(self, view: StoredView, reading: Scan) -> Iterator[duckdb.DuckDBPyConnection]:
        """A session with temporary tables of its own, among them those that a scan names; what DuckDB cannot read or
        convert is our error.
        """
        try:
            with self._connection.cursor() as session:
                for name, table in reading.erased.items():
                    _create(session, name, table)
                yield session
        except duckdb.OutOfMemoryException as error:
            raise MemoryLimitReached(view.name, self._memory_limit) from error
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            # A stream of results passes DuckDB's errors on as Arrow's.
            reason = str(error).strip().splitlines()[0]
            if "Out of Memory" in reason:
                raise MemoryLimitReached(view.name, self._memory_limit) from error
            raise SourceError(f"view '{view.name}': source '{view.source.name}' could not be read: {reason}") from error

    def windows(self, stage: WindowStage, spine: Spine) -> dict[str, pa.Array]:
        if not len(spine) or not stage.aggregations:
            return {a.name: pa.nulls(0, a.output.arrow) for a in stage.aggregations}
        columns = _folded(stage)
        reading = self._window_scan(stage, *_bounds(spine))
        asked = SortedSpine.of(spine, stage.key_columns)
        rows = SortedRows(stage.view, reading, tuple(reading.names[c] for c in columns), asked.entities)

        def fold(chunk: Chunk) -> dict[str, pa.Array]:
            here = asked.between(chunk.first, chunk.last)
            events = _events(chunk, columns, reading.names, stage.knowledge_time)
            return evaluate(events, stage.aggregations, here.entity - chunk.first, here.times)

        with self._session(stage.view, reading) as session:
            _register_entities(session, stage.view, reading, asked)
            parts = list(self._side_by_side(fold, rows.chunks(session)))
        return {a.name: asked.restored([part[a.name] for part in parts]) for a in stage.aggregations}

    def as_of(self, stage: AsOfStage, spine: Spine) -> dict[str, pa.Array]:
        types = {f.name: f.type for f in stage.view.features}
        if not len(spine):
            return {n: pa.nulls(0, types[n].arrow) for n in stage.features} | {ROW_TIME: pa.nulls(0, pa.int64())}
        reading = self._scan(stage.view, types, *_as_of_range(stage, *_bounds(spine)))
        asked = SortedSpine.of(spine, stage.key_columns)
        with self._session(stage.view, reading) as session:
            _register_entities(session, stage.view, reading, asked)
            places = SortedRows(stage.view, reading, (ROW,), asked.entities)
            found = Matches.joined(self._side_by_side(partial(_matched, stage, asked), places.chunks(session)))
            if len(found.ties):
                found = _untied(session, reading, types, found)
            live = found.times >= asked.times - stage.view.ttl if stage.view.ttl else True
            rows = np.where(live, found.rows, NONE)
            values = _values(session, reading, {name: types[name] for name in stage.features}, rows)
        if changed := reading.files.changed():
            raise SourceError(
                f"view '{stage.view.name}': {changed} of source '{stage.view.source.name}' was replaced while it was "
                "read; run it again."
            )
        return {name: asked.restored([array]) for name, array in (values | {ROW_TIME: found.row_times()}).items()}

    def event_log(self, view: WindowedView, start: int | None, end: int) -> EventLog:
        columns = view.column_types()
        erasures = self._erasures()
        reading = self._scan(view, columns, start, end - 1, erasures)
        names = [reading.names[k.name] for k in view.keys] or [_NO_KEY]
        with self._session(view, reading) as session:
            keys = ", ".join(map(quote, names)) if view.keys else f"0 AS {_NO_KEY}"
            order = ", ".join(map(quote, names))
            session.execute(f"""
                CREATE TEMP TABLE entity AS SELECT *, row_number() OVER (ORDER BY {order}) - 1 AS __entity
                FROM (SELECT DISTINCT {keys} FROM ({reading.admitted}))""")
            table = session.sql("SELECT * EXCLUDE (__entity) FROM entity ORDER BY __entity").to_arrow_table()
            chunk = SortedRows(view, reading, tuple(reading.names[c] for c in columns), len(table)).whole(session)
            skipped = session.sql(reading.rejected).fetchall()[0][0]
        events = _events(chunk, columns, reading.names, False)
        keys_only = table.select(names if view.keys else []).rename_columns([k.name for k in view.keys])
        return EventLog(keys_only, events, skipped, erasures)

    def newest_rows(self, view: PlainView, start: int | None, end: int, now: int) -> pa.Table:
        types = {f.name: f.type for f in view.features}
        waiting = f"CASE WHEN {TIME} > {now} THEN {TIME} END"
        reading = self._scan(view, types, start, end)
        keys = ", ".join(quote(reading.names[k.name]) for k in view.keys) or "1"
        with self._session(view, reading) as session:
            rows = session.sql(f"""
                SELECT * EXCLUDE ({ROW}) FROM ({reading.admitted})
                QUALIFY row_number() OVER (
                    PARTITION BY {keys}, {waiting} ORDER BY {TIME} DESC, {newest_first(reading, types)}) = 1
                ORDER BY {keys}, {TIME}""").to_arrow_table()
        return _renamed(rows, reading)

    def moments(self, view: StoredView, start: int, end: int) -> pa.Table:
        reading = self._scan(view, {}, start, end)
        names = ", ".join([quote(TIME), *(quote(reading.names[k.name]) for k in view.keys)])
        with self._session(view, reading) as session:
            found = session.sql(f"SELECT DISTINCT {names} FROM ({reading.admitted}) ORDER BY {names}")
            return _renamed(found.to_arrow_table(), reading)

    def reading(self, stage: AsOfStage | WindowStage, first: int | None, last: int | None) -> Reading:
        if isinstance(stage, WindowStage):
            found = self._window_scan(stage, first, last)
            sql = SortedRows(stage.view, found, tuple(found.names[c] for c in _folded(stage)), 1).sql
        else:
            types = {f.name: f.type for f in stage.view.features}
            found = self._scan(stage.view, {n: types[n] for n in stage.features}, *_as_of_range(stage, first, last))
            sql = SortedRows(stage.view, found, (ROW,), 1).sql + _gathering(found, stage.features)
        in_all = len(open_source(stage.view.source, self._root).files)
        return Reading(sql, found.files.files, in_all, found.columns, found.rows)

    def _side_by_side(self, work: Callable[[Chunk], Worked], chunks: Iterator[Chunk]) -> Iterator[Worked]:
        """The work on each chunk, in order, on as many threads as DuckDB has, and as many chunks in memory."""
        with ThreadPoolExecutor(self._threads) as pool:
            under_way: deque[Future[Worked]] = deque()
            for chunk in chunks:
                under_way.append(pool.submit(work, chunk))
                if len(under_way) > self._threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _window_scan(self, stage: WindowStage, first: int | None, last: int | None) -> Scan:
        """Reads from where the oldest window begins to just before the last time asked for."""
        start = None if first is None else reach(stage.aggregations, first)
        return self._scan(stage.view, _folded(stage), start, None if last is None else last - 1)

    def _scan(
        self,
        view: StoredView,
        columns: Mapping[str, ValueType | None],
        start: int | None,
        end: int | None,
        erasures: Erasures | None = None,
    ) -> Scan:
        """The scan of a view's source, without what is erased by now (or by these erasures)."""
        return scan(view, columns, self._root, start, end, erasures or self._erasures())


def _renamed(rows: pa.Table, reading: Scan) -> pa.Table:
    """Rows of a scan with the names that the view has for them."""
    called = {sql_name: name for name, sql_name in reading.names.items()}
    return rows.rename_columns([called.get(name, name) for name in rows.column_names])


def _bounds(spine: Spine) -> tuple[int, int]:
    return int(spine.times.min()), int(spine.times.max())


def _as_of_range(stage: AsOfStage, first: int | None, last: int | None) -> tuple[int | None, int | None]:
    """The event times that can matter: up to the last time asked for, and not older than the ttl of the first one."""
    prunes = stage.view.ttl and not stage.expired and first is not None
    return (first - stage.view.ttl if prunes and first is not None else None), last


def _folded(stage: WindowStage) -> dict[str, ValueType | None]:
    types = stage.view.column_types()
    return {a.column: types.get(a.column) for a in stage.aggregations if a.column != "*"}


def _register_entities(session: duckdb.DuckDBPyConnection, view: StoredView, reading: Scan, asked: SortedSpine) -> None:
    """Table `entity`: the distinct keys of a spine with their numbers."""
    _create(session, "entity", asked.keys.rename_columns([*(reading.names[k.name] for k in view.keys), "__entity"]))


def _create(session: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    session.register("given", table)
    session.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM given")


def _gathering(reading: Scan, features: Iterable[str]) -> str:
    columns = ", ".join([ROW, *(quote(reading.names[f]) for f in features)])
    return f"\nSELECT {columns} FROM ({reading.admitted}) JOIN wanted USING ({ROW})"


def _events(
    chunk: Chunk, columns: Mapping[str, ValueType | None], names: Mapping[str, str], knowledge_time: bool
) -> Events:
    """Sorted rows as events of the chunk's entities, numbered from 0."""
    rows, times = chunk.rows, chunk.times
    has_created = CREATED in rows.column_names
    created = numbers(rows, CREATED) if has_created else np.broadcast_to(np.int64(BEGINNING), len(rows))
    return Events(
        offsets=np.searchsorted(chunk.entity, np.arange(chunk.first, chunk.last + 2)),
        times=times,
        created=created,
        columns={name: _folded_column(rows, names[name], wanted) for name, wanted in columns.items()},
        known=np.where(created == BEGINNING, times, created) if knowledge_time else None,
    )


def _folded_column(rows: pa.Table, name: str, wanted: ValueType | None) -> Column:
    column_type = wanted or of_arrow(rows.schema.field(name).type)
    assert column_type is not None
    return Column.of(_column(rows, name, column_type), column_type)


def _matched(stage: AsOfStage, asked: SortedSpine, chunk: Chunk) -> Matches:
    here = asked.between(chunk.first, chunk.last)
    events = _events(chunk, {}, {}, stage.knowledge_time)
    return match(events, numbers(chunk.rows, ROW), here.entity - chunk.first, here.times)


def _untied(
    session: duckdb.DuckDBPyConnection, reading: Scan, types: Mapping[str, ValueType], found: Matches
) -> Matches:
    """Ties of event time and created time go to the greatest values, by feature name."""
    session.register("tied", pa.table({"tie": found.ties, ROW: found.tied_rows}))
    winners = session.sql(f"""
        SELECT tie, {ROW} FROM ({reading.admitted}) JOIN tied USING ({ROW})
        QUALIFY row_number() OVER (PARTITION BY tie ORDER BY {newest_first(reading, types)}) = 1""").to_arrow_table()
    return found.untied(numbers(winners, "tie"), numbers(winners, ROW))


def _values(
    session: duckdb.DuckDBPyConnection, reading: Scan, types: Mapping[str, ValueType], rows: np.ndarray
) -> dict[str, pa.Array]:
    """The values of features in the rows at these places of a source, null where there is no row."""
    if not types:
        return {}
    wanted = distinct(rows[rows != NONE])
    session.register("wanted", pa.table({ROW: wanted}))
    table = session.sql(_gathering(reading, types)).to_arrow_table()
    order = np.argsort(numbers(table, ROW))
    place = np.searchsorted(wanted, rows)
    missing = rows == NONE
    index = pa.array(np.append(order, 0)[np.where(missing, len(wanted), place)], mask=missing)
    return {name: _column(table, reading.names[name], t).take(index) for name, t in types.items()}


def newest_first(reading: Scan, types: Mapping[str, ValueType]) -> str:
    """The order in which rows of one event time are preferred: created time, then the row's values by feature name."""
    columns = [CREATED]
    for name in sorted(types):
        columns += _order_keys(quote(reading.names[name]), types[name])
    return ", ".join(f"{column} DESC NULLS LAST" for column in columns)


def _order_keys(column: str, value_type: ValueType) -> list[str]:
    """What orders the values of a column as the contract does: null lowest, also inside lists, and -0.0 below 0.0."""
    if not value_type.is_list:
        return [column, f"NOT signbit({column})"] if value_type.is_float else [column]
    sign = ", 'sign': NOT signbit(x)" if value_type.element.is_float else ""
    return [f"list_transform({column}, lambda x: {{'present': x IS NOT NULL, 'value': x{sign}}})"]


def _column(table: pa.Table, name: str, value_type: ValueType) -> pa.Array:
    column = table[name].combine_chunks()
    if value_type is ValueType.TIMESTAMP:
        return arrow_timestamps(column.cast(pa.int64()))
    return column.cast(value_type.arrow)
