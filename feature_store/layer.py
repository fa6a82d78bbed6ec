"""The one object people hold: a repository's features, as training, streaming and serving read them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.clock import Clock, SystemClock
from feature_store.config import RepoConfig, load_config
from feature_store.definitions.erasure import Erasure, key_text
from feature_store.definitions.repository import Definitions
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.engines.stream.admission import admit, admit_rows, admit_table
from feature_store.errors import (
    ConfigError,
    CorruptState,
    ErasureIncomplete,
    IsochronError,
    RequestError,
    SpineError,
    StoreError,
    StoreNotReady,
    UnknownName,
)
from feature_store.retrieval.online import AsOf, OnlineFeatures, Prepared
from feature_store.stores.erasure_log import ErasureLog
from feature_store.stores.online.appending import Appended, Batch, Position, append
from feature_store.stores.online.erasing import erase
from feature_store.stores.online.filling import bootstrap
from feature_store.stores.online.keys import entity_key
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.records import Positions
from feature_store.stores.online.store import OnlineStore
from feature_store.timestamps import END

if TYPE_CHECKING:
    from feature_store.engines.duckdb.engine import DuckDBEngine
    from feature_store.engines.engine import DistributedEngine, Engine
    from feature_store.retrieval.historical import HistoricalFeatures
    from feature_store.retrieval.spine import Moment
    from feature_store.retrieval.training_set import TrainingSet

logger = logging.getLogger(__name__)

#: Whoever shows that work goes on: told a step (or view), how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ErasureReport:
    """What an erasure did: when it was (microseconds), and by view of how many entities the online store had held
    something. Records of all these views are left out of history.
    """

    erased_at: int
    views: dict[str, int]


class FeatureLayer:
    """One feature layer over an applied Feast repository.

    `repo` is the repository's folder, or the compiled definitions file that apply left; `sources` gives declared file
    sources other paths, by name; `clock` says what *now* is for online reads and writes.

    Raises ConfigError when the folder is no applied repository.
    """

    def __init__(
        self, repo: str | os.PathLike[str], *, sources: Mapping[str, str] | None = None, clock: Clock | None = None
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self.config = load_config(_root_of(Path(repo)))
        self._sources = {name: str(Path(path).resolve()) for name, path in (sources or {}).items()}
        self.definitions = _load_definitions(self.config)
        if self._sources:
            self.definitions = self.definitions.with_sources(self._sources)
        self._log = ErasureLog(self.config.erasures, self.config.project)
        self.store = OnlineStore(open_backend(self.config.online), self.config.project, erasures=self._log.load)

    # History's engines and files are loaded and opened when they are first asked for: a server reads without them.

    @cached_property
    def _engine(self) -> DuckDBEngine:
        from feature_store.engines.duckdb.engine import DuckDBEngine

        return DuckDBEngine(self.config.root, self.config.memory_limit, self._log.load)

    @cached_property
    def _history(self) -> Engine | DistributedEngine:
        from feature_store.engines.open import open_engine

        return self._engine if self.config.engine == "duckdb" else open_engine(self.config, self._log.load)

    def close(self) -> None:
        """Frees the engines. The online store's file stays open for other layers of this process."""
        for name in ("_history", "_engine"):
            if (opened := self.__dict__.get(name)) is not None:
                opened.close()

    def __enter__(self) -> FeatureLayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- training -----------------------------------------------------------------------------------------------

    def get_historical_features(
        self,
        entity_df: Any,
        features: Any,
        full_feature_names: bool = False,
        *,
        knowledge_time: bool = False,
        start_date: Moment | None = None,
        end_date: Moment | None = None,
    ) -> HistoricalFeatures:
        """The features of each row of `entity_df` as of its `event_timestamp`; runs when values are asked for.

        `entity_df` is a pandas, Polars or Arrow table, a Parquet path or SQL. `features` is a feature service's name,
        a list of `view:feature`, or a Feast FeatureService. With `knowledge_time` a row sees only what was known at
        its time: rows whose created time (event time where there is none) is not after it.

        Without a spine (None) every row of the views from `start_date` to `end_date` asks, both included; as in Feast
        the end is now where it is not given, and the start the longest ttl of the views before the end, or 30 days.
        """
        from feature_store.retrieval.historical import HistoricalFeatures
        from feature_store.retrieval.spine import time_range

        request = self._request(features, full_feature_names)
        if entity_df is None:
            entity_df = time_range(request, start_date, end_date, self.clock.now())
        elif start_date is not None or end_date is not None:
            raise SpineError("start_date and end_date are for retrieval without an entity_df; give one or the other.")
        return HistoricalFeatures(request, entity_df, self._history, knowledge_time)

    def training_set(
        self,
        entity_df: Any,
        features: Any,
        path: str | os.PathLike[str],
        full_feature_names: bool = False,
        *,
        knowledge_time: bool = False,
    ) -> TrainingSet:
        """Writes a training set: the folder `path` with the rows and their features, the spine, and a manifest of what
        they were made of. Arguments as for `get_historical_features`; an existing folder is refused.
        """
        from feature_store.retrieval.spine import read_spine
        from feature_store.retrieval.training_set import write_training_set

        request = self._request(features, full_feature_names)
        spine = read_spine(entity_df)
        return write_training_set(
            request,
            spine,
            self._history,
            self.config.root,
            Path(path),
            self.clock.now(),
            knowledge_time,
            erasures=self._log.load,
        )

    def rebuild_training_set(self, manifest: str | os.PathLike[str], path: str | os.PathLike[str]) -> TrainingSet:
        """Makes a training set again from its manifest, in another folder; the bytes are the same, or it raises
        TrainingSetError that says what changed: definitions, a source's files, the spine, what was erased, or the
        versions used.
        """
        from feature_store.retrieval.training_set import rebuild_training_set

        return rebuild_training_set(
            Path(manifest),
            self.definitions,
            self._history,
            self.config.root,
            Path(path),
            self.clock.now(),
            self._log.load,
        )

    # -- serving ------------------------------------------------------------------------------------------------

    def get_online_features(
        self,
        features: Any,
        entities: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
        as_of: AsOf | None = None,
        full_feature_names: bool = False,
    ) -> OnlineFeatures:
        """The features of each entity row as of now, or as of an explicit time (one, or one a row).

        `entities` holds join keys and request-time values, as columns or as rows. A time that the store can no longer
        answer exactly is answered from history.
        """
        prepared = self.prepare(features, full_feature_names, history=True)
        return prepared.read(_columns(entities), self.clock.now() if as_of is None else as_of)

    def prepare(self, features: Any, full_feature_names: bool = False, history: bool = False) -> Prepared:
        """A handle with all resolution done, for hot paths. It refuses times that only history could answer, unless
        `history` is on.
        """
        request = self._request(features, full_feature_names)
        return Prepared(request, self.store, self._engine if history else None)

    # -- filling ------------------------------------------------------------------------------------------------

    def bootstrap(
        self, views: Sequence[str] = (), until: int = END, progress: Progress | None = None
    ) -> dict[str, int]:
        """Fills the online store from the event logs, for the named views or all online ones; entities by view.

        Events before `until` (microseconds) are folded; each view's former state is replaced whole. Reads are exact
        from a minute before `until`, or before now if that is earlier.
        """
        stored = [v for v in self.definitions.stored_views(views) if v.online or v.name in views]
        return {view.name: self._fill(view, until, progress) for view in stored}

    def _fill(self, view: WindowedView | PlainView, until: int, progress: Progress | None) -> int:
        now = min(self.clock.now(), until)
        if isinstance(view, PlainView):
            plain = self.store.plain(view)
            space = plain.generations.begin()
            return plain.replace(self._engine.newest_rows(view, None, until - 1, now), now, space)
        if not view.online:
            raise RequestError(view.name, "is declared with online=False; declare it online to fill it")
        online = self.store.windowed(view)
        space = online.generations.begin()
        log = self._engine.event_log(view, view.reach(now - online.settle), until)
        if log.skipped:
            logger.warning("view '%s': %d rows without a key or a time were skipped", view.name, log.skipped)
        show = (lambda done, of: progress(view.name, done, of)) if progress else None
        return bootstrap(online, log, now, until, show, space)

    def write_to_online_store(self, view: str, rows: Any) -> int:
        """Writes rows of a plain view, as an Arrow, pandas or Polars table or as a few mappings; how many entities.

        Columns have the source's names. Of one entity the newer event time wins, then the newer created time, whatever
        comes first and whoever else writes; rows at or below an erasure are left out, which is logged. Raises
        RequestError for rows that do not fit the view, and for a windowed view: its values are folded from raw events,
        which `append_events` takes.
        """
        stored = self.definitions.stored_view(view)
        if isinstance(stored, WindowedView):
            raise RequestError(
                view, "is windowed: its values are folded from events; push the raw events, not ready aggregates"
            )
        online, now = self.store.plain(stored), self.clock.now()
        if not isinstance(rows, list | tuple):
            return online.write(admit_table(stored, _table(rows)), now)
        entities, admitted = admit_rows(stored, rows)
        return online.write_rows([entity_key(values) for values in entities], admitted, now)

    def append_events(
        self, push_source: str, rows: Any, partition: int = 0, offset: int | None = None
    ) -> dict[str, Appended]:
        """Appends raw events to every filled windowed view on a push source, all or none; what was done, by view.

        A view that was never filled takes none: its bootstrap will read them from the log. Raises StoreNotReady when
        no view is filled.

        `rows` is an Arrow table or what can be read as one (pandas, Polars), with the columns of the source's file.
        `offset` is the log position of the first row in `partition`:
        rows whose position was applied before change nothing. Without one the rows follow the last.
        """
        views = [
            v
            for v in self.definitions.stored_views()
            if isinstance(v, WindowedView) and v.online and v.source.push_source == push_source
        ]
        if not views:
            known = {v.source.push_source for v in self.definitions.stored_views() if isinstance(v, WindowedView)}
            raise UnknownName("push source with windowed views", push_source, sorted(k for k in known if k))
        now, table = self.clock.now(), _table(rows)
        admitted = {view.name: admit(view, table, now) for view in views}
        filled = [view for view in views if self.store.holds(view)] or views
        batches = [
            Batch(self.store.windowed(view), admitted[view.name].keys, admitted[view.name].events) for view in filled
        ]
        done = append(batches, now, Position(partition, offset))
        return {view.name: one for view, one in zip(filled, done, strict=True)}

    # -- erasing ------------------------------------------------------------------------------------------------

    def erase(self, keys: Mapping[str, Any]) -> ErasureReport:
        """Erases an entity, given by join keys and their values (or the values' text): its records that are known by
        now have no part in any answer from here on, in every view that has these keys among its join keys.

        The erasure is written down first, for ever, in a file beside the registry; then what the online store holds
        goes. The sources' files stay as they are. What comes later is a new entity's. Twice is as good as once.

        Raises UnknownName or RequestError for keys that no view has or values that are none of theirs, and
        ErasureLogError: then nothing is erased. ErasureIncomplete where only the online store still holds something.
        """
        texts = {name: key_text(name, value) for name, value in keys.items()}
        views = self.definitions.keyed_by(texts)
        erasure = Erasure(self.config.project, texts, self.clock.now(), self._positions(views))
        self._log.append(erasure)
        entities: dict[str, int] = {}
        problems: dict[str, IsochronError] = {}
        for view in views:
            try:
                entities[view.name] = erase(self.store.view(view), erasure)
            except IsochronError as error:
                problems[view.name] = error
        if problems:
            raise ErasureIncomplete(problems)
        return ErasureReport(erasure.erased_at, entities)

    def _positions(self, views: Sequence[StoredView]) -> dict[str, Positions]:
        """The log positions that the online store has folded, by view; of one that it does not serve none."""
        found = {}
        for view in views:
            with contextlib.suppress(StoreNotReady, StoreError, CorruptState):
                found[view.name] = self.store.view(view).generations.current().partitions
        return found

    def _request(self, features: Any, full_feature_names: bool) -> Any:
        if not isinstance(features, str) and hasattr(features, "feature_view_projections"):
            features = features.name
        return self.definitions.resolve(features, full_feature_names)


def _root_of(repo: Path) -> Path:
    """The repository's folder, given itself or the compiled definitions file somewhere below it."""
    if not repo.is_file():
        return repo
    for folder in repo.resolve().parents:
        if (folder / "feature_store.yaml").is_file():
            return folder
    raise ConfigError(f"{repo} lies below no folder with a feature_store.yaml.")


def _load_definitions(config: RepoConfig) -> Definitions:
    """The compiled definitions; of another state of the registry, they are rebuilt from it (which imports Feast)."""
    if config.compiled.is_file() and config.registry.is_file():
        stamp = hashlib.sha256(config.registry.read_bytes()).hexdigest()
        with contextlib.suppress(ConfigError):  # one that cannot be read is of another version: rebuilt below
            if (compiled := Definitions.load(config.compiled)).stamp == stamp:
                return compiled
    from feature_store.adapters.feast.registry import compile_repository

    return compile_repository(config)


def _columns(entities: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[Any]]:
    if isinstance(entities, Mapping):
        for name, values in entities.items():
            if not hasattr(values, "__len__"):
                raise RequestError(name, f"is a {type(values).__name__}; give a list of values, one a row")
        return entities
    names = list(entities[0]) if entities else []
    for row in entities:
        if list(row) != names and set(row) != set(names):
            raise RequestError("entities", f"must all have the same columns; one has {', '.join(row)}")
    return {name: [row[name] for row in entities] for name in names}


def _table(rows: Any) -> pa.Table:
    """Rows as an Arrow table; of a pandas frame without its index."""
    if isinstance(rows, pa.Table):
        return rows
    if not hasattr(rows, "__arrow_c_stream__"):
        raise RequestError("rows", f"are a {type(rows).__name__}; give an Arrow table, or a pandas or Polars frame")
    return pa.table(rows)
