"""Errors on their way from executors to the caller: typed ones arrive as what they were, Spark's own as ours."""

from __future__ import annotations

import base64
import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from feature_store.errors import IsochronError, SourceError

_MARK = re.compile(r"isochron-error:([A-Za-z0-9+/=]+):")

#: Spark's conditions that say what its input holds, not how a cluster fares.
_OF_DATA = ("FAILED_READ_FILE", "CAST_", "NUMERIC_VALUE_OUT_OF_RANGE", "ARITHMETIC_OVERFLOW", "USER_RAISED_EXCEPTION")
#: How a traceback in a text ends.
_RAISED = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)$", re.MULTILINE)
_CONDITION = re.compile(r"\[([A-Z][A-Z0-9_.]+)\][^\n]*")


class _Crossing(RuntimeError):
    """An error of ours as text that survives the way through Spark."""


def crossing(function: Callable[[Iterator[Any]], Iterator[Any]]) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """Makes our errors inside an executor's generator arrive on the driver as themselves (see `spark_errors`)."""

    @wraps(function)
    def guarded(batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from function(batches)
        except IsochronError as error:
            kind = type(error)
            facts = {name: value for name, value in vars(error).items() if isinstance(value, str | int | float | None)}
            payload = json.dumps([kind.__module__, kind.__qualname__, str(error), facts]).encode()
            raise _Crossing(f"isochron-error:{base64.b64encode(payload).decode()}: {error}") from error

    return guarded


@contextmanager
def spark_errors(
    doing: str, of_data: type[IsochronError] = SourceError, otherwise: type[IsochronError] = IsochronError
) -> Iterator[None]:
    """Raises errors of ours that crossed as what they were, and Spark's as ours with one line of its reason.

    What Spark says of the data it read becomes an `of_data`, anything else an `otherwise`.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JError, PySparkException) as error:
        if crossed := _MARK.search(str(error)):
            raise _restored(crossed[1]) from error
        reason = first_reason(str(error))
        kind = of_data if any(f"[{name}" in reason for name in _OF_DATA) else otherwise
        raise kind(f"{doing}: Spark says: {reason}") from error


def _restored(payload: str) -> IsochronError:
    """The error that a payload describes; its class, text and simple facts, without calling its constructor."""
    module, name, text, facts = json.loads(base64.b64decode(payload))
    kind = getattr(importlib.import_module(module), name)
    error: IsochronError = kind.__new__(kind, text)
    error.__dict__.update(facts)
    Exception.__init__(error, text)
    return error


def first_reason(text: str) -> str:
    """The error of a Python worker, else the innermost line that names one of Spark's conditions, else the first."""
    if raised := _RAISED.findall(text):
        return raised[0].strip()[:500]
    around = ("FAILED_EXECUTE_UDF", "STAGE_MATERIALIZATION_MULTIPLE_FAILURES")
    conditions = [m[0] for m in _CONDITION.finditer(text) if not m[1].startswith(around)]
    specific = [c for c in conditions if "FAILED_READ_FILE" not in c]
    found = (specific or conditions or text.strip().splitlines() or ["nothing"])[0]
    return found.strip()[:500]
