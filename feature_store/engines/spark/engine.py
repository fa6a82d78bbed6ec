"""The engine for what one machine does not hold: the same plan, the same values, on Spark.

Executors need what this process has: Python of the same minor version with this package installed, and under the same
paths the sources, a spine given as a path, and the folder that a result is written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from feature_store.definitions.erasure import LoadErasures, no_erasures
from feature_store.engines.engine import Finish, Reading
from feature_store.engines.spark.retrieved import SparkRetrieved
from feature_store.engines.spark.session import Session
from feature_store.engines.spark.stages import Sizes, as_of_scan, window_scan
from feature_store.plan.historical import AsOfStage, HistoricalPlan, WindowStage


class SparkEngine:
    """Runs plans on Spark. `root` is the repository's folder, where relative source paths start.

    Spark starts when a retrieval first needs it, on `master` (all cores of this machine unless told), with further
    settings `conf`. Raises ConfigError then, where PySpark or Java is missing. `erasures` says whose records are left
    out, once a retrieval.
    """

    def __init__(
        self,
        root: Path,
        master: str | None = None,
        conf: Mapping[str, Any] = MappingProxyType({}),
        sizes: Sizes | None = None,
        erasures: LoadErasures = no_erasures,
    ) -> None:
        self._root, self._erasures = root, erasures
        self._session = Session(master, conf)
        self._sizes = sizes or Sizes()

    def close(self) -> None:
        self._session.close()

    def retrieve(self, plan: HistoricalPlan, spine: Any, finish: Finish) -> SparkRetrieved:
        return SparkRetrieved(self._session, self._root, plan, spine, finish, self._sizes, self._erasures())

    def reading(self, stage: AsOfStage | WindowStage, first: int | None, last: int | None) -> Reading:
        if isinstance(stage, AsOfStage):
            found = as_of_scan(stage, self._root, first, last, self._erasures())
        else:
            found = window_scan(stage, self._root, first, last, self._erasures())
        return Reading(found.sql(), found.files, found.files_in_all, found.read, found.rows)
