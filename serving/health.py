"""Whether the online store can answer: asked of each view that the service reads, not remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feature_store.definitions.view import StoredView, WindowedView
from feature_store.errors import StoreNotReady
from feature_store.layer import FeatureLayer
from feature_store.retrieval.online import Prepared


@dataclass(frozen=True)
class Readiness:
    """A read of one feature of each view, for a null key: it fetches nothing, but the view must be there."""

    probes: Mapping[str, Prepared]

    @classmethod
    def of(cls, layer: FeatureLayer, handle: Prepared) -> Readiness:
        """The readiness of the views behind a handle."""
        views = {view.name: view for view, _ in handle.request.by_view()}
        return cls({name: layer.prepare([f"{name}:{_any_feature(view)}"]) for name, view in views.items()})

    def not_ready(self, now: int) -> dict[str, str]:
        """Why each view that cannot answer cannot, by name; empty when all can. `now` in microseconds."""
        return {name: reason for name, probe in self.probes.items() if (reason := _problem(probe, now))}


def _any_feature(view: StoredView) -> str:
    named = view.aggregations if isinstance(view, WindowedView) else view.features
    return named[0].name


def _problem(probe: Prepared, now: int) -> str | None:
    try:
        probe.read({key: [None] for key in probe.keys}, now)
    except StoreNotReady as error:
        return error.reason
    return None
