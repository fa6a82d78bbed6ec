"""The embedded engine: DuckDB reads, filters, joins and sorts; windows are folded by the shared algebra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.aggregations.events import Column, EventLog, Events, evaluate
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.engines.duckdb.scan import CREATED, TIME, quote, scan
from feature_store.engines.engine import ROW_TIME, Spine
from feature_store.errors import SourceError
from feature_store.plan.historical import AsOfStage, WindowStage
from feature_store.timestamps import BEGINNING, arrow_timestamps

#: A view without keys has one entity; it joins on this constant.
_NO_KEY = "__only"


class DuckDBEngine:
    """Runs plans on one machine. `root` is the repository's folder, where relative source paths start."""

    def __init__(self, root: Path, memory_limit: str | None = None) -> None:
        self._root = root
        # Results are ordered by us where order matters. Times are read as microseconds, which no session zone shifts.
        settings = {"preserve_insertion_order": "false"}
        if memory_limit:
            settings["memory_limit"] = memory_limit
        self._connection = duckdb.connect(config=settings)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _session(self, view: StoredView) -> Iterator[duckdb.DuckDBPyConnection]:
        """A session with temporary tables of its own; what DuckDB cannot read or convert is our error."""
        try:
            with self._connection.cursor() as session:
                yield session
        except duckdb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise SourceError(f"view '{view.name}': source '{view.source.name}' could not be read: {reason}") from error

    def windows(self, stage: WindowStage, spine: Spine) -> dict[str, pa.Array]:
        if not len(spine) or not stage.aggregations:
            return {a.name: pa.array([], a.output.arrow) for a in stage.aggregations}
        types = stage.view.column_types()
        columns = {a.column: types[a.column] for a in stage.aggregations if a.column != "*"}
        reaches = [a.tail(int(spine.times.min())) for a in stage.aggregations]
        start = None if None in reaches else min(r for r in reaches if r is not None)
        with self._session(stage.view) as session:
            entity = self._entities(session, stage.key_columns, spine)
            events = self._events(session, stage.view, columns, start, int(spine.times.max()))
        return evaluate(events, stage.aggregations, entity, spine.times)

    def as_of(self, stage: AsOfStage, spine: Spine) -> dict[str, pa.Array]:
        types = {f.name: f.type for f in stage.view.features}
        with self._session(stage.view) as session:
            entity = self._entities(session, stage.key_columns, spine)
            asked = pa.table({"__row": np.arange(len(spine)), "__entity": entity, "__as_of": spine.times})
            session.register("asked", asked)
            latest_known = int(spine.times.max(initial=BEGINNING))
            result = session.sql(self._as_of_sql(stage.view, types, latest_known)).to_arrow_table()
        values = {name: _column(result, name, types[name]) for name in stage.features}
        return values | {ROW_TIME: result[TIME].combine_chunks()}

    def _as_of_sql(self, view: PlainView, types: Mapping[str, ValueType], end: int) -> str:
        live = f"rows.{TIME} >= asked.__as_of - {view.ttl}" if view.ttl else "TRUE"
        values = ", ".join(f"CASE WHEN {live} THEN rows.{quote(n)} END AS {quote(n)}" for n in types)
        rows = f"SELECT entity.__entity, source.* FROM ({scan(view, types, self._root).admitted}) source {_join(view)}"
        return f"""
            WITH rows AS (
                SELECT * FROM ({rows}) WHERE {TIME} <= {end}
                QUALIFY row_number() OVER (PARTITION BY __entity, {TIME} ORDER BY {newest_first(types)}) = 1
            )
            SELECT rows.{TIME}{", " + values if values else ""}
            FROM asked ASOF LEFT JOIN rows ON asked.__entity = rows.__entity AND asked.__as_of >= rows.{TIME}
            ORDER BY asked.__row"""

    def event_log(self, view: WindowedView, start: int | None, end: int) -> EventLog:
        reading = scan(view, view.column_types(), self._root)
        names = _key_names(view)
        with self._session(view) as session:
            keys = ", ".join(map(quote, names)) if view.keys else f"0 AS {_NO_KEY}"
            where = f"{TIME} < {end}" + (f" AND {TIME} >= {start}" if start is not None else "")
            _number(session, names, f"SELECT DISTINCT {keys} FROM ({reading.admitted}) WHERE {where}")
            table = session.sql("SELECT * EXCLUDE (__entity) FROM entity ORDER BY __entity").to_arrow_table()
            events = self._events(session, view, view.column_types(), start, end)
            skipped = _scalar(session, reading.rejected)
        return EventLog(table.select([k.name for k in view.keys]), events, skipped)

    def newest_rows(self, view: PlainView, start: int | None, end: int, now: int) -> pa.Table:
        types = {f.name: f.type for f in view.features}
        keys = ", ".join(quote(k.name) for k in view.keys) or "1"
        where = f"{TIME} <= {end}" + (f" AND {TIME} >= {start}" if start is not None else "")
        waiting = f"CASE WHEN {TIME} > {now} THEN {TIME} END"
        with self._session(view) as session:
            return session.sql(f"""
                SELECT * FROM ({scan(view, types, self._root).admitted}) WHERE {where}
                QUALIFY row_number() OVER (
                    PARTITION BY {keys}, {waiting} ORDER BY {TIME} DESC, {newest_first(types)}) = 1
                ORDER BY {keys}, {TIME}""").to_arrow_table()

    def _entities(self, session: duckdb.DuckDBPyConnection, key_columns: Mapping[str, str], spine: Spine) -> np.ndarray:
        """Numbers the distinct keys of a spine (table `entity`); each row's number, -1 where a key is null."""
        columns = {name: spine.keys[column] for name, column in key_columns.items()} or {
            _NO_KEY: pa.array(np.zeros(len(spine), np.int64))
        }
        session.register("spine", pa.table({**columns, "__row": np.arange(len(spine))}))
        keys = ", ".join(map(quote, columns))
        present = " AND ".join(f"{quote(n)} IS NOT NULL" for n in columns)
        _number(session, columns, f"SELECT DISTINCT {keys} FROM spine WHERE {present}")
        numbered = session.sql(
            f"SELECT coalesce(__entity, -1) AS __entity FROM spine LEFT JOIN entity USING ({keys}) ORDER BY __row"
        )
        return np.asarray(numbered.to_arrow_table()["__entity"].combine_chunks())

    def _events(
        self,
        session: duckdb.DuckDBPyConnection,
        view: WindowedView,
        columns: Mapping[str, ValueType],
        start: int | None,
        end: int,
    ) -> Events:
        """The events of the numbered entities, sorted into folding order."""
        since = f" AND {TIME} >= {start}" if start is not None else ""
        names = "".join(f", {quote(c)}" for c in columns)
        table = session.sql(f"""
            SELECT entity.__entity, {TIME}, coalesce({CREATED}, {BEGINNING}) AS {CREATED}{names}
            FROM ({scan(view, columns, self._root).admitted}) source {_join(view)}
            WHERE {TIME} < {end}{since}
            ORDER BY entity.__entity, {TIME}, {CREATED}""").to_arrow_table()
        entity = np.asarray(table["__entity"].combine_chunks())
        entities = _scalar(session, "SELECT count(*) FROM entity")
        return Events(
            offsets=np.searchsorted(entity, np.arange(entities + 1)),
            times=np.asarray(table[TIME].combine_chunks()),
            created=np.asarray(table[CREATED].combine_chunks()),
            columns={name: Column.of(_column(table, name, t), t) for name, t in columns.items()},
        )


def _scalar(session: duckdb.DuckDBPyConnection, query: str) -> int:
    return session.sql(query).fetchall()[0][0]


def _number(session: duckdb.DuckDBPyConnection, keys: Iterable[str], distinct: str) -> None:
    """Table `entity`: the distinct keys with a number each, in key order."""
    order = ", ".join(map(quote, keys))
    session.execute(
        f"CREATE TEMP TABLE entity AS SELECT *, row_number() OVER (ORDER BY {order}) - 1 AS __entity FROM ({distinct})"
    )


def newest_first(types: Mapping[str, ValueType]) -> str:
    """The order in which rows of one event time are preferred: created time, then the row's values by feature name."""
    return ", ".join([f"{CREATED} DESC NULLS LAST", *(f"{quote(n)} DESC NULLS LAST" for n in sorted(types))])


def _key_names(view: WindowedView) -> list[str]:
    return [k.name for k in view.keys] or [_NO_KEY]


def _join(view: PlainView | WindowedView) -> str:
    """Joins a source to the numbered entities; a view without keys has the one entity."""
    if not view.keys:
        return "CROSS JOIN entity"
    return f"JOIN entity USING ({', '.join(quote(k.name) for k in view.keys)})"


def _column(table: pa.Table, name: str, value_type: ValueType) -> pa.Array:
    column = table[name].combine_chunks()
    if value_type is ValueType.TIMESTAMP:
        return arrow_timestamps(column.cast(pa.int64()))
    return column.cast(value_type.arrow)
