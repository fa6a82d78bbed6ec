"""Feast's retrieval jobs: a table that is made when it is first asked for, and where it can be written to."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import OnDemandFeatureView
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from feature_store.adapters.feast.saved_dataset import location_of, saving, write_folder
from feature_store.adapters.feast.settings import engine_config, erasures, local_path
from feature_store.definitions.repository import Request
from feature_store.engines.open import open_engine
from feature_store.engines.spine import EVENT_TIMESTAMP, TimeRange, check_spine
from feature_store.errors import NotCarried
from feature_store.retrieval.historical import HistoricalFeatures
from feature_store.retrieval.spine import read_spine, spine_of
from feature_store.timestamps import moment


class TableJob(RetrievalJob):
    """A table that `compute` makes, once. Feast's `to_df`, `to_arrow`, validation and metrics build on it."""

    def __init__(self, config: RepoConfig, compute: Callable[[], pa.Table]) -> None:
        self._config, self._compute = config, compute

    @cached_property
    def _table(self) -> pa.Table:
        return self._compute()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._table

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._table.to_pandas()

    @property
    def full_feature_names(self) -> bool:
        return False

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """None that Feast would have to run: our engines run them with the rest."""
        return []

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return None

    def to_sql(self) -> str:
        raise NotCarried("to_sql", "a retrieval is more than one query; FeatureLayer's explain() shows them")

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the rows: one file where the path ends in `.parquet`, else a folder; whole or not at all.

        Raises SavedDatasetLocationAlreadyExists where something is there, unless it may be overwritten; SourceError
        where the storage is not one of local Parquet files.
        """
        path = location_of(storage, self._config)
        with saving(path, allow_overwrite) as temporary:
            self._write(temporary, folder=path.suffix != ".parquet")

    def supports_remote_storage_export(self) -> bool:
        return True

    def to_remote_storage(self) -> list[str]:
        """Writes the rows as files into a new folder of `staging_location`, whole or not at all; the files' paths.

        They stay until somebody deletes them.
        """
        staging = local_path(self._config, self._config.offline_store.staging_location, "staging_location")
        folder = staging / f"retrieval-{secrets.token_hex(8)}"
        with saving(folder, overwrite=False) as temporary:
            self._write(temporary, folder=True)
        return sorted(str(file) for file in folder.glob("*.parquet"))

    def _write(self, path: Path, folder: bool) -> None:
        if folder:
            write_folder(self._table, path)
        else:
            pq.write_table(self._table, path, compression="zstd")


class HistoricalJob(TableJob):
    """A historical retrieval. `entity_df` is a spine in any shape, or a time range without one.

    A spine in this process is checked at once, so that what it lacks is told where it was given.
    """

    def __init__(self, config: RepoConfig, request: Request, entity_df: Any, knowledge_time: bool) -> None:
        super().__init__(config, self._retrieve)
        self._request, self._entity_df, self._knowledge_time = request, entity_df, knowledge_time
        self._distributed = engine_config(config).engine == "spark"
        if not self._distributed and not isinstance(entity_df, TimeRange):
            self._entity_df = self._spine
            check_spine(self._spine.schema, request, inputs=True)

    def _retrieve(self) -> pa.Table:
        with self._features() as features:
            return features.to_arrow()

    @contextmanager
    def _features(self) -> Iterator[HistoricalFeatures]:
        engine = open_engine(engine_config(self._config), erasures(self._config))
        try:
            yield HistoricalFeatures(self._request, self._entity_df, engine, self._knowledge_time, inputs=True)
        finally:
            engine.close()

    def _write(self, path: Path, folder: bool) -> None:
        """On many machines the executors write a folder; the rows do not come through this process."""
        if folder and self._distributed and "_table" not in self.__dict__:
            with self._features() as features:
                features.to_parquet(path)
        else:
            super()._write(path, folder)

    @cached_property
    def _spine(self) -> pa.Table:
        return read_spine(self._entity_df)

    @property
    def full_feature_names(self) -> bool:
        return self._request.full_names

    @property
    def metadata(self) -> RetrievalMetadata:
        if isinstance(self._entity_df, TimeRange):
            keys, first, last = list(self._request.keys), self._entity_df.start, self._entity_df.end
        else:
            keys = [name for name in self._spine.column_names if name != EVENT_TIMESTAMP]
            times = spine_of(self._spine, {}).times
            # Feast adds to these times, so that an empty spine needs some too.
            first, last = (int(np.min(times)), int(np.max(times))) if len(times) else (0, 0)
        return RetrievalMetadata(
            features=[f"{ref.shown_as}:{ref.feature}" for ref in self._request.refs],
            keys=keys,
            min_event_timestamp=moment(first),
            max_event_timestamp=moment(last),
        )
