"""Feast's offline store, answered by our engines: `get_historical_features` from the unmodified SDK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from feast import FeatureView, OnDemandFeatureView
from feast.data_source import DataSource
from feast.feature_view_projection import FeatureViewProjection
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from feature_store.adapters.feast.registry import definitions_of
from feature_store.definitions.repository import Definitions, Request
from feature_store.definitions.view import FeatureRef
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import IsochronError, SpineError
from feature_store.retrieval.historical import retrieve
from feature_store.retrieval.spine import EVENT_TIMESTAMP, read_spine
from feature_store.timestamps import arrow_micros, moment


class NotCarriedYet(IsochronError, NotImplementedError):
    """A part of Feast's interface that this version does not carry, said by name."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"{what} is not carried by IsochronOfflineStore yet; {instead}.")


class IsochronOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store:` in feature_store.yaml. `memory_limit` as DuckDB writes it, such as `4GB`."""

    type: Literal["feature_store.adapters.feast.IsochronOfflineStore"] = (
        "feature_store.adapters.feast.IsochronOfflineStore"
    )
    engine: Literal["duckdb"] = "duckdb"
    memory_limit: str | None = None


class IsochronRetrievalJob(RetrievalJob):
    """A historical retrieval; runs when its values are asked for, once."""

    def __init__(self, request: Request, entity_df: pa.Table, config: RepoConfig, on_demand: list) -> None:
        self._request, self._entity_df, self._config = request, entity_df, config
        self._on_demand, self._result = on_demand, None

    def to_arrow(self, validation_reference: Any = None, timeout: int | None = None) -> pa.Table:
        """The spine's columns, the requested features in order, then the inputs Feast adds for on-demand views."""
        if validation_reference is not None:
            raise NotCarriedYet("validation against a reference", "validate the frame that to_df() returns")
        return self._to_arrow_internal(timeout)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        if self._result is None:
            engine = DuckDBEngine(_root(self._config), self._config.offline_store.memory_limit)
            try:
                self._result = retrieve(self._request, self._entity_df, engine, inputs=True)
            finally:
                engine.close()
        return self._result

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    @property
    def full_feature_names(self) -> bool:
        return self._request.full_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata:
        times = arrow_micros(self._entity_df[EVENT_TIMESTAMP])
        bounds = [moment(t) for t in (pa.compute.min(times).as_py(), pa.compute.max(times).as_py()) if t is not None]
        return RetrievalMetadata(
            features=[f"{ref.shown_as}:{ref.feature}" for ref in self._request.refs],
            keys=[c for c in self._entity_df.column_names if c != EVENT_TIMESTAMP],
            min_event_timestamp=bounds[0] if bounds else None,
            max_event_timestamp=bounds[-1] if bounds else None,
        )

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        raise NotCarriedYet("persist", "write the table that to_arrow() returns")


class IsochronOfflineStore(OfflineStore):
    """History for unmodified Feast: `type: feature_store.adapters.feast.IsochronOfflineStore`."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **options: Any,
    ) -> RetrievalJob:
        if entity_df is None:
            raise NotCarriedYet("retrieval without an entity_df", "give the rows to be filled")
        if options.get("filter_by_created_timestamp"):
            raise NotCarriedYet("filter_by_created_timestamp", "leave it out")
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        request = _request(feature_views, on_demand, feature_refs, registry, project, full_feature_names)
        spine = read_spine(entity_df)
        if EVENT_TIMESTAMP not in spine.column_names:
            raise SpineError(f"entity_df has no column {EVENT_TIMESTAMP}; it has: {', '.join(spine.column_names)}.")
        return IsochronRetrievalJob(request, spine, config, on_demand)

    @staticmethod
    def pull_latest_from_table_or_query(*args: Any, **kwargs: Any) -> RetrievalJob:
        raise NotCarriedYet("pull_latest_from_table_or_query", "materialize with IsochronEngine as batch_engine")

    @staticmethod
    def pull_all_from_table_or_query(*args: Any, **kwargs: Any) -> RetrievalJob:
        raise NotCarriedYet("pull_all_from_table_or_query (saved datasets, logs)", "read the Parquet files themselves")

    @staticmethod
    def write_logged_features(*args: Any, **kwargs: Any) -> None:
        raise NotCarriedYet("write_logged_features", "use the serving app's decision log")

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        raise NotCarriedYet("offline_write_batch (push to offline)", "append to the source's Parquet files")

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Nothing here: a source file may come after its definition; reading names what is missing."""


def _root(config: RepoConfig) -> Path:
    return Path(config.repo_path or ".").resolve()


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
