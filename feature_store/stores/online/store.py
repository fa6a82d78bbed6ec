"""The online store of one project: its views, behind one file."""

from __future__ import annotations

from dataclasses import dataclass

from feature_store.definitions.view import PlainView, WindowedView
from feature_store.stores.online.embedded import EmbeddedBackend
from feature_store.stores.online.keys import Keyspace, generation_key, project_prefixes
from feature_store.stores.online.plain import PlainOnline
from feature_store.stores.online.records import Generation
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

    def delete_view(self, name: str) -> None:
        """Forgets a view: its generation record first, so that readers never see half of it."""
        if not self.backend.exists():
            return
        with self.backend.writing() as txn:
            record = txn.get(generation_key(self.project, name))
            if record is None:
                return
            txn.delete(generation_key(self.project, name))
            space = Keyspace(self.project, name, Generation.decode(record).number)
            for kind in (b"B", b"S", b"H", b"P"):
                txn.delete_prefix(space.prefix(kind))

    def delete_project(self) -> None:
        """Forgets every view of this project, and of no other."""
        if not self.backend.exists():
            return
        with self.backend.writing() as txn:
            for prefix in project_prefixes(self.project):
                txn.delete_prefix(prefix)
