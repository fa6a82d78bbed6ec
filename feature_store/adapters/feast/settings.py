"""What our plug-ins take from a Feast configuration: the repository's folder, paths in it, and the engine."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from feast.repo_config import RepoConfig as FeastConfig

from feature_store.config import OnlineConfig, RepoConfig, erasures_beside, online_config
from feature_store.definitions.erasure import LoadErasures
from feature_store.errors import SourceError
from feature_store.stores.erasure_log import ErasureLog
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.store import OnlineStore


def root_of(config: FeastConfig) -> Path:
    """The repository's folder, where relative paths start."""
    return Path(config.repo_path or ".").resolve()


def local_path(config: FeastConfig, path: str, what: str) -> Path:
    """A path of the configuration on this machine's disk; raises SourceError for any other place."""
    plain = path.removeprefix("file://")
    if "://" in plain:
        raise SourceError(f"{what}: {path} is not a local path; only local files are read and written yet.")
    return root_of(config) / plain


def engine_config(config: FeastConfig) -> RepoConfig:
    """The part of a configuration that names the engine for history. Engines read neither registry nor online store."""
    root, offline = root_of(config), config.offline_store
    return RepoConfig(
        root=root,
        project=config.project,
        registry=root / str(config.registry.path),
        online=OnlineConfig(path=root),
        memory_limit=offline.memory_limit,
        engine=offline.engine,
        spark_master=offline.spark_master,
        spark_conf=offline.spark_conf,
    )


@lru_cache(maxsize=8)
def _log(path: Path, project: str) -> ErasureLog:
    return ErasureLog(path, project)


def erasures(config: FeastConfig, project: str | None = None) -> LoadErasures:
    """The erasures of a configuration's project, or of another one in its registry."""
    return _log(erasures_beside(root_of(config) / str(config.registry.path)), project or config.project).load


@lru_cache(maxsize=8)
def _store(online: OnlineConfig, project: str, erasures: LoadErasures, process: int) -> OnlineStore:
    return OnlineStore(open_backend(online), project, erasures=erasures)


def online_store(config: FeastConfig, project: str | None = None) -> OnlineStore:
    """The online store of a configuration, one a place, project and process: what it learns of its views is kept."""
    settings = online_config(root_of(config), config.online_store.model_dump())
    project = project or config.project
    return _store(settings, project, erasures(config, project), os.getpid())
