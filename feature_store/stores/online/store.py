"""The online store of one project: its views, behind one backend."""

from __future__ import annotations

from collections.abc import Iterable

from feature_store.definitions.erasure import LoadErasures, no_erasures
from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.stores.online.backend import Backend
from feature_store.stores.online.generations import forget, names_of
from feature_store.stores.online.keys import project_tails, views_key
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.windowed import SETTLE, WindowedOnline


class OnlineStore:
    """Where a project's values are served from. `settle` as in WindowedOnline; `erasures` says whose records are not
    written.

    Views are kept by their definition: what a view's object learns of the store serves the reads that follow.
    """

    def __init__(
        self, backend: Backend, project: str, settle: int = SETTLE, erasures: LoadErasures = no_erasures
    ) -> None:
        self.backend, self.project, self.settle, self.erasures = backend, project, settle, erasures
        self._views: dict[str, PlainOnline | WindowedOnline] = {}

    def windowed(self, view: WindowedView) -> WindowedOnline:
        online = self.view(view)
        assert isinstance(online, WindowedOnline)
        return online

    def plain(self, view: PlainView) -> PlainOnline:
        online = self.view(view)
        assert isinstance(online, PlainOnline)
        return online

    def view(self, view: StoredView) -> WindowedOnline | PlainOnline:
        held = self._views.get(view.name)
        # A definition's identity is enough most times, and much cheaper than its equality.
        if held is None or (held.view is not view and held.view != view):
            held = self._views[view.name] = self._open(view)
        return held

    def _open(self, view: StoredView) -> WindowedOnline | PlainOnline:
        if isinstance(view, WindowedView):
            return WindowedOnline(self.backend, self.project, view, self.settle, self.erasures)
        return PlainOnline(self.backend, self.project, view, self.erasures)

    def holds(self, view: StoredView) -> bool:
        """Whether the store was ever filled for a view, or for another definition of it."""
        return self.view(view).generations.exists()

    def check(self, view: StoredView) -> None:
        """Raises StoreNotReady unless all records that reads of a view need are there."""
        self.view(view).generations.check()

    def delete_view(self, name: str) -> None:
        """Forgets a view, in all its generations."""
        if self.backend.exists():
            forget(self.backend, self.project, name)

    def keep_only(self, views: Iterable[str]) -> None:
        """Forgets every view of this project that is not among these: one that is declared again starts anew."""
        if self.backend.exists():
            held = names_of(self.backend.get([views_key(self.project)])[0])
            for name in sorted(held - set(views)):
                self.delete_view(name)

    def delete_project(self) -> None:
        """Forgets every view of this project, and of no other."""
        if self.backend.exists():
            self.keep_only(())
            self.backend.delete(self.backend.scan(*project_tails(self.project)))
