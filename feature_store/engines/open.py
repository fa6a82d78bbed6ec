"""Opens the engine that a repository names for its history."""

from __future__ import annotations

from feature_store.config import RepoConfig
from feature_store.definitions.erasure import LoadErasures
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.engines.engine import DistributedEngine, Engine


def open_engine(config: RepoConfig, erasures: LoadErasures) -> Engine | DistributedEngine:
    """The engine of `offline_store: engine:`, which leaves out what `erasures` say; pyspark is imported only where it
    is Spark.
    """
    if config.engine == "spark":
        from feature_store.engines.spark.engine import SparkEngine

        return SparkEngine(config.root, config.spark_master, config.spark_conf, erasures=erasures)
    return DuckDBEngine(config.root, config.memory_limit, erasures)
