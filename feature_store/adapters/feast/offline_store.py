"""Feast's offline store, answered by our engines: history, saved datasets, offline pushes and feature logs."""

from __future__ import annotations

import datetime as dt
import glob
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from feast import FeatureView, FileSource, OnDemandFeatureView
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view_projection import FeatureViewProjection
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pydantic import Field

from feature_store.adapters.feast.feature_logs import write_logs
from feature_store.adapters.feast.offline_write import write_batch
from feature_store.adapters.feast.pull import Pull, all_rows, file_source, latest_rows
from feature_store.adapters.feast.refusal import refusing
from feature_store.adapters.feast.registry import definitions_of
from feature_store.adapters.feast.retrieval_job import HistoricalJob, TableJob
from feature_store.adapters.feast.settings import engine_config, erasures, local_path, root_of
from feature_store.clock import SystemClock
from feature_store.definitions.repository import Definitions, Request
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import FeatureRef
from feature_store.engines.spine import EVENT_TIMESTAMP
from feature_store.errors import SourceError, SpineError
from feature_store.retrieval.spine import time_range
from feature_store.stores.offline.parquet import ParquetFiles, open_source
from feature_store.timestamps import MINUTE, micros

logger = logging.getLogger(__name__)

#: How long ago Feast may have taken the time that it fills in for an end that nobody gave.
_JUST_NOW = MINUTE


class IsochronOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store:` in feature_store.yaml. `engine` computes history; `memory_limit` as DuckDB writes it, such as
    `4GB`; for Spark the master's URL and further settings. `staging_location` is the folder of exported retrievals.
    """

    type: Literal["feature_store.adapters.feast.IsochronOfflineStore"] = (
        "feature_store.adapters.feast.IsochronOfflineStore"
    )
    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: str | None = None
    spark_master: str | None = None
    spark_conf: dict[str, Any] = Field(default_factory=dict)
    staging_location: str = "data/staging"


class IsochronOfflineStore(OfflineStore):
    """History for unmodified Feast: `type: feature_store.adapters.feast.IsochronOfflineStore`."""

    supports_filter_by_created_timestamp = True

    # -- reading ------------------------------------------------------------------------------------------------

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        start_date: dt.datetime | None = None,
        end_date: dt.datetime | None = None,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """The features of each row of `entity_df`, or without one of every row of the views from start to end.

        With `filter_by_created_timestamp` a row sees only what had been created at its time.
        """
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        request = _request(feature_views, on_demand, feature_refs, registry, project, full_feature_names)
        if entity_df is None:
            now = SystemClock().now()
            entity_df = time_range(request, start_date, end_given(end_date, now), now)
        elif start_date is not None or end_date is not None:
            raise SpineError("start_date and end_date are for retrieval without an entity_df; give one or the other.")
        return HistoricalJob(config, request, entity_df, filter_by_created_timestamp)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: dt.datetime | None = None,
        end_date: dt.datetime | None = None,
    ) -> RetrievalJob:
        """The newest row of each key from start to end, both included. Columns have the names they are asked for by,
        which are those of the files: Feast maps them afterwards.
        """
        columns = join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column
        pull = _pull(data_source, *columns, start_date, end_date)
        return TableJob(config, partial(latest_rows, pull, engine_config(config), erasures(config)))

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: dt.datetime | None = None,
        end_date: dt.datetime | None = None,
    ) -> RetrievalJob:
        """All rows from start to end, both included, where they are given, but for those of erased entities.

        Of files that Feast had stored itself (saved datasets, logs) every column comes, in the files' order, for Feast
        asks for fewer than it stored; and every row of a saved dataset, for one that was overwritten still has the
        time range of the first in Feast's registry.
        """
        columns = join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column
        pull = _pull(data_source, *columns, start_date, end_date)
        return TableJob(config, partial(all_rows, pull, root_of(config), erasures(config)))

    # -- writing ------------------------------------------------------------------------------------------------

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Adds rows to the view's source, once where several views are pushed to: see `write_batch`."""
        write_batch(config, feature_view, table, progress)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Adds logs of served features to their destination: see `write_logs`."""
        write_logs(config, data, source, logging_config, registry)

    # -- sources ------------------------------------------------------------------------------------------------

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Refuses a plan or an apply where a source's files are there but cannot be read as declared. Where there are
        none it only warns: they may come after their definition.
        """
        if not isinstance(data_source, FileSource):
            return
        with refusing():
            what = f"source '{data_source.name}'"
            if _is_bare(local_path(config, data_source.path, what)):
                logger.warning("%s: there is nothing at %s yet.", what, data_source.path)
                return
            source = _source(data_source)
            for name in filter(None, (source.timestamp_field, source.created_field)):
                _check_time(open_source(source, root_of(config)), name, what)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """The columns in a source's files, as Arrow writes their types; folders' names are no columns."""
        if not isinstance(data_source, FileSource) or not isinstance(data_source.file_format, ParquetFormat | None):
            return data_source.get_table_column_names_and_types(config=config)
        schema = open_source(_source(data_source), root_of(config)).schemas[0]
        return [(field.name, str(field.type)) for field in schema]


def end_given(end: dt.datetime | None, now: int) -> dt.datetime | None:
    """The end of a time range as a person meant it; a naive one is UTC.

    Where nobody gave an end, Feast fills in the machine's local time, naive too. It is told by being now.
    """
    if end is None or end.tzinfo is not None:
        return end
    for fold in (0, 1):
        local = end.replace(fold=fold).astimezone(dt.UTC)
        if 0 <= now - micros(local) <= _JUST_NOW:
            return local
    return end


def _is_bare(path: Path) -> bool:
    pattern = path / "**" / "*.parquet" if path.is_dir() else path
    return not path.is_file() and next(glob.iglob(str(pattern), recursive=True), None) is None


def _check_time(files: ParquetFiles, name: str, what: str) -> None:
    field = files.physical_column(name, what)
    if of_arrow(field.type) is not ValueType.TIMESTAMP:
        raise SourceError(f"{what}: time column '{name}' is {field.type}, not a timestamp. Write it as a timestamp.")


def _source(declared: FileSource) -> Source:
    """A Feast source as ours, for what reads its files without a view."""
    described = Source(
        name=declared.name,
        path=declared.path,
        timestamp_field=declared.timestamp_field,
        field_mapping=dict(declared.field_mapping or {}),
    )
    created = declared.created_timestamp_column
    return Source(
        name=described.name,
        path=described.path,
        timestamp_field=described.physical(described.timestamp_field),
        created_field=described.physical(created) if created else None,
        field_mapping=described.field_mapping,
    )


def _pull(
    data_source: DataSource,
    keys: list[str],
    features: list[str],
    time: str,
    created: str | None,
    start: dt.datetime | None,
    end: dt.datetime | None,
) -> Pull:
    declared = file_source(data_source, "a pull")
    described = _source(declared)
    # Feast describes what it stored itself by its path alone.
    stored = not declared.timestamp_field
    if stored and time == EVENT_TIMESTAMP:
        start = end = None
    return Pull(
        source=Source(
            name=declared.name,
            path=declared.path,
            timestamp_field=described.physical(time),
            created_field=described.physical(created) if created else None,
            field_mapping=described.field_mapping,
        ),
        keys=tuple(keys),
        features=tuple(features),
        time=time,
        created=created or None,
        start=None if start is None else micros(start),
        end=None if end is None else micros(end),
        stored=stored,
    )


def _request(
    feature_views: list[FeatureView],
    on_demand: list[OnDemandFeatureView],
    feature_refs: list[str],
    registry: BaseRegistry,
    project: str,
    full_names: bool,
) -> Request:
    """The request behind Feast's references. Feast appends the inputs of on-demand views to them in set order; they are
    dropped here, for the request finds them again, in a fixed order.
    """
    definitions = definitions_of(registry, project)
    projections = {v.projection.name_to_use(): v.projection for v in (*feature_views, *on_demand)}
    refs = [_ref(projections, text) for text in feature_refs]
    return definitions.request(refs[: _asked(definitions, refs)], full_names)


def _ref(projections: dict[str, FeatureViewProjection], text: str) -> FeatureRef:
    shown_as, _, feature = text.partition(":")
    projection = projections[shown_as]
    return FeatureRef(
        view=projection.name,
        feature=feature,
        shown_as=shown_as,
        join_key_map=tuple(sorted(projection.join_key_map.items())),
    )


def _asked(definitions: Definitions, refs: list[FeatureRef]) -> int:
    """How many of the references a caller asked for; the rest Feast appended. A service's own list is known exactly;
    for a list of references whose last ones are inputs too, those count as appended and come in the fixed order.
    """
    names = [(ref.shown_as, ref.feature) for ref in refs]
    services = [[(ref.shown_as, ref.feature) for ref in service.features] for service in definitions.services.values()]
    lengths = [len(service) for service in services if names[: len(service)] == service]
    for length in (*sorted(lengths, reverse=True), *range(1, len(refs))):
        implied = {(ref.shown_as, ref.feature) for ref in definitions.request(refs[:length], True).stored}
        if set(names[length:]) == implied - set(names[:length]):
            return length
    return len(refs)
