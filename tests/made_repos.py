"""Repositories as an apply leaves them, made without Feast: for tests of what starts from the compiled definitions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from feature_store.config import compiled_beside
from feature_store.definitions.repository import Definitions
from feature_store.definitions.view import Service, View
from feature_store.files import replacing

PROJECT = "made"


def make_repo(
    folder: Path,
    views: Iterable[View],
    services: Iterable[Service] = (),
    online: Mapping[str, Any] | None = None,
    state: str = "first",
) -> Path:
    """A repository with these definitions; `online` are entries of its online_store, `state` tells one apply from
    another. The registry's content means nothing: only Feast reads it.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    config = {"project": PROJECT, "registry": "data/registry.db", "provider": "local", "online_store": online or {}}
    (folder / "feature_store.yaml").write_text(json.dumps(config))
    write_registry(folder, state)
    write_compiled(folder, views, services, state)
    return folder


def write_registry(folder: Path, state: str) -> None:
    """The registry after an apply whose definitions are not compiled yet."""
    (folder / "data" / "registry.db").write_text(state)


def write_compiled(folder: Path, views: Iterable[View], services: Iterable[Service], state: str) -> None:
    """The compiled definitions that the applying process leaves at its end."""
    definitions = Definitions(
        project=PROJECT,
        stamp=hashlib.sha256(state.encode()).hexdigest(),
        views={view.name: view for view in views},
        services={service.name: service for service in services},
    )
    with replacing(compiled_beside(folder / "data" / "registry.db")) as temporary:
        definitions.save(temporary)
