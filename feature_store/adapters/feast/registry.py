"""Feast's registry file, read without opening it through Feast, and the compiled definitions that lie beside it."""

from __future__ import annotations

import atexit
import hashlib
import time
from functools import lru_cache
from pathlib import Path

from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto

from feature_store.adapters.feast.compile import compile_registry
from feature_store.config import RepoConfig, compiled_beside
from feature_store.definitions.repository import Definitions
from feature_store.errors import ConfigError, IsochronError

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


@lru_cache(maxsize=8)
def _of_version(project: str, version: str, content: bytes) -> Definitions:
    return compile_registry(RegistryProto.FromString(content), project, version)


def definitions_of(proto: RegistryProto, project: str) -> Definitions:
    """The definitions in a registry that Feast holds, compiled once a version."""
    return _of_version(project, proto.version_id, proto.SerializeToString(deterministic=True))


_armed: set[tuple[Path, str]] = set()


def compile_at_exit(registry: Path, project: str) -> None:
    """Compiles the definitions when this process ends: Feast has no hook after it commits an apply."""
    if (registry, project) not in _armed:
        _armed.add((registry, project))
        atexit.register(_compile_committed, registry, project)


def _compile_committed(registry: Path, project: str) -> None:
    """An apply that failed after our checks leaves the old registry, or none; its readers compile when they come."""
    try:
        compile_file(registry, project)
    except IsochronError:
        compiled_beside(registry).unlink(missing_ok=True)
