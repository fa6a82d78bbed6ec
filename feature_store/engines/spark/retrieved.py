"""The rows of a retrieval: their spine's columns and their stages' values come together, and are finished, on the
executors, a part of the spine's order at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.erasure import Erasures
from feature_store.engines.engine import Finish
from feature_store.engines.spark.carriers import decode
from feature_store.engines.spark.failures import crossing, spark_errors
from feature_store.engines.spark.session import Session
from feature_store.engines.spark.spine import Bounds, SparkSpine, open_spine
from feature_store.engines.spark.stages import Sizes, StageRun
from feature_store.engines.spark.windows import ROW
from feature_store.engines.spine import EVENT_TIMESTAMP, check_free
from feature_store.errors import RequestError, SpineError
from feature_store.plan.historical import HistoricalPlan

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_PART = re.compile(r"part-\d{5,}\.parquet")

#: Rows that an executor finishes at a time, and bytes of them.
CHUNK_ROWS, CHUNK_BYTES = 65_536, 64 << 20


@dataclass(frozen=True)
class Finishing:
    """Makes result rows of rows as they come from Spark: `row`, the carriers of the spine's columns, those of the
    working columns. Runs on executors.

    A spine column with the name of a working column is called otherwise until the rows are made.
    """

    spine: pa.Schema
    working: pa.Schema
    finish: Finish

    def __call__(self, rows: pa.Table) -> pa.Table:
        fields = [*self.spine, *self.working]
        columns = [decode(rows.column(i + 1), field.type) for i, field in enumerate(fields)]
        taken = set(self.working.names)
        called = [f"{name} of the spine" if name in taken else name for name in self.spine.names]
        schema = pa.schema(
            [field.with_name(name) for field, name in zip(fields, [*called, *self.working.names], strict=True)],
            metadata=self.spine.metadata,
        )
        made = self.finish(pa.Table.from_arrays(columns, schema=schema))
        made = made.rename_columns([*self.spine.names, *made.column_names[len(called) :]])
        for name in made.column_names[len(called) :]:
            check_free(name, self.spine)
        return made

    def nothing(self) -> pa.Table:
        """The result of no rows."""
        columns = [pa.nulls(0, field.type) for field in (*self.spine, *self.working)]
        return self(pa.Table.from_arrays([pa.nulls(0), *columns], [str(i) for i in range(len(columns) + 1)]))


@dataclass(frozen=True)
class SparkRetrieved:
    """A retrieval on Spark: it runs, anew, each time it is asked for its rows. What `erasures` leave out stays out."""

    session: Session
    root: Path
    plan: HistoricalPlan
    entity_df: Any
    finish: Finish
    sizes: Sizes
    erasures: Erasures

    @cached_property
    def _spine(self) -> SparkSpine:
        return open_spine(self.session.get(), self.entity_df, self.plan.request, self.root, self.erasures)

    @cached_property
    def _bounds(self) -> Bounds:
        return self._spine.bounds()

    @property
    def _doing(self) -> str:
        return f"retrieval of {', '.join(sorted({stage.view.name for stage in self.plan.joins}))} on Spark"

    def to_arrow(self) -> pa.Table:
        return pa.concat_tables(self._tables(at_once=True))

    def batches(self) -> Iterable[pa.RecordBatch]:
        for table in self._tables(at_once=False):
            yield from table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]

    def to_parquet(self, path: Path) -> Path:
        path = Path(path).absolute()
        _check_target(path)
        finishing, rows = self._finished(self._spine.schema.names)
        with _Replacing(path) as folder:
            if rows is None:
                pq.write_table(finishing.nothing(), folder / "part-00000.parquet", compression="zstd")
                return path
            with spark_errors(self._doing):
                written = rows.mapInArrow(_writing(finishing, str(folder)), "first BIGINT, name STRING").collect()
            _keep_only(folder, [name for _, name in sorted(map(tuple, written))])
        return path

    def _tables(self, at_once: bool) -> Iterator[pa.Table]:
        """The result in the spine's order; columns of a spine that lies in this process are joined to it here."""
        local = self._spine.table
        asked = [field.name for view in self.plan.request.on_demand for field in view.request]
        slim = [n for n in dict.fromkeys([EVENT_TIMESTAMP, *asked]) if n in self._spine.schema.names]
        finishing, rows = self._finished(self._spine.schema.names if local is None else slim)
        with spark_errors(self._doing):
            if rows is None:
                yield _joined(local, 0, finishing.nothing(), len(slim))
                return
            sent = rows.mapInArrow(_sending(finishing), "first BIGINT, rows BINARY")
            parts = sorted(sent.collect(), key=_first) if at_once else sent.toLocalIterator(prefetchPartitions=True)
            for first, content in parts:
                with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
                    yield _joined(local, first, stream.read_all(), len(slim))

    def _finished(self, columns: Sequence[str]) -> tuple[Finishing, DataFrame | None]:
        """What finishes rows with these columns of the spine, and those rows in order; None where there are none."""
        request, spine = self.plan.request, self._spine
        names = [name for stage in self.plan.joins for _, name in stage.outputs]
        if taken := [f for f in request.request_fields if f in names and f in columns]:
            raise SpineError(f"the spine's column '{taken[0]}' has the name of a stored feature as well; rename it.")
        types = [stage.view.feature_type(feature).arrow for stage in self.plan.joins for feature, _ in stage.outputs]
        spine_schema = pa.schema([spine.schema.field(name) for name in columns], metadata=spine.schema.metadata)
        working = pa.schema([pa.field(name, t) for name, t in zip(names, types, strict=True)])
        finishing = Finishing(spine_schema, working, self.finish)
        if not self._bounds.rows:
            return finishing, None
        with spark_errors(self._doing):
            return finishing, self._in_order(self._with_values(columns))

    def _with_values(self, columns: Sequence[str]) -> DataFrame:
        """The asking rows with their columns and every stage's outputs, by place."""
        keys = list(self.plan.request.keys)
        asking = self._spine.frame(())
        run = StageRun(self.session.get(), self.root, self.erasures, asking, keys, self._bounds, self.sizes)
        rows = self._spine.frame(columns)
        outputs: list[str] = []
        for number, stage in enumerate(self.plan.joins):
            made: dict[str, str] = {}
            if values := run.values(stage):
                names = [f"s{number}_{i}" for i in range(len(values.names))]
                rows = rows.join(values.frame.toDF(ROW, *names), ROW, "left")
                filled = (f"coalesce({name}, {empty})" for name, empty in zip(names, values.empty, strict=True))
                made = dict(zip(values.names, filled, strict=True))
            for feature, _ in stage.outputs:
                outputs.append(made.get(feature) or f"k{keys.index(stage.key_columns[feature])}")
        return rows.selectExpr(ROW, *(f"c{i}" for i in range(len(columns))), *outputs).toDF(
            ROW, *(f"f{i}" for i in range(len(columns) + len(outputs)))
        )

    def _in_order(self, rows: DataFrame) -> DataFrame:
        """The rows in parts of the spine's order, each sorted."""
        from pyspark.sql import functions as fn

        count = self._bounds.rows
        tasks = self.session.get().sparkContext.defaultParallelism
        parts = max(-(-count // self.sizes.part_rows), min(tasks, count * 10 // self.sizes.part_rows), 1)
        size = -(-count // parts)
        return rows.repartitionById(parts, fn.expr(f"CAST({ROW} div {size} AS INT)")).sortWithinPartitions(ROW)


def _first(row: Any) -> int:
    return row[0]


def _joined(local: pa.Table | None, first: int, made: pa.Table, slim: int) -> pa.Table:
    """Result rows beside the rows of a local spine from `first` on; `slim` of the columns made are the spine's."""
    if local is None:
        return made
    rows = local.slice(first, len(made))
    for field, column in list(zip(made.schema, made.columns, strict=True))[slim:]:
        check_free(field.name, local.schema)
        rows = rows.append_column(field, column)
    return rows


def _chunks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= CHUNK_ROWS or sum(b.nbytes for b in held) >= CHUNK_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _sending(finishing: Finishing) -> Any:
    """Finishes rows and sends each chunk as one value, so that its Arrow types pass through Spark unseen."""

    def sending(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for rows in _chunks(batches):
            made = finishing(rows)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, made.schema) as stream:
                stream.write_table(made)
            content = pa.array([sink.getvalue().to_pybytes()], pa.binary())
            yield pa.RecordBatch.from_pydict({"first": rows[ROW].slice(0, 1).combine_chunks(), "rows": content})

    return crossing(sending)


def _writing(finishing: Finishing, folder: str) -> Any:
    """Finishes rows and writes a task's to one file of a name that no other attempt has."""

    def writing(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        name, first, writer = f"{uuid.uuid4().hex}.parquet", None, None
        try:
            for rows in _chunks(batches):
                made = finishing(rows)
                if writer is None:
                    first = rows[ROW].slice(0, 1).combine_chunks()
                    writer = pq.ParquetWriter(os.path.join(folder, name), made.schema, compression="zstd")
                writer.write_table(made)
        finally:
            if writer is not None:
                writer.close()
        if first is not None:
            yield pa.RecordBatch.from_pydict({"first": first, "name": pa.array([name])})

    return crossing(writing)


# -- the folder of a result -----------------------------------------------------------------------------------------


def _check_target(path: Path) -> None:
    """A result takes the place of an earlier one (or of a file), and of no other folder."""
    if path.is_dir() and (other := [f.name for f in path.iterdir() if not _PART.fullmatch(f.name)]):
        raise RequestError("path", f"is a folder that holds other things than an earlier result: {path / other[0]}")


class _Replacing:
    """A temporary folder beside `path`; it takes the name when the block ends well, and goes otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")

    def __enter__(self) -> Path:
        _remove(self.temporary)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            _replace(self.temporary, self.path)
        _remove(self.temporary)


def _replace(folder: Path, path: Path) -> None:
    if not path.exists():
        os.replace(folder, path)
        return
    before = folder.with_name(folder.name + ".before")
    os.replace(path, before)
    os.replace(folder, path)
    before.unlink() if before.is_file() else _remove(before)


def _remove(folder: Path) -> None:
    """Removes a folder, also where a task that is being ended still writes into it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Names the files of a result in their order, and removes those of attempts that did not count."""
    for number, name in enumerate(names):
        os.replace(folder / name, folder / f"part-{number:05d}.parquet")
    for other in folder.iterdir():
        if not other.name.startswith("part-"):
            other.unlink()
