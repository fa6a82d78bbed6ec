"""The definitions that a server answers by: those of the registry, taken into service while it runs.

A view whose definition changed is not read by the new one before the store is filled for it. Until then it stays as it
was, and so does all that reads it (on-demand views, services), so that whoever asks gets what they got. What is only in
the new definitions is *not ready* meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from feature_store.clock import Clock
from feature_store.config import RepoConfig
from feature_store.definitions.repository import Definitions
from feature_store.definitions.view import FeatureRef, OnDemandView, StoredView, View
from feature_store.errors import ConfigError, IsochronError, StoreNotReady, UnknownName
from feature_store.layer import FeatureLayer
from feature_store.monitoring.metrics import FeatureServerMetrics
from feature_store.timestamps import MINUTE, SECOND

logger = logging.getLogger(__name__)

#: How long a changed registry may lack its compiled definitions before they are made here (microseconds): whoever
#: applied compiles at its end. After a failure the wait doubles, up to the longest.
PATIENCE, LONGEST_PATIENCE = 5 * SECOND, 5 * MINUTE

_COMPILE_SECONDS = 120.0

#: Feast is imported in a process of its own: a server does without.
_COMPILE = """
import sys
from feature_store.adapters.feast.registry import compile_repository
from feature_store.config import load_config
from feature_store.errors import IsochronError
try:
    compile_repository(load_config(sys.argv[1]))
except IsochronError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True)
class Served:
    """`applied` are the registry's definitions, `definitions` those that are answered by: the same but for the views
    `waiting` for their store, and what reads them.
    """

    applied: Definitions
    definitions: Definitions
    waiting: frozenset[str] = frozenset()


def stamp_of(config: RepoConfig) -> str:
    """What tells the registry's state from another; empty where it has none (it is being written)."""
    try:
        content = config.registry.read_bytes()
    except OSError:
        return ""
    return hashlib.sha256(content).hexdigest() if content else ""


def load_compiled(config: RepoConfig) -> Definitions | None:
    """The compiled definitions, or None where they are not those of the registry as it is."""
    try:
        compiled = Definitions.load(config.compiled)
    except ConfigError:  # not there, or of another version
        return None
    return compiled if compiled.stamp == stamp_of(config) else None


def compile_apart(root: Path) -> None:
    """Compiles the definitions of a repository in a process of its own. Raises ConfigError with what it said."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, str(root)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired as cause:
        raise ConfigError(f"{root}: compiling the definitions took over {_COMPILE_SECONDS:g} s.") from cause
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(said[-1] if said else f"{root}: compiling ended with {done.returncode}.")


def ensure_compiled(config: RepoConfig, compile_in: Callable[[Path], None] = compile_apart) -> None:
    """Compiles the definitions where they are not those of the registry. Raises ConfigError."""
    if config.registry.is_file() and load_compiled(config) is None:
        compile_in(config.root)


def serve(applied: Definitions, before: Definitions, filled: Callable[[StoredView], bool]) -> Served:
    """What to answer by after an apply: `before` is what was answered by, `filled` tells whether the store holds a
    view by that very definition.
    """
    waiting = frozenset(v.name for v in applied.stored_views() if _waits(v, before.views.get(v.name), filled))
    if not waiting:
        return Served(applied, applied)
    views = {name: before.views[name] if name in waiting else view for name, view in applied.views.items()}
    held = set(waiting)
    for name, view in applied.views.items():
        if isinstance(view, OnDemandView) and _reads(view.inputs, waiting):
            held.add(name)
            former = before.views.get(name)
            if isinstance(former, OnDemandView) and _whole(former.inputs, views):
                views[name] = former
            else:
                del views[name]
    services = dict(applied.services)
    for name, service in applied.services.items():
        if _reads(service.features, held):
            old = before.services.get(name)
            if old is not None and _whole(old.features, views):
                services[name] = old
            else:
                del services[name]
    return Served(applied, msgspec.structs.replace(applied, views=views, services=services), waiting)


def _waits(view: StoredView, before: View | None, filled: Callable[[StoredView], bool]) -> bool:
    """Whether a view changed and the store is still filled for its former definition."""
    if before is None or isinstance(before, OnDemandView) or view.fingerprint == before.fingerprint:
        return False
    return not filled(view) and filled(before)


def _reads(refs: Iterable[FeatureRef], views: Container[str]) -> bool:
    return any(ref.view in views for ref in refs)


def _whole(refs: Iterable[FeatureRef], views: Mapping[str, View]) -> bool:
    """Whether all that is referred to is there."""
    try:
        return all(ref.view in views and views[ref.view].feature_type(ref.feature) for ref in refs)
    except UnknownName:
        return False


class CurrentDefinitions:
    """Keeps up with a layer's repository. `served` is replaced, never changed: a request sees one state throughout.

    The layer's own definitions follow, so that pushes and reads go by the same. `compile_in` makes the compiled
    definitions of a folder where whoever applied left none.
    """

    def __init__(
        self,
        layer: FeatureLayer,
        clock: Clock,
        metrics: FeatureServerMetrics,
        compile_in: Callable[[Path], None] = compile_apart,
    ) -> None:
        self._layer, self._clock, self._metrics, self._compile_in = layer, clock, metrics, compile_in
        self._lock = threading.Lock()
        self._seen: object = None
        # Since when the registry is ahead of the compiled definitions, and how long that is borne.
        self._ahead_since: int | None = None
        self._patience = PATIENCE
        self._shown: tuple[str, str] | None = None
        self.served = Served(layer.definitions, layer.definitions)
        self._show(self.served)

    async def refresh(self) -> bool:
        """Looks whether anything changed, without holding up the event loop; whether it did."""
        before = self.served
        try:
            await asyncio.to_thread(self.look)
        except (IsochronError, OSError) as error:
            logger.warning("the definitions cannot be looked at now: %s", error)
        return self.served is not before

    async def keep_up(self, period: float) -> None:
        """Looks every `period` seconds, until cancelled."""
        while True:
            await asyncio.sleep(period)
            await self.refresh()
            await asyncio.to_thread(self.compile_if_due)

    def look(self) -> bool:
        """Takes what changed, in the registry or in the store, into service; whether anything did.

        Raises StoreError where the store is to be asked and does not answer.
        """
        with self._lock:
            applied = self._applied()
            if applied is self.served.applied and not self.served.waiting:
                return False
            served = serve(applied, self.served.definitions, self._filled)
            if applied is self.served.applied and served.waiting == self.served.waiting:
                return False
            if applied is not self.served.applied:
                logger.info("the registry changed: definitions %s are in service", applied.stamp[:12])
                self._metrics.reloads.labels("taken").inc()
            self.served = served
            self._layer.definitions = served.definitions
            self._show(served)
            return True

    def _applied(self) -> Definitions:
        """The registry's definitions, or those known before while there are no others to be had."""
        config, known = self._layer.config, self.served.applied
        seen = _state(config.registry), _state(config.compiled)
        if seen == self._seen:
            return known
        found = known if stamp_of(config) == known.stamp else load_compiled(config)
        self._seen = seen
        if found is None:
            self._ahead_since = self._ahead_since or self._clock.now()
            return known
        self._ahead_since, self._patience = None, PATIENCE
        return found

    def _filled(self, view: StoredView) -> bool:
        try:
            self._layer.store.view(view).generations.current()
        except StoreNotReady:
            return False
        return True

    def compile_if_due(self) -> None:
        """Compiles the definitions where whoever changed the registry left none for long; the next look finds them."""
        if self._ahead_since is None or self._clock.now() - self._ahead_since < self._patience:
            return
        try:
            self._compile_in(self._layer.config.root)
        except ConfigError as error:
            logger.warning("the registry changed, but its definitions cannot be compiled: %s", error)
            self._metrics.reloads.labels("failed").inc()
            self._ahead_since, self._patience = self._clock.now(), min(2 * self._patience, LONGEST_PATIENCE)

    def _show(self, served: Served) -> None:
        # Labels are not removed: where Prometheus gathers from several processes it cannot.
        if self._shown is not None:
            self._metrics.definitions.labels(*self._shown).set(0)
        self._shown = served.applied.project, served.applied.stamp
        self._metrics.definitions.labels(*self._shown).set(1)
        self._metrics.views_waiting.set(len(served.waiting))
        if served.waiting:
            logger.info("changed, and served as they were until filled: %s", ", ".join(sorted(served.waiting)))


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
