"""Views without an entity: one value for everybody, in history and online."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.aggregations.reference import Event, value
from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.stream.admission import admit
from feature_store.retrieval.historical import retrieve
from feature_store.retrieval.online import Prepared
from feature_store.stores.online.appending import Batch, Position, append
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.filling import bootstrap
from feature_store.stores.online.store import OnlineStore
from feature_store.timestamps import HOUR, MINUTE, SECOND

SUM = Aggregation(
    name="total", function=Function("sum"), column="x", window=HOUR, hop=5 * MINUTE, output=ValueType.INT64
)
EVENTS = Source(name="events", path="events.parquet", timestamp_field="at", push_source="pushed")
WINDOWED = WindowedView(name="traffic", keys=(), aggregations=(SUM,), source=EVENTS)
PLAIN = PlainView(name="latest", keys=(), features=(Field("x", ValueType.INT64),), source=EVENTS)
FEATURES = ["traffic:total", "latest:x"]


def test_a_view_without_keys_has_one_value_in_history_and_online(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = rng.integers(0, 6 * 3_600, 200) * SECOND
    times[:2] = 3 * HOUR
    values = np.arange(200)
    rows = pa.table({"at": pa.array(times, pa.int64()).cast(pa.timestamp("us")), "x": values})
    pq.write_table(rows.slice(0, 150), tmp_path / "events.parquet")
    definitions = Definitions(project="p", stamp="s", views={"traffic": WINDOWED, "latest": PLAIN}, services={})
    request, engine = definitions.resolve(FEATURES), DuckDBEngine(tmp_path)
    events = [Event(int(t), {"x": int(x)}) for t, x in zip(times[:150], values[:150], strict=True)]

    asked = [0, 3 * HOUR, 3 * HOUR + 1, 4 * HOUR + 7 * MINUTE, 7 * HOUR]
    spine = pa.table({"event_timestamp": pa.array(asked, pa.int64()).cast(pa.timestamp("us"))})
    history = retrieve(request, spine, engine)
    assert history["total"].to_pylist() == [value(events, SUM, t) for t in asked]
    assert history["x"].to_pylist()[1] == max(
        x for t, x in zip(times[:150], values[:150], strict=True) if t == 3 * HOUR
    )

    store = OnlineStore(EmbeddedBackend(tmp_path / "online"), "p")
    online = store.windowed(WINDOWED)
    bootstrap(online, engine.event_log(WINDOWED, None, 7 * HOUR), 4 * HOUR, 7 * HOUR)
    store.plain(PLAIN).replace(engine.newest_rows(PLAIN, None, 7 * HOUR, 4 * HOUR), 4 * HOUR)
    late = admit(WINDOWED, rows.slice(150), 7 * HOUR)
    append([Batch(online, late.keys, late.events)], 4 * HOUR, Position(0, 0))
    events += [Event(int(t), {"x": int(x)}) for t, x in zip(times[150:], values[150:], strict=True)]
    now = [4 * HOUR, 4 * HOUR + 1, 5 * HOUR + 3 * MINUTE, 7 * HOUR]
    answer = Prepared(request, store, engine).read({}, now)
    assert answer.to_dict()["total"] == [value(events, SUM, t) for t in now]
    bootstrap(online, engine.event_log(WINDOWED, 9 * HOUR, 10 * HOUR), 9 * HOUR, 10 * HOUR)
    assert Prepared(definitions.resolve(FEATURES[:1]), store).read({}, 9 * HOUR).to_dict()["total"] == [None]
