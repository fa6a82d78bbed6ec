"""Feast's compute engine, for `feast materialize`: windowed views are folded from event logs, plain ones copied."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from feast import Entity, FeatureView
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.infra.registry.base_registry import BaseRegistry

from feature_store.adapters.feast.compile import compile_view
from feature_store.adapters.feast.online_store import check_views
from feature_store.adapters.feast.settings import erasures, online_store
from feature_store.clock import SystemClock
from feature_store.definitions.view import PlainView
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import IsochronError, StoreNotReady
from feature_store.stores.online.filling import bootstrap
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.windowed import WindowedOnline
from feature_store.timestamps import micros


class IsochronMaterializationJob(MaterializationJob):
    """A materialization that has ended, well or with an error."""

    def __init__(self, task: MaterializationTask, error: BaseException | None) -> None:
        self.task, self._error = task, error

    def status(self) -> MaterializationJobStatus:
        return MaterializationJobStatus.ERROR if self._error else MaterializationJobStatus.SUCCEEDED

    def error(self) -> BaseException | None:
        return self._error

    def should_be_retried(self) -> bool:
        return bool(getattr(self._error, "retryable", False))

    def job_id(self) -> str:
        return f"{self.task.project}-{self.task.feature_view.name}-{self.task.end_time.isoformat()}"

    def url(self) -> str | None:
        return None


class IsochronEngine(ComputeEngine):
    """Materialization for unmodified Feast: `batch_engine: {type: feature_store.adapters.feast.IsochronEngine}`."""

    @property
    def supports_batch(self) -> bool:
        return True

    @property
    def applies_materialization(self) -> bool:
        """True, so that Feast writes no intervals: a view being filled stays servable, also after a crash."""
        return True

    def update(
        self,
        project: str,
        views_to_delete: Sequence[FeatureView],
        views_to_keep: Sequence[Any],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
    ) -> None:
        """Refuses views the contract refuses; Feast shows the online store only those with online=True."""
        check_views(views_to_keep)

    def teardown_infra(self, project: str, fvs: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Nothing here: the online store deletes what it holds."""

    def materialize(
        self,
        registry: BaseRegistry,
        tasks: MaterializationTask | list[MaterializationTask],
        **options: Any,
    ) -> list[MaterializationJob]:
        """One job a task. A windowed view is folded anew from its whole event log up to the end (a window needs its
        past, so the start is not used); of a plain view the rows from start to end are written, the newer winning.
        """
        tasks = [tasks] if isinstance(tasks, MaterializationTask) else tasks
        memory_limit = self.repo_config.offline_store.memory_limit
        engine = DuckDBEngine(self._root, memory_limit, erasures(self.repo_config))
        try:
            return [self._run(engine, task) for task in tasks]
        finally:
            engine.close()

    @property
    def _root(self) -> Path:
        return Path(self.repo_config.repo_path or ".").resolve()

    def _run(self, engine: DuckDBEngine, task: MaterializationTask) -> MaterializationJob:
        try:
            self._materialize(engine, task)
        except IsochronError as error:
            return IsochronMaterializationJob(task, error)
        return IsochronMaterializationJob(task, None)

    def _materialize(self, engine: DuckDBEngine, task: MaterializationTask) -> None:
        view = compile_view(task.feature_view)
        store = online_store(self.repo_config, task.project)
        start, end = micros(task.start_time), micros(task.end_time)
        now = min(SystemClock().now(), end)
        bar = task.tqdm_builder(1) if task.tqdm_builder else None
        if isinstance(view, PlainView):
            self._copy(engine, store.plain(view), start, end, now)
        else:
            self._fold(engine, store.windowed(view), end, now)
        if bar is not None:
            bar.update(1)
            bar.close()

    def _copy(self, engine: DuckDBEngine, online: PlainOnline, start: int, end: int, now: int) -> None:
        """Adds the rows of a time range; what was stored for another definition of the view is replaced whole."""
        try:
            online.generations.current()
        except StoreNotReady:
            space = online.generations.begin()
            online.replace(engine.newest_rows(online.view, None, end, now), now, space)
        else:
            online.write(engine.newest_rows(online.view, start, end, now), now)

    def _fold(self, engine: DuckDBEngine, online: WindowedOnline, end: int, now: int) -> None:
        """Folds the event log up to `end`, unless what is stored was folded further already: a backfill of older days
        must not take the newer ones away.
        """
        with contextlib.suppress(StoreNotReady):
            if online.generations.current().cut > end + 1:
                name = online.view.name
                click.echo(
                    f"{name}: the online store is filled further already; left as it is. To fill it anew from the "
                    f"files: isochron bootstrap {name}"
                )
                return
        space = online.generations.begin()
        log = engine.event_log(online.view, online.view.reach(now - online.settle), end + 1)
        bootstrap(online, log, now, end + 1, space=space)
