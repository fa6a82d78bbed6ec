"""Which line of a Spark error a person is told."""

from __future__ import annotations

from feature_store.engines.spark.failures import first_reason

SEVERAL = """An error occurred while calling o4225.collectToPython.
: org.apache.spark.SparkException: [STAGE_MATERIALIZATION_MULTIPLE_FAILURES] Multiple failures (2) in stage:
  1. SparkException: [FAILED_READ_FILE.NO_HINT] Encountered error while reading file file:///data/a.parquet.
  2. SparkException: [FAILED_READ_FILE.NO_HINT] Encountered error while reading file file:///data/a.parquet.
\tat org.apache.spark.sql.errors.QueryExecutionErrors$.multiFailures(QueryExecutionErrors.scala:2037)
"""


def test_of_several_failures_the_first_is_told_not_that_there_are_several() -> None:
    assert "[FAILED_READ_FILE.NO_HINT] Encountered error while reading file file:///data/a.parquet" in first_reason(
        SEVERAL
    )
