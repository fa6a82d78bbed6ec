"""Writers that know nothing of each other: whatever comes first, and however batches meet, the newest row stays."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_store.config import OnlineConfig
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView
from feature_store.stores.online.keys import integer_keys
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.rows import CREATED, TIME, Row, keep
from feature_store.timestamps import BEGINNING, SECOND
from tests.redis_fixtures import config_of

HISTORIES = 10_000
WRITERS = 4
NOW = 1_533_124_800 * SECOND
VIEW = PlainView(
    name="plain",
    keys=(Field("customer", ValueType.INT64),),
    features=(Field("text", ValueType.STRING), Field("x", ValueType.FLOAT64)),
    source=Source(name="s", path="p", timestamp_field="ts", created_field="seen"),
)


def history(rng: random.Random) -> list[Row]:
    """The rows of one entity: few times, so that many tie, in event time, created time and both; some still to come."""
    near = [NOW - SECOND, NOW - 1, NOW, NOW, NOW + 1, NOW + SECOND] if rng.random() < 0.2 else [NOW - 2, NOW - 1, NOW]
    return [
        Row(
            rng.choice(near),
            rng.choice([BEGINNING, NOW - 1, NOW]),
            (rng.choice([None, "", "a", "é"]), rng.choice([None, 0.5, 1.5, float(rng.randrange(100))])),
        )
        for _ in range(rng.randint(1, 6))
    ]


def table_of(rows: list[tuple[int, Row]]) -> pa.Table:
    return pa.table(
        {
            "customer": pa.array([customer for customer, _ in rows], pa.int64()),
            TIME: pa.array([row.time for _, row in rows], pa.int64()),
            CREATED: pa.array([None if row.created == BEGINNING else row.created for _, row in rows], pa.int64()),
            "text": pa.array([row.values[0] for _, row in rows], pa.string()),
            "x": pa.array([row.values[1] for _, row in rows], pa.float64()),
        }
    )


@pytest.fixture(params=["embedded", "redis"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineConfig]:
    if request.param == "embedded":
        yield OnlineConfig(path=tmp_path)
        return
    server = request.getfixturevalue("redis_single")
    server.flush()
    yield config_of(server)


@pytest.mark.parametrize("refilled", [False, True])
def test_concurrent_writers_end_in_the_newest_row(config: OnlineConfig, refilled: bool) -> None:
    """Every entity is a history of its own; its rows are dealt to writers that all write at once, in batches of one to
    hundreds. With `refilled`, the view is replaced by nothing meanwhile: what writers add then is kept beside.
    """
    rng = random.Random(7)
    histories = {customer: history(rng) for customer in range(HISTORIES)}
    hands: list[list[tuple[int, Row]]] = [[] for _ in range(WRITERS)]
    for customer, rows in histories.items():
        for row in rows:
            rng.choice(hands).append((customer, row))
    stores = [PlainOnline(open_backend(config), "project", VIEW) for _ in range(WRITERS + 1)]
    stores[0].write(table_of([]), NOW)
    started, failed = threading.Barrier(WRITERS), []

    def write(store: PlainOnline, rows: list[tuple[int, Row]], seed: int) -> None:
        own = random.Random(seed)
        own.shuffle(rows)
        started.wait()
        at = 0
        try:
            while at < len(rows):
                size = own.choice([1, 1, 7, 300, 2_000])
                store.write(table_of(rows[at : at + size]), NOW)
                at += size
        except Exception as error:  # noqa: BLE001 - told to the test, in whose thread it fails
            failed.append(error)

    threads = [
        threading.Thread(target=write, args=(s, h, i)) for i, (s, h) in enumerate(zip(stores, hands, strict=False))
    ]
    if refilled:
        space = stores[-1].generations.begin()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    if refilled:
        stores[-1].generations.publish(space, BEGINNING, BEGINNING)
    entities = integer_keys(np.arange(HISTORIES))
    for asked in (NOW, NOW + 1, NOW + 2 * SECOND):
        read = stores[-1].read(["x", "text"], entities, np.full(HISTORIES, asked))
        found = list(zip(*read.block.lists(), strict=True))
        for customer, rows in histories.items():
            kept = [row for row in keep(rows, NOW) if row.time <= asked]
            expected = (kept[-1].values[1], kept[-1].values[0]) if kept else (None, None)
            assert found[customer] == expected, (customer, asked, rows)
    for store in stores:
        store.backend.close()
