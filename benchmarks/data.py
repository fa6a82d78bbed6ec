"""Generated Parquet files: the same bytes from the same recipe, a row group at a time however large they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.files import replacing

ROW_GROUP = 1_000_000
FEATURES = tuple(f"f{number}" for number in range(10))
_START = 1_704_067_200_000_000  # 2024-01-01, in microseconds
_SPAN = 60 * 86_400_000_000
_TIME = pa.timestamp("us", tz="UTC")
#: In the files' metadata, beside the recipe: raised when a recipe gives other rows than before.
_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Rows of one kind: `features` (ten doubles of full precision), `events` (an amount and columns nobody asks for)
    or `training` (a key and a time). They spread evenly over 60 days and over the entities, but for the share `hot`
    that belongs to the first one.
    """

    kind: str
    rows: int
    entities: int
    in_time_order: bool = False
    hot: float = 0.0
    seed: int = 0

    def write(self, path: Path) -> None:
        """Writes the file unless the same recipe wrote it before."""
        made_by = {b"benchmarks": json.dumps({"version": _VERSION, **asdict(self)}).encode()}
        if path.is_file() and (pq.read_schema(path).metadata or {}).get(b"benchmarks") == made_by[b"benchmarks"]:
            return
        chunks = self._chunks()
        first = next(chunks)
        with (
            replacing(path) as temporary,
            pq.ParquetWriter(temporary, first.schema.with_metadata(made_by), compression="zstd") as writer,
        ):
            writer.write_table(first, row_group_size=ROW_GROUP)
            for chunk in chunks:
                writer.write_table(chunk, row_group_size=ROW_GROUP)

    def _chunks(self) -> Iterator[pa.Table]:
        """A table for each row group. In time order each has its own slice of the 60 days."""
        groups = -(-self.rows // ROW_GROUP)
        for group in range(groups):
            draw = np.random.default_rng([self.seed, group, list(_KINDS).index(self.kind)])
            rows = min(ROW_GROUP, self.rows - group * ROW_GROUP)
            slices, place = (groups, group) if self.in_time_order else (1, 0)
            start, end = (_START + _SPAN * number // slices for number in (place, place + 1))
            times = draw.integers(start, end, rows)
            if self.in_time_order:
                times.sort()
            yield _KINDS[self.kind](self._keys(draw, rows), pa.array(times).cast(_TIME), draw)

    def _keys(self, draw: np.random.Generator, rows: int) -> pa.Array:
        """Entity numbers far apart, as real keys are: nobody may use them as array positions."""
        number = draw.integers(0, self.entities, rows)
        if self.hot:
            number[draw.random(rows) < self.hot] = 0
        return pa.array(number * 7_919 + 10_000_019)


def _feature_rows(keys: pa.Array, times: pa.Array, draw: np.random.Generator) -> pa.Table:
    values = {name: draw.standard_normal(len(keys)) for name in FEATURES}
    return pa.table({"entity_id": keys, "event_time": times, **values})


def _events(keys: pa.Array, times: pa.Array, draw: np.random.Generator) -> pa.Table:
    channels = pa.array(["card", "web", "app", "phone", "branch"])
    return pa.table(
        {
            "entity_id": keys,
            "event_time": times,
            "merchant_id": draw.integers(0, 50_000, len(keys)),
            "amount": np.round(draw.gamma(2.0, 25.0, len(keys)), 2),
            "channel": channels.take(pa.array(draw.integers(0, len(channels), len(keys)))),
            "balance": np.round(draw.normal(1_000.0, 300.0, len(keys)), 2),
        }
    )


def _training_rows(keys: pa.Array, times: pa.Array, _: np.random.Generator) -> pa.Table:
    return pa.table({"entity_id": keys, "event_timestamp": times})


_KINDS: dict[str, Callable[[pa.Array, pa.Array, np.random.Generator], pa.Table]] = {
    "features": _feature_rows,
    "events": _events,
    "training": _training_rows,
}


def read_through(path: Path) -> None:
    """Reads a file once, so that it lies in the page cache for everybody alike."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
