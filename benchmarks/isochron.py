"""Isochron's side: a layer over an applied repository, as a person opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa


def history(repo: str) -> Callable[..., pa.Table]:
    """Historical retrieval, from files on disk to an Arrow table."""
    from feature_store import FeatureLayer

    layer = FeatureLayer(repo)

    def run(spine: str, features: Sequence[str]) -> pa.Table:
        return layer.get_historical_features(spine, list(features)).to_arrow()

    return run
