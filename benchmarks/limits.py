"""The best versions a good engineer writes by hand for one task and one file, with no contract to keep beyond it.

They know what the general engine has to find out: the columns' types, that keys and times are never null, that no two
rows of an entity share a time. Every one returns the training rows in their order, and the features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Run = Callable[..., pa.Table]

_HOUR = 3_600_000_000
_DAY = 24 * _HOUR
#: Window and hop of the backfills, in microseconds: the hops are those that a view has unless told.
_WINDOWS = ((_HOUR, _HOUR // 12), (_DAY, _HOUR), (7 * _DAY, _HOUR), (30 * _DAY, _DAY))
_THREADS = os.cpu_count() or 1


# -- point-in-time joins ------------------------------------------------------------------------------------------


def join_polars() -> Run:
    """An as-of join of Polars over a lazy scan, sorted where the file is not."""
    import polars as pl

    def run(
        rows: str, spine: str, features: Sequence[str], in_time_order: bool, ttl_days: int | None = None
    ) -> pa.Table:
        scan = pl.scan_parquet(rows).select("entity_id", "event_time", *features)
        asked = pl.scan_parquet(spine).with_row_index("row").sort("event_timestamp")
        return (
            asked.join_asof(
                scan.set_sorted("event_time") if in_time_order else scan.sort("event_time"),
                left_on="event_timestamp",
                right_on="event_time",
                by="entity_id",
                tolerance=timedelta(days=ttl_days) if ttl_days else None,
                check_sortedness=False,
            )
            .sort("row")
            .select("entity_id", "event_timestamp", *features)
            .collect()
            .to_arrow()
        )

    return run


def join_duckdb() -> Run:
    """An as-of join of DuckDB, straight over both files."""
    import duckdb

    def run(
        rows: str, spine: str, features: Sequence[str], in_time_order: bool, ttl_days: int | None = None
    ) -> pa.Table:
        live = f"event_time >= event_timestamp - INTERVAL {ttl_days} DAY" if ttl_days else "TRUE"
        values = ", ".join(f"CASE WHEN {live} THEN {name} END AS {name}" for name in features)
        with duckdb.connect(config={"preserve_insertion_order": "false"}) as connection:
            return connection.sql(f"""
                SELECT asked.entity_id, event_timestamp, {values}
                FROM read_parquet('{spine}', file_row_number = true) asked
                ASOF LEFT JOIN read_parquet('{rows}') stored
                ON asked.entity_id = stored.entity_id AND event_timestamp >= event_time
                ORDER BY asked.file_row_number""").to_arrow_table()

    return run


def join_merge() -> Run:
    """Keys and times grouped by a counting sort, one bisection a training row, then only the rows found are taken from
    the ten columns, row group after row group.
    """
    from benchmarks import kernels

    def run(
        rows: str, spine: str, features: Sequence[str], in_time_order: bool, ttl_days: int | None = None
    ) -> pa.Table:
        table = pq.read_table(spine)
        keys, asked, asked_times = _asked(table)
        entity, times, numbers = _numbered(rows, keys)
        if not in_time_order:
            entity, times, numbers = _by_time(entity, times, numbers)
        offsets = kernels.group_offsets(entity, len(keys))
        times, numbers = kernels.grouped(entity, offsets, times, numbers)
        at = kernels.newest_at(offsets, times, asked, asked_times)
        if ttl_days:
            at[(at >= 0) & (times[at] < asked_times - ttl_days * _DAY)] = -1
        found = np.where(at >= 0, numbers[at] if len(numbers) else -1, -1)
        for name, values in _taken(rows, found, features).items():
            table = table.append_column(name, pa.array(values, mask=found < 0))
        return table

    return run


def _taken(rows: str, found: np.ndarray, features: Sequence[str]) -> dict[str, np.ndarray]:
    """The features of the rows with these numbers in the file; anything where the number is -1."""
    import polars as pl

    order = np.argsort(found)
    taken = {name: np.zeros(len(found)) for name in features}
    starts = _row_group_starts(rows)
    bounds = np.searchsorted(found[order], starts)
    scan = pl.scan_parquet(rows).select(features)
    for group, (start, end) in enumerate(pairwise(starts)):
        here = order[bounds[group] : bounds[group + 1]]
        columns = scan.slice(start, end - start).collect()
        for name, values in taken.items():
            values[here] = columns[name].to_numpy()[found[here] - start]
    return taken


# -- windows ------------------------------------------------------------------------------------------------------


def windows_merge() -> Run:
    """The events of the asked entities grouped by a counting sort, then scanned together with the sorted training
    rows: back from each of them, or in one sweep where the windows overlap much.
    """
    from benchmarks import kernels

    windows, hops = (np.array(numbers) for numbers in zip(*_WINDOWS, strict=True))

    def run(rows: str, spine: str, in_time_order: bool) -> pa.Table:
        table = pq.read_table(spine)
        keys, asked, asked_times = _asked(table)
        entity, times, amounts = _numbered(rows, keys, "amount")
        if not in_time_order:
            entity, times, amounts = _by_time(entity, times, amounts)
        offsets = kernels.group_offsets(entity, len(keys))
        times, amounts = kernels.grouped(entity, offsets, times, amounts)
        order = np.argsort(asked_times)
        asked_offsets = kernels.group_offsets(asked, len(keys))
        asked_times, asked_rows = kernels.grouped(asked[order], asked_offsets, asked_times[order], order)
        count = np.empty((len(table), len(windows)), np.int64)
        total, top = np.empty(count.shape), np.empty(count.shape)
        shares = np.searchsorted(offsets, np.linspace(0, offsets[-1], 4 * _THREADS + 1))
        shares[0], shares[-1] = 0, len(keys)

        def scan(share: tuple[int, int]) -> None:
            events, questions = (offsets, times, amounts), (asked_offsets, asked_times, asked_rows)
            kernels.scan_windows(*share, *events, *questions, windows, hops, count, total, top)

        _in_threads(scan, pairwise(shares))
        return _with_windows(table, count, total, top)

    return run


def _with_windows(table: pa.Table, count: np.ndarray, total: np.ndarray, top: np.ndarray) -> pa.Table:
    with np.errstate(invalid="ignore"):
        features = {"count": count, "sum": total, "mean": total / count, "max": top}
    for function, values in features.items():
        for number, (window, _) in enumerate(_WINDOWS):
            empty = None if function == "count" else count[:, number] == 0
            column = pa.array(np.ascontiguousarray(values[:, number]), mask=empty)
            table = table.append_column(_window_name(function, window), column)
    return table


def windows_duckdb() -> Run:
    """A range join of DuckDB over the longest window, with a filtered aggregate for each of the four."""
    import duckdb

    lows = ", ".join(
        f"epoch_us(event_timestamp) - {window} - (epoch_us(event_timestamp) - {window}) % {hop} AS low_{window}"
        for window, hop in _WINDOWS
    )
    values = ", ".join(
        f"{sql} FILTER (WHERE time >= low_{window}) AS {_window_name(function, window)}"
        for function, sql in (("count", "count(time)"), *((name, f"{name}(amount)") for name in ("sum", "mean", "max")))
        for window, _ in _WINDOWS
    )
    query = f"""
        WITH asked AS (
            SELECT *, epoch_us(event_timestamp) AS until, {lows} FROM read_parquet('{{spine}}', file_row_number = true)
        ), events AS (
            SELECT entity_id, epoch_us(event_time) AS time, amount FROM read_parquet('{{rows}}')
            WHERE entity_id IN (SELECT entity_id FROM asked)
        )
        SELECT any_value(asked.entity_id) AS entity_id, any_value(event_timestamp) AS event_timestamp, {values}
        FROM asked LEFT JOIN events
        ON asked.entity_id = events.entity_id AND time < until AND time >= low_{_WINDOWS[-1][0]}
        GROUP BY asked.file_row_number ORDER BY asked.file_row_number"""

    def run(rows: str, spine: str, in_time_order: bool) -> pa.Table:
        with duckdb.connect(config={"preserve_insertion_order": "false"}) as connection:
            return connection.sql(query.format(rows=rows, spine=spine)).to_arrow_table()

    return run


def _window_name(function: str, window: int) -> str:
    return f"{function}_amount_{window // 1_000_000}s"


# -- reading by hand ----------------------------------------------------------------------------------------------


def _asked(table: pa.Table) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """The distinct keys of the training rows, each row's key as a place in them, and each row's microseconds."""
    encoded = table["entity_id"].combine_chunks().dictionary_encode()
    return encoded.dictionary, np.asarray(encoded.indices), _micros(table["event_timestamp"])


def _numbered(rows: str, keys: pa.Array, column: str | None = None) -> list[np.ndarray]:
    """Of the file's rows with one of these keys: the key's place, the microseconds, and a column or the row number."""
    import polars as pl

    table = pl.scan_parquet(rows).select("entity_id", "event_time", *([column] if column else [])).collect()
    entity, times = table["entity_id"].to_numpy(), table["event_time"].to_physical().to_numpy()
    others = table[column].to_numpy() if column else np.arange(len(table), dtype=np.int32)

    def number(share: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(*share)
        place = pc.index_in(pa.array(entity[part]), keys)
        if not place.null_count:
            return np.asarray(place), times[part], others[part]
        known = np.asarray(place.is_valid())
        return np.asarray(place.fill_null(-1))[known], times[part][known], others[part][known]

    parts = _in_threads(number, pairwise(np.linspace(0, len(table), _THREADS + 1).astype(np.int64)))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _by_time(*arrays: np.ndarray) -> list[np.ndarray]:
    """Entities, times and values in the order of time."""
    order = np.argsort(arrays[1])
    return [array[order] for array in arrays]


def _row_group_starts(rows: str) -> np.ndarray:
    metadata = pq.read_metadata(rows)
    return np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])


def _micros(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.combine_chunks().cast(pa.int64()))


def _in_threads(work: Callable[[Any], Any], shares: Any) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, shares))
