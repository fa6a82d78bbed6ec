"""What we read of a repository's `feature_store.yaml`: the three lines that turn Isochron on, and where things lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from feature_store.errors import ConfigError

ONLINE_BACKENDS = ("embedded", "redis")
REDIS_TYPES = ("redis", "redis_cluster", "redis_sentinel")
ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class OnlineConfig:
    """Where online values lie: in the folder `path` of an embedded store, or in Redis.

    For Redis the names are those of Feast's own store: `redis_type` (redis, redis_cluster or redis_sentinel),
    `connection_string` (`host:port,host:port,db=0,username=...,password=...,ssl=true,ssl_ca_certs=path`) and
    `sentinel_master`. `timeout` is how long a request to it may take, retries included, in seconds.
    """

    backend: str = "embedded"
    path: Path = Path("data/online.lmdb")
    redis_type: str = "redis"
    connection_string: str = field(default="localhost:6379", repr=False)
    sentinel_master: str = "mymaster"
    timeout: float = 2.0


@dataclass(frozen=True)
class RepoConfig:
    """A repository's folder, its project name, the resolved path of its registry, and where online values lie; the
    engine that computes history, `memory_limit` as DuckDB writes it (`4GB`), and for Spark the master's URL and further
    settings.
    """

    root: Path
    project: str
    registry: Path
    online: OnlineConfig
    memory_limit: str | None = None
    engine: str = "duckdb"
    spark_master: str | None = None
    spark_conf: Mapping[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> Path:
        """The compiled definitions file that apply leaves beside the registry."""
        return compiled_beside(self.registry)

    @property
    def erasures(self) -> Path:
        """The log of erasures, beside the registry too."""
        return erasures_beside(self.registry)


def compiled_beside(registry: Path) -> Path:
    """Where the compiled definitions of a registry file lie."""
    return registry.with_name(registry.stem + ".isochron.json")


def erasures_beside(registry: Path) -> Path:
    """Where the log of the erasures of a registry file's projects lies."""
    return registry.with_name(registry.stem + ".erasures.jsonl")


def load_config(root: str | os.PathLike[str]) -> RepoConfig:
    """Reads `feature_store.yaml` in `root` (environment variables expanded, as Feast does).

    Raises ConfigError that names the file and the entry when something cannot be used.
    """
    folder = Path(root).resolve()
    path = folder / "feature_store.yaml"
    try:
        content = yaml.safe_load(os.path.expandvars(path.read_text()))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the folder of a Feast repository (--repo)."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content.get("project"):
        raise ConfigError(f"{path} names no project.")
    online, offline = content.get("online_store") or {}, content.get("offline_store") or {}
    offline = offline if isinstance(offline, dict) else {}
    if (engine := offline.get("engine", "duckdb")) not in ENGINES:
        raise ConfigError(f"{path}: offline_store engine '{engine}' is not one of: {', '.join(ENGINES)}.")
    return RepoConfig(
        root=folder,
        project=content["project"],
        registry=folder / registry_path(content.get("registry"), path),
        online=online_config(folder, online if isinstance(online, dict) else {}),
        memory_limit=offline.get("memory_limit"),
        engine=engine,
        spark_master=offline.get("spark_master"),
        spark_conf=offline.get("spark_conf") or {},
    )


def registry_path(registry: Any, where: Path) -> Path:
    """The path of a file registry; other kinds are refused, for definitions are read from the file."""
    if isinstance(registry, dict):
        if registry.get("registry_type", "file") != "file":
            raise ConfigError(f"{where}: registry_type '{registry['registry_type']}' is not supported; use a file.")
        registry = registry.get("path")
    if not isinstance(registry, str) or "://" in registry:
        raise ConfigError(f"{where}: registry must be the path of a local file, not {registry!r}.")
    return Path(registry)


def online_config(root: Path, online: Mapping[str, Any]) -> OnlineConfig:
    """The `online_store` entries of a repository in a folder. Raises ConfigError for values that cannot be used."""
    backend = online.get("backend", "embedded")
    if backend not in ONLINE_BACKENDS:
        raise ConfigError(f"online_store backend '{backend}' is not one of: {', '.join(ONLINE_BACKENDS)}.")
    redis_type = online.get("redis_type") or OnlineConfig.redis_type
    if redis_type not in REDIS_TYPES:
        raise ConfigError(f"online_store redis_type '{redis_type}' is not one of: {', '.join(REDIS_TYPES)}.")
    timeout = online.get("timeout", OnlineConfig.timeout)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 3_600:
        raise ConfigError(f"online_store timeout must be a number of seconds, above 0 and up to 3600, not {timeout!r}.")
    return OnlineConfig(
        backend,
        root / _text(online, "path", OnlineConfig.path),
        redis_type,
        online.get("connection_string") or "localhost:6379",
        _text(online, "sentinel_master", OnlineConfig.sentinel_master),
        float(timeout),
    )


def _text(online: Mapping[str, Any], name: str, default: str | Path) -> str:
    value = online.get(name) or default
    if not isinstance(value, str | Path):
        raise ConfigError(f"online_store {name} must be text, not {value!r}.")
    return str(value)
