"""Feast's own side: the stores that it ships, through its own SDK."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa


def feast_history(repo: str) -> Callable[..., pa.Table]:
    """Historical retrieval with the offline store that the repository names, from files on disk to an Arrow table.

    Feast takes its entity rows as pandas only: reading them is in the time, as it is for the others.
    """
    import pandas as pd
    from feast import FeatureStore

    store = FeatureStore(repo)

    def run(spine: str, features: Sequence[str]) -> pa.Table:
        return store.get_historical_features(pd.read_parquet(spine), list(features)).to_arrow()

    return run
