"""Whether the online store can answer: asked of each view that the service reads, not remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feature_store.definitions.view import StoredView
from feature_store.errors import StoreNotReady
from feature_store.layer import FeatureLayer
from feature_store.retrieval.online import Prepared
from feature_store.stores.online.store import OnlineStore


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
