"""Feast's registry file, read without opening it through Feast, and the compiled definitions that lie beside it."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.registry.registry import Registry
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from google.protobuf.message import DecodeError

from feature_store.adapters.feast.compile import DUMMY_KEY, compile_registry
from feature_store.config import RepoConfig, compiled_beside
from feature_store.definitions.repository import Definitions
from feature_store.errors import ConfigError, IsochronError, StoreError
from feature_store.stores.online.store import OnlineStore

_TRIES, _PAUSE = 50, 0.02


def read_registry(path: Path) -> bytes:
    """The registry file's bytes. Feast truncates, then writes: an empty file is read again for up to a second.

    Raises ConfigError when there is no registry (opening it through Feast would create one).
    """
    for _ in range(_TRIES):
        if not path.is_file():
            raise ConfigError(f"there is no registry at {path}; run `feast apply` (or `isochron apply`) first.")
        if content := path.read_bytes():
            return content
        time.sleep(_PAUSE)
    raise ConfigError(f"the registry at {path} is empty; run `feast apply` again.")


def stamp_of(content: bytes) -> str:
    """What tells one state of the registry from another."""
    return hashlib.sha256(content).hexdigest()


def compile_file(registry: Path, project: str) -> Definitions:
    """The definitions in a registry file, also left beside it for readers without Feast."""
    content = read_registry(registry)
    definitions = compile_registry(RegistryProto.FromString(content), project, stamp_of(content))
    definitions.save(compiled_beside(registry))
    return definitions


def compile_repository(config: RepoConfig) -> Definitions:
    """The definitions of a repository, from its registry."""
    return compile_file(config.registry, config.project)


@dataclass(frozen=True, eq=False)
class Registered:
    """What one state of the registry says of a project: the definitions, and what only Feast's own interface knows of:
    each entity's join key, views that are switched off, and their versions.
    """

    definitions: Definitions
    join_keys: Mapping[str, str]
    switched_off: frozenset[str]
    versions: Mapping[str, int]

    @classmethod
    def of(cls, proto: RegistryProto, project: str) -> Registered:
        """Raises DefinitionError for what the contract refuses."""
        kinds = (proto.feature_views, proto.stream_feature_views, proto.on_demand_feature_views)
        views = [view for views in kinds for view in views if view.spec.project == project]
        entities = [e.spec for e in proto.entities if e.spec.project == project and e.spec.join_key != DUMMY_KEY]
        return cls(
            compile_registry(proto, project, proto.version_id),
            {entity.name: entity.join_key for entity in entities},
            frozenset(view.spec.name for view in views if view.spec.disabled),
            {view.spec.name: view.meta.current_version_number for view in views},
        )


_compiled: dict[str, tuple[str, Registered]] = {}


def registered(registry: BaseRegistry, project: str) -> Registered:
    """What a registry that Feast holds says, compiled once a version."""
    proto = _cached(registry, project)
    known = _compiled.get(project)
    if known is None or known[0] != proto.version_id:
        known = _compiled[project] = proto.version_id, Registered.of(proto, project)
    return known[1]


def definitions_of(registry: BaseRegistry, project: str) -> Definitions:
    """The definitions in a registry that Feast holds."""
    return registered(registry, project).definitions


def _cached(registry: BaseRegistry, project: str) -> RegistryProto:
    """The registry as Feast has it cached; a file that was caught empty or cut off, as an apply writes it, is read
    again for up to a second.
    """
    for _ in range(_TRIES if isinstance(registry, Registry) else 1):
        with contextlib.suppress(DecodeError):
            # A look-up, unlike proto(), refreshes a cache that has run out; Feast remembers the answer to this one.
            registry.list_entities(project, allow_cache=True)
            if registry.proto().version_id:
                break
        time.sleep(_PAUSE)
        with contextlib.suppress(DecodeError):
            registry.refresh(project)
    return registry.proto()


_armed: set[tuple[Path, OnlineStore]] = set()


def compile_at_exit(registry: Path, store: OnlineStore) -> None:
    """Compiles the definitions when this process ends: Feast has no hook after it commits an apply. Views that are no
    longer declared leave the online store then, so that one declared again starts anew.
    """
    if (registry, store) not in _armed:
        _armed.add((registry, store))
        atexit.register(_compile_committed, registry, store)


def _compile_committed(registry: Path, store: OnlineStore) -> None:
    """An apply that failed after our checks leaves the old registry, or none; its readers compile when they come."""
    try:
        definitions = compile_file(registry, store.project)
    except IsochronError:
        compiled_beside(registry).unlink(missing_ok=True)
        return
    try:
        store.keep_only(definitions.views)
    except StoreError as error:
        # The apply stands. What was dropped is still in the store, and goes with the next apply.
        click.echo(
            f"views no longer declared, if the online store holds any, were left in it: {error}",
            err=True,
        )
