"""The online store of one project: its views, behind one file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from feature_store.definitions.view import PlainView, StoredView, WindowedView
from feature_store.stores.online.embedded import EmbeddedBackend, Snapshot
from feature_store.stores.online.keys import KINDS, Keyspace, claim_key, generation_key, project_prefixes, view_of
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.records import check_ready
from feature_store.stores.online.windowed import SETTLE, WindowedOnline


@dataclass(frozen=True)
class OnlineStore:
    """Where a project's values are served from. `settle` as in WindowedOnline."""

    backend: EmbeddedBackend
    project: str
    settle: int = SETTLE

    def windowed(self, view: WindowedView) -> WindowedOnline:
        return WindowedOnline(self.backend, self.project, view, self.settle)

    def plain(self, view: PlainView) -> PlainOnline:
        return PlainOnline(self.backend, self.project, view)

    def view(self, view: StoredView) -> WindowedOnline | PlainOnline:
        return self.windowed(view) if isinstance(view, WindowedView) else self.plain(view)

    def holds(self, txn: Snapshot, view: StoredView) -> bool:
        """Whether the store was ever filled for a view, or for another definition of it."""
        return txn.get(generation_key(self.project, view.name)) is not None

    def check(self, view: StoredView) -> None:
        """Raises StoreNotReady unless all records that reads of a view need are there."""
        with self.backend.reading() as txn:
            check_ready(txn, self.project, view)

    def delete_view(self, name: str) -> None:
        """Forgets a view, in all its generations."""
        if not self.backend.exists():
            return
        with self.backend.writing() as txn:
            txn.delete(generation_key(self.project, name))
            txn.delete(claim_key(self.project, name))
            for kind in KINDS:
                txn.delete_prefix(Keyspace(self.project, name, 0).every_generation(kind))

    def keep_only(self, views: Iterable[str]) -> None:
        """Forgets every view of this project that is not among these: one that is declared again starts anew."""
        if not self.backend.exists():
            return
        with self.backend.reading() as txn:
            held = [view_of(key) for key, _ in txn.scan(project_prefixes(self.project)[0])]
        for name in set(held) - set(views):
            self.delete_view(name)

    def delete_project(self) -> None:
        """Forgets every view of this project, and of no other."""
        if not self.backend.exists():
            return
        with self.backend.writing() as txn:
            for prefix in project_prefixes(self.project):
                txn.delete_prefix(prefix)
