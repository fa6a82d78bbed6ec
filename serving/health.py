"""Whether the online store can answer: asked of each view that the service reads, not remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feature_store.definitions.view import StoredView
from feature_store.errors import StoreNotReady
from feature_store.layer import FeatureLayer
from feature_store.retrieval.online import Prepared
from feature_store.stores.online.store import OnlineStore
from serving.current import Served


@dataclass(frozen=True)
class Readiness:
    """The views that must be whole in the store, by name."""

    store: OnlineStore
    views: Mapping[str, StoredView]

    @classmethod
    def of(cls, layer: FeatureLayer, handle: Prepared) -> Readiness:
        """The readiness of the views behind a handle."""
        return cls(layer.store, {view.name: view for view, _ in handle.request.by_view()})

    def not_ready(self) -> dict[str, str]:
        """Why each view that cannot answer cannot, by name; empty when all can."""
        return {name: reason for name, view in self.views.items() if (reason := self._problem(view))}

    def _problem(self, view: StoredView) -> str | None:
        try:
            self.store.check(view)
        except StoreNotReady as error:
            return error.reason
        return None


class FeatureHealth:
    """Whether all online views can answer. A view that came with a later apply does not make the server unready before
    it was filled for the first time: what is served already goes on.
    """

    def __init__(self, layer: FeatureLayer) -> None:
        self._store = layer.store
        self._known = {view.name for view in layer.definitions.stored_views() if view.online}

    def told(self, served: Served) -> tuple[bool, dict[str, Any]]:
        """Whether the server is ready, and what is to be said of it: views that are not ready, and why; views that are
        served by their former definitions; new views that were never filled.
        """
        views = {view.name: view for view in served.definitions.stored_views() if view.online}
        problems = Readiness(self._store, views).not_ready()
        self._known |= views.keys() - problems.keys()
        not_ready = {name: problem for name, problem in problems.items() if name in self._known}
        return not not_ready, {
            "status": "not ready" if not_ready else "ready",
            "not_ready": not_ready,
            "waiting": sorted(served.waiting),
            "new": sorted(problems.keys() - self._known),
            "definitions": served.applied.stamp,
        }
