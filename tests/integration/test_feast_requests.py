"""Requests through Feast's unmodified SDK that are unusual, incomplete or wrong: what Feast's own Redis store does with
them, and what ours does. Where the two differ the test says why.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RequestSource,
    ValueType,
)
from feast.data_source import PushMode
from feast.errors import (
    FeatureNameCollisionError,
    FeatureServiceNotFoundException,
    FeatureViewNotFoundException,
    RequestDataNotFoundInEntityRowsException,
)
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.type_map import feast_value_type_to_python_type
from feast.types import Array, Bool, Float64, Int64, String, UnixTimestamp

from feature_store.adapters.feast import aggregate, windowed_view
from feature_store.adapters.feast.refusal import Refused
from feature_store.errors import RequestError
from infra.redis.groups import SingleServer

pytestmark = pytest.mark.filterwarnings("ignore")

NOW = pd.Timestamp.now(tz="UTC").floor("s")

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)
flag = Entity(name="flag", join_keys=["flagged"], value_type=ValueType.BOOL)
other = Entity(name="other", join_keys=["other_id"], value_type=ValueType.INT64)
rows = FileSource(name="rows", path="rows.parquet", timestamp_field="at", created_timestamp_column="made")
plain = FeatureView(
    name="plain",
    entities=[user],
    source=PushSource(name="pushed", batch_source=rows),
    schema=[Field(name="user_id", dtype=Int64), Field(name="x", dtype=Float64), Field(name="n", dtype=Int64)],
)
pair = FeatureView(
    name="pair",
    entities=[shop, user],
    source=rows,
    ttl=timedelta(hours=1),
    schema=[Field(name="shop_id", dtype=String), Field(name="user_id", dtype=Int64), Field(name="y", dtype=Float64)],
)
by_shop = FeatureView(
    name="by_shop",
    entities=[shop],
    source=rows,
    schema=[Field(name="shop_id", dtype=String), Field(name="x", dtype=Float64)],
)
by_flag = FeatureView(
    name="by_flag",
    entities=[flag],
    source=rows,
    schema=[Field(name="flagged", dtype=Bool), Field(name="z", dtype=Float64)],
)
of_other = FeatureView(
    name="of_other",
    entities=[other],
    source=rows,
    schema=[Field(name="other_id", dtype=Int64), Field(name="w", dtype=Float64)],
)
switched_off = FeatureView(
    name="switched_off",
    entities=[user],
    source=rows,
    schema=[Field(name="user_id", dtype=Int64), Field(name="off", dtype=Float64)],
    enabled=False,
)
asked = RequestSource(name="asked", schema=[Field(name="amount", dtype=Float64)])


@on_demand_feature_view(sources=[plain[["x"]], asked], mode="python", schema=[Field(name="total", dtype=Float64)])
def computed(inputs: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(inputs["x"], inputs["amount"], strict=True)
    return {"total": [None if x is None else x + amount for x, amount in pairs]}


service = FeatureService(name="service", features=[plain, by_shop[["x"]].with_name("shop")])
roles = {"user_id": "payer_id"}
both = FeatureService(name="both", features=[plain[["n"]], plain[["n"]].with_name("payer").with_join_key_map(roles)])
precomputed = FeatureService(name="precomputed", features=[plain[["n"]]], precompute_online=True)
VIEWS = [plain, pair, by_shop, by_flag, of_other, switched_off, computed]
OBJECTS = [user, shop, flag, other, rows, asked, *VIEWS, service, both, precomputed]


@dataclass(frozen=True)
class Stores:
    """The same definitions and rows on both; ours in its embedded backend."""

    ours: FeatureStore
    feast: FeatureStore

    @property
    def both(self) -> tuple[FeatureStore, FeatureStore]:
        return self.ours, self.feast

    def values(self, features: Any, entities: Any, **options: Any) -> dict[str, list[Any]]:
        """What both say, where they say the same."""
        ours, feast = (store.get_online_features(features, entities, **options).to_dict() for store in self.both)
        assert ours == feast
        return ours

    def error(self, kind: type[Exception], features: Any, entities: Any, **options: Any) -> tuple[str, str]:
        """What both say, where both raise an error of that type."""
        said = []
        for store in self.both:
            with pytest.raises(kind) as raised:
                store.get_online_features(features, entities, **options)
            said.append(str(raised.value))
        return said[0], said[1]


@pytest.fixture(scope="module")
def stores(redis_single: SingleServer, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    root = tmp_path_factory.mktemp("requests")
    ours = {
        "offline_store": {"type": "feature_store.adapters.feast.IsochronOfflineStore"},
        "online_store": {"type": "feature_store.adapters.feast.IsochronOnlineStore"},
        "batch_engine": {"type": "feature_store.adapters.feast.IsochronEngine"},
    }
    redis = {"type": "redis", "connection_string": f"{redis_single.connection_string},db=2"}
    feast = {"offline_store": {"type": "file"}, "online_store": redis}
    made = Stores(*(_applied(root / name, config) for name, config in (("ours", ours), ("feast", feast))))
    for store in made.both:
        store.push("pushed", _frame({"user_id": [1, 2], "x": [1.5, None], "n": [3, 4]}))
        store.write_to_online_store("pair", _frame({"shop_id": ["a"], "user_id": [1], "y": [2.5]}))
        store.write_to_online_store("by_shop", _frame({"shop_id": ["7", "a"], "x": [7.5, 8.5]}))
        store.write_to_online_store("of_other", _frame({"other_id": [1], "w": [9.5]}))
        store.write_to_online_store("switched_off", _frame({"user_id": [1], "off": [1.0]}))
    return made


def _applied(repo: Path, stores: dict[str, Any], objects: Sequence[Any] = OBJECTS) -> FeatureStore:
    repo.mkdir()
    config = {"project": "requests", "provider": "local", "registry": "registry.db", **stores}
    (repo / "feature_store.yaml").write_text(yaml.safe_dump(config | {"entity_key_serialization_version": 3}))
    store = FeatureStore(str(repo))
    store.apply(list(objects), skip_feature_view_validation=True)
    return FeatureStore(str(repo))


def _frame(columns: dict[str, list[Any]], at: pd.Timestamp = NOW, made: pd.Timestamp = NOW) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    return pd.DataFrame({**columns, "at": [at] * count, "made": [made] * count})


# -- the same ------------------------------------------------------------------------------------------------------


def test_rows_and_columns_native_values_and_protobuf(stores: Stores) -> None:
    wanted = {"user_id": [2, 1, 2, 5], "x": [None, 1.5, None, None]}
    values = [Value(int64_val=u) for u in wanted["user_id"]]
    for entities in (
        {"user_id": wanted["user_id"]},
        [{"user_id": u} for u in wanted["user_id"]],
        {"user_id": values},
        {"user_id": RepeatedValue(val=values)},
        [{"user_id": v} for v in values],
    ):
        assert stores.values(["plain:x"], entities) == wanted


def test_keys_of_another_type_are_read_as_the_declared_one(stores: Stores) -> None:
    """Feast's command gives every key as text, JSON a shop's number as a number."""
    assert stores.values(["plain:n"], {"user_id": ["1", "2"]}) == {"user_id": [1, 2], "n": [3, 4]}
    assert stores.values(["plain:n"], {"user_id": [1.0]}) == {"user_id": [1], "n": [3]}
    assert stores.values(["by_shop:x"], {"shop_id": [7, "a"]}) == {"shop_id": ["7", "a"], "x": [7.5, 8.5]}


def test_entity_columns_that_nothing_is_read_by_are_shown_others_are_not(stores: Stores) -> None:
    entities = {"note": ["x"], "other_id": [5], "user_id": [1], "shop_id": ["a"]}
    answer = stores.values(["plain:n"], entities)
    assert answer == {"other_id": [5], "user_id": [1], "shop_id": ["a"], "n": [3]}
    for store in stores.both:
        response = store.get_online_features(["plain:n"], entities)
        assert list(response.to_dict()) == list(response.proto.metadata.feature_names.val) == list(answer)
        assert [v.WhichOneof("val") for r in response.proto.results for v in r.values][:2] == ["int64_val"] * 2


def test_an_entitys_name_stands_for_its_join_key(stores: Stores) -> None:
    with pytest.warns(UserWarning, match="Using entity name is deprecated"):
        assert stores.values(["plain:n"], {"user": [2]}) == {"user_id": [2], "n": [4]}


def test_the_newest_version_by_name(stores: Stores) -> None:
    assert stores.values(["plain@latest:n"], {"user_id": [1]}) == {"user_id": [1], "n": [3]}


def test_services_aliases_and_full_names(stores: Stores) -> None:
    found = [store.get_feature_service("service") for store in stores.both]
    entities = {"shop_id": ["7"], "user_id": [1]}
    ours, feast = (
        store.get_online_features(wanted, entities, full_feature_names=True).to_dict()
        for store, wanted in zip(stores.both, found, strict=True)
    )
    assert ours == feast == {"shop_id": ["7"], "user_id": [1], "plain__x": [1.5], "plain__n": [3], "shop__x": [7.5]}


def test_versions_in_the_metadata(stores: Stores) -> None:
    features = ["plain:n", "pair:y", "computed:total"]
    entities = {"user_id": [1], "shop_id": ["a"], "amount": [1.0]}
    versions = [
        {
            (m.name, m.version)
            for m in store.get_online_features(
                features, entities, include_feature_view_version_metadata=True
            ).proto.metadata.feature_view_metadata
        }
        for store in stores.both
    ]
    assert versions[0] == versions[1]
    assert {name for name, _ in versions[0]} == {"plain", "pair"}


def test_where_only_history_has_the_answer_it_is_asked(stores: Stores) -> None:
    """Of this user a row is stored that is dated ahead, and one that was written before is in the file only."""
    path = Path(str(stores.ours.config.repo_path)) / "rows.parquet"
    stores.ours.push("pushed", _frame({"user_id": [61], "x": [6.5], "n": [6]}, NOW + pd.Timedelta("1d")))
    features, entities = ["plain:n"], {"user_id": [1, 61]}
    _frame({"user_id": [1, 61], "x": [0.5, 5.5], "n": [0, 5]}, NOW - pd.Timedelta("1h")).to_parquet(path)
    try:
        answer = stores.ours.get_online_features(features, entities)
        soon = asyncio.run(stores.ours.get_online_features_async(features, entities))
    finally:
        path.unlink()
    assert answer.to_dict() == soon.to_dict() == {"user_id": [1, 61], "n": [3, 5]}


def test_a_service_that_asks_for_precomputed_vectors_is_read_as_any_other(stores: Stores) -> None:
    """Feast fails where they were not made; here there is nothing to make."""
    answer = stores.ours.get_online_features(stores.ours.get_feature_service("precomputed"), {"user_id": [1]})
    assert answer.to_dict() == {"user_id": [1], "n": [3]}


# -- refused by both -----------------------------------------------------------------------------------------------


def test_errors_are_of_feasts_types(stores: Stores) -> None:
    one = {"user_id": [1]}
    ours, _ = stores.error(KeyError, ["plain:n"], {"other_id": [1]})
    assert "Missing join key values for keys: ['user_id']" in ours
    assert "Provided join_key_values: ['other_id']" in ours
    ours, feast = stores.error(RequestDataNotFoundInEntityRowsException, ["computed:total"], one)
    assert ours == feast
    ours, feast = stores.error(FeatureViewNotFoundException, ["nothing:n"], one)
    assert ours == feast
    stores.error(KeyError, ["plain:nothing"], one)
    ours, feast = stores.error(FeatureServiceNotFoundException, FeatureService(name="none", features=[plain]), one)
    assert ours == feast
    ours, feast = stores.error(FeatureNameCollisionError, ["plain:x", "by_shop:x"], {"user_id": [1], "shop_id": ["a"]})
    assert ours == feast
    assert stores.error(ValueError, ["plain:n"], {"user_id": [1, 2], "shop_id": ["a"]})[0] == (
        "All entity rows must have the same columns."
    )
    assert stores.error(ValueError, ["plain:n"], [{"user_id": 1}, {"user_id": 1, "shop_id": "a"}])[0] == (
        "All entity_rows must have the same keys."
    )
    assert stores.error(ValueError, [], one)[0] == "No features specified for retrieval"
    ours, feast = stores.error(ValueError, ["plain@v1:n"], one)
    assert ours == feast
    ours, feast = stores.error(ValueError, ["switched_off:off"], one)
    assert ours == feast
    stores.error(ValueError, ["plain:n"], {"user_id": ["one"]})


# -- Feast is wrong ------------------------------------------------------------------------------------------------


def test_a_part_of_a_composite_key_is_no_key(stores: Stores) -> None:
    """Feast looks the part up as if it were whole, and calls the null that it finds PRESENT."""
    for entities in ({"user_id": [1]}, {"shop_id": ["a"]}):
        assert stores.feast.get_online_features(["pair:y"], entities).to_dict()["y"] == [None]
        with pytest.raises(KeyError, match="Missing join key values"):
            stores.ours.get_online_features(["pair:y"], entities)


def test_a_service_may_show_a_view_under_its_own_name_and_another(stores: Stores) -> None:
    """Feast sorts what a service shows, and cannot sort a name and none. (Under two other names it reads one of the two
    by the other's column, where that comes later in the request: test_feast_twins.py.)
    """
    entities = {"payer_id": [1], "user_id": [2]}
    with pytest.raises(TypeError, match="'<' not supported"):
        stores.feast.get_online_features(stores.feast.get_feature_service("both"), entities)
    found = stores.ours.get_feature_service("both")
    answer = stores.ours.get_online_features(found, entities, full_feature_names=True).to_dict()
    assert answer == {"payer_id": [1], "user_id": [2], "plain__n": [4], "payer__n": [3]}


def test_a_null_key_is_of_nobody(stores: Stores) -> None:
    """Feast fails on the whole request, with the name of an attribute as its reason."""
    with pytest.raises(TypeError, match="attribute name must be string"):
        stores.feast.get_online_features(["plain:n"], {"user_id": [1, None]})
    answer = stores.ours.get_online_features(["plain:n"], {"user_id": [1, None]})
    assert answer.to_dict() == {"user_id": [1, None], "n": [3, None]}
    assert list(answer.proto.results[1].statuses) == [1, 3]


def test_a_boolean_is_a_key(stores: Stores) -> None:
    """Feast's stores serialize none."""
    frame = _frame({"flagged": [True, False], "z": [1.0, 2.0]})
    with pytest.raises(ValueError, match="not supported for feast feature store"):
        stores.feast.write_to_online_store("by_flag", frame)
    stores.ours.write_to_online_store("by_flag", frame)
    answer = stores.ours.get_online_features(["by_flag:z"], {"flagged": [False, True]}).to_dict()
    assert answer == {"flagged": [False, True], "z": [2.0, 1.0]}


def test_a_fraction_or_a_boolean_is_nobodys_number(stores: Stores) -> None:
    """Feast cuts: it answers for another entity."""
    for key in (1.5, True):
        assert stores.feast.get_online_features(["plain:n"], {"user_id": [key]}).to_dict()["n"] == [3]
        with pytest.raises(RequestError, match="'user_id' does not read as Int64"):
            stores.ours.get_online_features(["plain:n"], {"user_id": [key]})


def test_no_rows_are_no_error(stores: Stores) -> None:
    """Feast has an IndexError of no rows, and a KeyError of columns without values."""
    for entities, error in (([], IndexError), ({"user_id": []}, KeyError)):
        with pytest.raises(error):
            stores.feast.get_online_features(["plain:n"], entities)
        answer = stores.ours.get_online_features(["plain:n"], entities)
        assert answer.to_dict() == {"user_id": [], "n": []}
        assert [len(result.values) for result in answer.proto.results] == [0, 0]
        assert answer.to_df().shape == (0, 2)


# -- windows -------------------------------------------------------------------------------------------------------


def test_windows_of_every_kind_of_value_and_no_rows_of_ready_aggregates(stores: Stores, tmp_path: Path) -> None:
    hour, minute = timedelta(hours=1), pd.Timedelta("1min")
    events = pd.DataFrame({"user_id": [1, 1], "at": [NOW - 2 * minute, NOW - minute]})
    events = events.assign(when=[NOW - hour, pd.NaT], ok=[True, False], text=["a", None], x=[1.5, None])
    source = FileSource(name="file", path=str(tmp_path / "events.parquet"), timestamp_field="at")
    recent = windowed_view(
        name="recent",
        entities=[user],
        source=PushSource(name="events", batch_source=source),
        features=[
            *aggregate("last_3", "when", Array(UnixTimestamp), windows=[hour]),
            *aggregate("last_3", "ok", Array(Bool), windows=[hour]),
            *aggregate("last_3", "text", Array(String), windows=[hour]),
            *aggregate("mean", "x", Float64, windows=[hour]),
        ],
    )
    events.to_parquet(tmp_path / "events.parquet")
    config = stores.ours.config.model_dump(by_alias=True)
    stores_of = {name: config[name] for name in ("offline_store", "online_store", "batch_engine")}
    store = _applied(tmp_path / "windows", stores_of, [user, recent])
    store.materialize(NOW - pd.Timedelta("1d"), NOW, ["recent"])
    names = [f"recent:{name}_3600s" for name in ("last_3_when", "last_3_ok", "last_3_text", "mean_x")]
    answer = store.get_online_features(names, {"user_id": [1, 2]})
    soon = asyncio.run(store.get_online_features_async(names, {"user_id": [1, 2]}))
    values = [[[(NOW - hour).to_pydatetime()], []], [[False, True], []], [["a"], []], [1.5, None]]
    assert list(answer.to_dict().values()) == list(soon.to_dict().values()) == [[1, 2], *values]
    sent = [[feast_value_type_to_python_type(v) for v in result.values] for result in answer.proto.results]
    assert sent == [[1, 2], *values]
    assert [list(r.statuses) for r in answer.proto.results] == [[1, 1]] * 4 + [[1, 2]]
    ready = _frame({"user_id": [1], **{name.partition(":")[2]: [None] for name in names}}).assign(mean_x_3600s=1.0)
    with pytest.raises(Refused, match=r"'recent' is windowed.* Push the raw events"):
        store.push("events", ready)


# -- writes --------------------------------------------------------------------------------------------------------


def test_of_two_rows_the_newer_event_time_wins_then_the_newer_created_time(stores: Stores) -> None:
    hour, minute = pd.Timedelta("1h"), pd.Timedelta("1min")
    writes = [
        (NOW - hour, NOW - hour, 1.0),
        (NOW - 2 * hour, NOW, 2.0),  # older, though it came later
        (NOW - hour, NOW, 3.0),  # a correction: Feast drops it
        (NOW - hour, NOW - minute, 4.0),  # late, and of before the correction
    ]
    for at, made, x in writes:
        for store in stores.both:
            store.push("pushed", _frame({"user_id": [71], "x": [x], "n": [0]}, at, made))
    assert [s.get_online_features(["plain:x"], {"user_id": [71]}).to_dict()["x"] for s in stores.both] == [[3.0], [1.0]]


def test_async_writes(stores: Stores) -> None:
    async def write() -> None:
        await stores.ours.push_async("pushed", _frame({"user_id": [72], "x": [5.5], "n": [6]}), to=PushMode.ONLINE)
        await stores.ours.write_to_online_store_async("by_shop", _frame({"shop_id": ["w"], "x": [6.5]}))

    asyncio.run(write())
    answer = stores.ours.get_online_features(["plain:x", "pair:y"], {"user_id": [72], "shop_id": ["w"]}).to_dict()
    assert answer == {"user_id": [72], "shop_id": ["w"], "x": [5.5], "y": [None]}
    assert stores.ours.get_online_features(["by_shop:x"], {"shop_id": ["w"]}).to_dict()["x"] == [6.5]


def test_a_row_without_a_key_or_a_time_is_refused_one_without_a_created_time_is_not(stores: Stores) -> None:
    for column, reason in (("user_id", "no value for join key 'user_id'"), ("at", "has no event time")):
        frame = _frame({"user_id": [73, 74], "x": [1.0, 2.0], "n": [1, 2]})
        frame.loc[1, column] = None
        with pytest.raises(Refused, match=reason):
            stores.ours.push("pushed", frame)
    assert stores.ours.get_online_features(["plain:x"], {"user_id": [73]}).to_dict()["x"] == [None]
    frame = _frame({"user_id": [75], "x": [1.0], "n": [1]}).assign(made=pd.NaT)
    frame["made"] = frame["made"].dt.tz_localize("UTC")
    for store in stores.both:
        store.push("pushed", frame)
    assert stores.values(["plain:x"], {"user_id": [75]}) == {"user_id": [75], "x": [1.0]}


def test_a_view_may_leave_a_feature_out_of_a_batch_call(stores: Stores) -> None:
    store = stores.ours
    view, online = store.get_feature_view("plain"), store._get_provider().online_store
    key = EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=76)])
    done: list[int] = []
    online.online_write_batch(
        store.config, view, [(key, {"n": Value(int64_val=5)}, NOW.to_pydatetime(), None)], done.append
    )
    answer = store.get_online_features(["plain:x", "plain:n"], {"user_id": [76]})
    assert (answer.to_dict()["x"], answer.to_dict()["n"], done) == ([None], [5], [1])
    assert [list(result.statuses) for result in answer.proto.results] == [[1], [2], [1]]


# -- the registry --------------------------------------------------------------------------------------------------


def test_a_changed_registry_changes_what_is_asked(stores: Stores, tmp_path: Path) -> None:
    """A store that has answered notices an apply of another process at its next read."""
    config = stores.ours.config.model_dump(by_alias=True)
    store = _applied(tmp_path / "changing", {k: config[k] for k in ("offline_store", "online_store", "batch_engine")})
    store.push("pushed", _frame({"user_id": [1], "x": [1.0], "n": [1]}))
    features = ["plain:x", "plain:n"]
    assert store.get_online_features(features, {"user_id": [1]}).to_dict()["n"] == [1]
    another = FeatureStore(str(tmp_path / "changing"))
    another.apply([FeatureService(name="late", features=[plain[["n"]]])])
    late = FeatureService(name="late", features=[plain[["n"]]])
    assert store.get_online_features(late, {"user_id": [1]}).to_dict() == {"user_id": [1], "n": [1]}
    another.delete_feature_service("late")
    with pytest.raises(FeatureServiceNotFoundException):
        store.get_online_features(late, {"user_id": [1]})


def test_reads_go_on_while_an_apply_writes_the_registry(stores: Stores) -> None:
    """Feast truncates the file, then writes it: a read between finds no view at all, or half a message."""
    path = Path(str(stores.ours.config.repo_path)) / "registry.db"
    content, stop = path.read_bytes(), threading.Event()
    proto = RegistryProto.FromString(content)

    def rewrite() -> None:
        while not stop.is_set():
            proto.version_id = str(uuid.uuid4())
            data = proto.SerializeToString()
            with path.open("wb", buffering=0) as file:
                for part in (b"", data[: len(data) // 2], data[len(data) // 2 :]):
                    file.write(part)
                    stop.wait(0.002)
            stop.wait(0.01)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(200):
            assert stores.ours.get_online_features(["plain:n"], {"user_id": [1]}).to_dict()["n"] == [3]
    finally:
        stop.set()
        writer.join()
        path.write_bytes(content)
