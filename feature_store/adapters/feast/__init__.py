"""The plug-ins that Feast loads by these names, and the helper that writes windowed views."""

# Before Feast: importing it turns on the multi-process mode of whoever imports prometheus_client afterwards, in which
# an app's own registry shows no totals.
import prometheus_client  # noqa: F401

from feature_store.adapters.feast.engine import IsochronEngine
from feature_store.adapters.feast.offline_store import IsochronOfflineStore, IsochronOfflineStoreConfig
from feature_store.adapters.feast.online_store import IsochronOnlineStore, IsochronOnlineStoreConfig
from feature_store.adapters.feast.views import aggregate, windowed_view

__all__ = [
    "IsochronEngine",
    "IsochronOfflineStore",
    "IsochronOfflineStoreConfig",
    "IsochronOnlineStore",
    "IsochronOnlineStoreConfig",
    "aggregate",
    "windowed_view",
]
