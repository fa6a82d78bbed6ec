"""Runs on-demand views: the same function, on inputs of the same types, in training and in serving."""

from __future__ import annotations

import datetime as dt
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import dill
import numpy as np
import pyarrow as pa

from feature_store.definitions.types import ValueType
from feature_store.definitions.view import OnDemandView
from feature_store.errors import IsochronError


class OnDemandError(IsochronError):
    """An on-demand view's function cannot be loaded, failed, or returned what its definition does not say."""

    def __init__(self, view: OnDemandView, problem: str) -> None:
        self.view = view.name
        super().__init__(f"on-demand view '{view.name}': {problem}")


@functools.lru_cache(maxsize=256)
def _function(view_name: str, body: bytes) -> Callable[[Any], Any]:
    return dill.loads(body)


def load(view: OnDemandView) -> Callable[[Any], Any]:
    """The view's function. Its bytes load only in the Python minor version that wrote them."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if view.python != running:
        raise OnDemandError(view, f"was applied with Python {view.python}, this is {running}; apply it again.")
    return _function(view.name, view.body)


def run(view: OnDemandView, inputs: Mapping[str, pa.Array], rows: int) -> dict[str, pa.Array]:
    """The view's features for `rows` rows. `inputs` holds every input by the name the function knows, typed.

    Raises OnDemandError with the function's own error as its cause.
    """
    function = load(view)
    try:
        outputs = _call_pandas(function, inputs) if view.mode == "pandas" else _call_python(function, inputs)
    except Exception as error:
        raise OnDemandError(view, f"its function failed with {type(error).__name__}: {error}") from error
    return {f.name: _output(view, f.name, f.type, outputs, rows) for f in view.features}


def _call_python(function: Callable, inputs: Mapping[str, pa.Array]) -> Mapping[str, Any]:
    lists = {id(array): array.to_pylist() for array in inputs.values()}
    return function({name: lists[id(array)] for name, array in inputs.items()})


def _call_pandas(function: Callable, inputs: Mapping[str, pa.Array]) -> Mapping[str, Any]:
    # Nullable integers whether or not a null is among them: a row's value must not depend on its neighbours.
    frame = pa.table(dict(inputs)).to_pandas(types_mapper=_nullable_integer)
    result = function(frame)
    return {name: result[name] for name in result.columns}


def _nullable_integer(arrow_type: pa.DataType) -> Any:
    import pandas

    return {pa.int64(): pandas.Int64Dtype(), pa.int32(): pandas.Int32Dtype()}.get(arrow_type)


def _output(view: OnDemandView, name: str, wanted: ValueType, outputs: Mapping[str, Any], rows: int) -> pa.Array:
    if name not in outputs:
        raise OnDemandError(view, f"its function returned no '{name}'; it returned: {', '.join(map(str, outputs))}.")
    values = outputs[name]
    try:
        array = pa.array(values, from_pandas=view.mode == "pandas" or None)
        array = array.cast(wanted.arrow, safe=not wanted.is_float)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise OnDemandError(view, f"its '{name}' is no {wanted.feast_name}: {error}") from error
    if len(array) != rows:
        raise OnDemandError(view, f"its '{name}' has {len(array)} values for {rows} rows.")
    return array


def request_column(name: str, values: Any, wanted: ValueType, rows: int) -> pa.Array:
    """Request-time values as a typed column; naive times are UTC. ValueError or pyarrow's errors if they do not fit."""
    if isinstance(values, pa.Array | pa.ChunkedArray | np.ndarray):
        values = values.tolist() if isinstance(values, np.ndarray) else values.to_pylist()
    if wanted is ValueType.TIMESTAMP:
        values = [_aware(name, v) for v in values]
    array = pa.array(values, wanted.arrow)
    if len(array) != rows:
        raise ValueError(f"has {len(array)} values for {rows} rows")
    return array


def _aware(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, dt.datetime) and value.tzinfo):
        return value
    if isinstance(value, dt.datetime):
        return value.replace(tzinfo=dt.UTC)
    if isinstance(value, str):
        parsed = dt.datetime.fromisoformat(value)
        return parsed if parsed.tzinfo else parsed.replace(tzinfo=dt.UTC)
    raise ValueError(f"'{name}' is a {type(value).__name__}, not a time")
