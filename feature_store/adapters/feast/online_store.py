"""Feast's online store, answered by ours: unmodified `FeatureStore.get_online_features`, checks at apply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, StreamFeatureView, utils
from feast.infra.infra_object import InfraObject
from feast.infra.online_stores.online_store import OnlineStore as FeastOnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.protos.feast.types.Value_pb2 import RepeatedValue
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.type_map import NULL_TIMESTAMP_INT_VALUE

from feature_store.adapters.feast.compile import compile_registry, compile_view
from feature_store.adapters.feast.online_requests import Asked, Features, Requests
from feature_store.adapters.feast.online_response import IsochronOnlineResponse
from feature_store.adapters.feast.refusal import Refused, refusing
from feature_store.adapters.feast.registry import compile_at_exit
from feature_store.adapters.feast.settings import online_store, root_of
from feature_store.clock import SystemClock
from feature_store.config import registry_path
from feature_store.definitions.repository import Definitions
from feature_store.definitions.view import PlainView, WindowedView
from feature_store.retrieval.online import OnlineFeatures
from feature_store.stores.online.plain import CREATED, TIME
from feature_store.stores.online.values import to_arrow
from feature_store.timestamps import SECOND, micros


class IsochronOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store:` in feature_store.yaml. `path` is the folder of an embedded store, from the repository's.

    For `backend: redis` the other names are those of Feast's own store: `redis_type`, `connection_string`
    (`host:port,host:port,db=0,username=...,password=...,ssl=true`) and `sentinel_master`; `timeout` in seconds is how
    long a request may take, retries included.
    """

    type: Literal["feature_store.adapters.feast.IsochronOnlineStore"] = (
        "feature_store.adapters.feast.IsochronOnlineStore"
    )
    backend: Literal["embedded", "redis"] = "embedded"
    path: str = "data/online.lmdb"
    redis_type: Literal["redis", "redis_cluster", "redis_sentinel"] = "redis"
    connection_string: str = "localhost:6379"
    sentinel_master: str = "mymaster"
    timeout: float = 2.0


class IsochronOnlineStore(FeastOnlineStore):
    """Serving for unmodified Feast: `type: feature_store.adapters.feast.IsochronOnlineStore`."""

    def __init__(self) -> None:
        self._requests = Requests(self._refuse_as_feast)

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Reads are asynchronous. Feast's server does more on a push where writes are not: it keeps to its threads."""
        return SupportedAsyncMethods(read=True, write=False)

    # -- apply --------------------------------------------------------------------------------------------------

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Refuses what the contract refuses, before Feast commits. Nothing is deleted here, for the commit can still
        fail: views that are gone from the committed registry leave the store when this process ends.
        """
        check_views(tables_to_keep)
        compile_at_exit(registry_file(config), online_store(config))

    def plan(self, config: RepoConfig, desired_registry_proto: RegistryProto) -> list[InfraObject]:
        """The whole check, services and on-demand views too: Feast calls this for `feast plan` only."""
        with refusing():
            # What is planned names no project yet.
            _check_services(compile_registry(desired_registry_proto, "", "planned"))
        return []

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Deletes this project's values, and no other's."""
        online_store(config).delete_project()

    # -- reading ------------------------------------------------------------------------------------------------

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Sequence[Any] | RepeatedValue],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> IsochronOnlineResponse:
        """The answer as of now: entity columns in the order they came in, then the features in the request's order."""
        asked = self._requests.find(config, features, registry, project, full_feature_names)
        given = asked.columns(entity_rows)
        answer = asked.read(given, SystemClock().now())
        return _response(asked, given, answer, include_feature_view_version_metadata)

    async def get_online_features_async(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Sequence[Any] | RepeatedValue],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> IsochronOnlineResponse:
        """The same, waiting for the store without holding up the event loop."""
        asked = self._requests.find(config, features, registry, project, full_feature_names)
        given = asked.columns(entity_rows)
        answer = await asked.read_async(given, SystemClock().now())
        return _response(asked, given, answer, include_feature_view_version_metadata)

    def _refuse_as_feast(self, registry: BaseRegistry, project: str, features: Features, full_names: bool) -> None:
        """Raises Feast's own error for features that cannot be resolved, if Feast has one: callers may wait for it."""
        grouped_refs = utils._get_online_request_context(registry, project, features, full_names)[5]
        self._check_versioned_read_support(grouped_refs)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKeyProto],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, ValueProto] | None]]:
        """Feast's reads go through get_online_features; whoever calls this directly is told so."""
        raise NotImplementedError("read through FeatureStore.get_online_features")

    # -- writing ------------------------------------------------------------------------------------------------

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Writes rows of a plain view: the newer event time wins, then the newer created time."""
        with refusing():
            view = compile_view(table)
        if isinstance(view, WindowedView):
            raise Refused(
                f"view '{view.name}' is windowed: its values are folded from events. "
                "Push the raw events (POST /push, FeatureLayer.append_events), not ready aggregates."
            )
        online_store(config).plain(view).write(_rows(view, data), SystemClock().now())
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """The same in a thread."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)


def _response(
    asked: Asked, given: Mapping[str, Sequence[Any]], answer: OnlineFeatures, versions: bool
) -> IsochronOnlineResponse:
    return IsochronOnlineResponse(answer, asked.shown(given), asked.versions() if versions else None)


def check_views(views: Sequence[Any]) -> None:
    """Refuses stored views that break the contract; on-demand views are checked under plan."""
    with refusing():
        for view in views:
            if isinstance(view, FeatureView | StreamFeatureView):
                compile_view(view)


def _check_services(definitions: Definitions) -> None:
    for name in definitions.services:
        request = definitions.resolve(name)
        _ = request.keys, request.request_fields


def registry_file(config: RepoConfig) -> Path:
    """The registry file of a Feast configuration."""
    return root_of(config) / registry_path(config.registry.path, root_of(config) / "feature_store.yaml")


def _rows(
    view: PlainView, data: list[tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]]
) -> pa.Table:
    """Feast's row tuples as a table of keys, times and features. Feast's times here are naive UTC.

    Raises Refused for a row without a key or an event time.
    """
    keys = [dict(zip(key.join_keys, key.entity_values, strict=True)) for key, *_ in data]
    columns: dict[str, Any] = {
        field.name: to_arrow([_stored(row.get(field.name)) for row in keys], field.type) for field in view.keys
    }
    columns[TIME] = pa.array([_time(time) for _, _, time, _ in data], pa.int64())
    for name in (*(key.name for key in view.keys), TIME):
        if columns[name].null_count:
            what = "event time" if name == TIME else f"value for join key '{name}'"
            raise Refused(f"view '{view.name}': a row has no {what}; nothing of these rows was written.")
    columns[CREATED] = pa.array([_time(created) for *_, created in data], pa.int64())
    for field in view.features:
        columns[field.name] = to_arrow([_stored(values.get(field.name)) for _, values, _, _ in data], field.type)
    return pa.table(columns)


def _time(time: datetime | None) -> int | None:
    """Microseconds of a time; pandas' NaT, which is a datetime too, is none."""
    return None if time is None or time is pd.NaT else micros(time)


def _stored(value: ValueProto | None) -> Any:
    """A protobuf value as the store holds it: times, which protobuf has in seconds, are microseconds."""
    kind = value.WhichOneof("val") if value is not None else None
    if kind is None:
        return None
    plain = getattr(value, kind)
    if kind == "unix_timestamp_val":
        return None if plain == NULL_TIMESTAMP_INT_VALUE else plain * SECOND
    return list(plain.val) if kind.endswith("_list_val") else plain
