"""Opens the online store that a repository's configuration names."""

from __future__ import annotations

from feature_store.config import OnlineConfig
from feature_store.errors import ConfigError
from feature_store.stores.online.backend import Backend
from feature_store.stores.online.embedded import EmbeddedBackend


def open_backend(config: OnlineConfig) -> Backend:
    """The backend of a configuration; nothing is connected to or made before it is used.

    Raises ConfigError where what it needs is not installed, or its settings cannot be read.
    """
    if config.backend == "embedded":
        return EmbeddedBackend(config.path)
    try:
        from feature_store.stores.online.redis.backend import RedisBackend
    except ImportError as error:
        raise ConfigError(
            f"backend: redis needs the packages of the extra 'redis' ({error.name} is missing); "
            "install isochron-features[redis]."
        ) from error
    return RedisBackend(config)
