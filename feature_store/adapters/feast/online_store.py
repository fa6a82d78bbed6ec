"""Feast's online store, answered by ours: unmodified `FeatureStore.get_online_features`, checks at apply."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, StreamFeatureView
from feast.infra.infra_object import InfraObject
from feast.infra.online_stores.online_store import OnlineStore as FeastOnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.protos.feast.types.Value_pb2 import RepeatedValue
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.value_type import ValueType as FeastValueType

from feature_store.adapters.feast.compile import compile_registry, compile_view
from feature_store.adapters.feast.refusal import Refused, refusing
from feature_store.adapters.feast.registry import compile_at_exit, definitions_of
from feature_store.adapters.feast.settings import online_store, root_of
from feature_store.clock import SystemClock
from feature_store.config import registry_path
from feature_store.definitions.repository import Definitions
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import PlainView, WindowedView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.retrieval.online import OnlineFeatures, Prepared
from feature_store.stores.online.plain import CREATED, TIME
from feature_store.stores.online.values import to_arrow
from feature_store.timestamps import BEGINNING, SECOND, micros

_FEAST_TYPES = {
    ValueType.BOOL: FeastValueType.BOOL,
    ValueType.INT32: FeastValueType.INT32,
    ValueType.INT64: FeastValueType.INT64,
    ValueType.FLOAT32: FeastValueType.FLOAT,
    ValueType.FLOAT64: FeastValueType.DOUBLE,
    ValueType.STRING: FeastValueType.STRING,
    ValueType.BYTES: FeastValueType.BYTES,
    ValueType.TIMESTAMP: FeastValueType.UNIX_TIMESTAMP,
}


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


class IsochronOnlineResponse(OnlineResponse):
    """An answer that builds Feast's protobuf only for those who ask for it."""

    def __init__(self, answer: OnlineFeatures) -> None:
        self._answer = answer
        self._proto: GetOnlineFeaturesResponse | None = None

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, Any]:
        """Join keys, then the features in the request's order; with timestamps, `<name>__ts` in seconds beside each."""
        response: dict[str, Any] = {}
        for name, values in self._answer.to_dict().items():
            response[name] = values
            if include_event_timestamps:
                response[name + TIMESTAMP_POSTFIX] = _seconds(self._answer, name)
        return response

    @property
    def proto(self) -> GetOnlineFeaturesResponse:
        """The same as Feast's protobuf message, with statuses."""
        if self._proto is None:
            self._proto = _proto(self._answer)
        return self._proto


def _seconds(answer: OnlineFeatures, name: str) -> list[int]:
    times = answer.event_times.get(name) or [BEGINNING] * len(answer.as_of)
    return [0 if time == BEGINNING else time // SECOND for time in times]


def _proto(answer: OnlineFeatures) -> GetOnlineFeaturesResponse:
    response = GetOnlineFeaturesResponse(results=[])
    for name, array in (answer.keys | answer.columns).items():
        response.metadata.feature_names.val.append(name)
        statuses = answer.statuses.get(name)
        vector = response.results.add()
        vector.values.extend(_proto_values(array, answer, name))
        for row, seconds in enumerate(_seconds(answer, name)):
            vector.statuses.append(FieldStatus.Value(statuses[row]) if statuses else FieldStatus.PRESENT)
            vector.event_timestamps.add().seconds = seconds
    return response


def _proto_values(array: pa.Array, answer: OnlineFeatures, name: str) -> list[ValueProto]:
    value_type = answer.request.keys.get(name)
    if value_type is None:
        ref = dict(zip(answer.request.columns, answer.request.refs, strict=True))[name]
        value_type = answer.request.type_of(ref)
    feast_type = _FEAST_TYPES[value_type.element]
    if value_type.is_list:
        feast_type = FeastValueType[feast_type.name + "_LIST"]
    return python_values_to_proto_values(array.to_pylist(), feast_type)


class IsochronOnlineStore(FeastOnlineStore):
    """Serving for unmodified Feast: `type: feature_store.adapters.feast.IsochronOnlineStore`."""

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        return SupportedAsyncMethods(read=False, write=False)

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
        """The answer as of now. Join keys come first, then the features in the request's order, in every process."""
        definitions = definitions_of(registry, project)
        wanted = features.name if isinstance(features, FeatureService) else features
        request = definitions.resolve(wanted, full_feature_names)
        prepared = Prepared(
            request, online_store(config), _history(root_of(config), config.offline_store.memory_limit, os.getpid())
        )
        return IsochronOnlineResponse(prepared.read(_columnar(entity_rows), SystemClock().now()))

    async def get_online_features_async(self, *args: Any, **kwargs: Any) -> IsochronOnlineResponse:
        """The same: an embedded read waits for nothing."""
        return self.get_online_features(*args, **kwargs)

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


@lru_cache(maxsize=8)
def _history(root: Path, memory_limit: str | None, process: int) -> DuckDBEngine:
    """The engine that answers times the store no longer holds, one a repository and process: opening it costs more
    than a read.
    """
    return DuckDBEngine(root, memory_limit)


def _columnar(rows: Any) -> Mapping[str, Sequence[Any]]:
    if isinstance(rows, Mapping):
        return {name: _plain_values(values) for name, values in rows.items()}
    names = list(rows[0]) if rows else []
    if any(set(row) != set(names) for row in rows):
        raise ValueError("All entity_rows must have the same keys.")
    return {name: [row[name] for row in rows] for name in names}


def _plain_values(values: Any) -> list[Any]:
    if isinstance(values, RepeatedValue):
        values = values.val
    return [feast_value_type_to_python_type(v) if isinstance(v, ValueProto) else v for v in values]


def _rows(
    view: PlainView, data: list[tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]]
) -> pa.Table:
    """Feast's row tuples as a table of keys, times and features. Feast's times here are naive UTC."""
    keys = [dict(zip(key.join_keys, key.entity_values, strict=True)) for key, *_ in data]
    columns: dict[str, Any] = {
        field.name: to_arrow([_stored(row[field.name]) for row in keys], field.type) for field in view.keys
    }
    columns[TIME] = [micros(time) for _, _, time, _ in data]
    columns[CREATED] = pa.array([micros(created) if created else None for *_, created in data], pa.int64())
    for field in view.features:
        columns[field.name] = to_arrow([_stored(values.get(field.name)) for _, values, _, _ in data], field.type)
    return pa.table(columns)


def _stored(value: ValueProto | None) -> Any:
    """A protobuf value as the store holds it: times are microseconds."""
    plain = feast_value_type_to_python_type(value) if value is not None else None
    if isinstance(plain, list):
        return [micros(v) if isinstance(v, datetime) else v for v in plain]
    return micros(plain) if isinstance(plain, datetime) else plain
