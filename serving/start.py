"""Starts the feature server of a repository, without importing Feast."""

from __future__ import annotations

import logging
from pathlib import Path

from feature_store.clock import SystemClock
from feature_store.config import load_config
from feature_store.layer import FeatureLayer
from serving.current import ensure_compiled
from serving.feature_requests import Limits
from serving.features import FeatureServer
from serving.server import run


def serve_features(repo: Path, host: str, port: int, limits: Limits) -> None:
    """Serves a repository's features until the process is told to stop.

    Raises ConfigError where there is no applied repository, ServerNotStarted where it cannot listen.
    """
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("serving").setLevel(logging.INFO)
    ensure_compiled(load_config(repo))
    clock = SystemClock()
    with FeatureLayer(repo, clock=clock) as layer:
        run(FeatureServer(layer, clock, limits=limits), host, port)
