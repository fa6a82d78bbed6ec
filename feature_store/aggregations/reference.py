"""The slow obvious truth: the contract's definition of a windowed value, read off a list of events.

Plain Python over one entity's events, with no cleverness to get wrong and nothing shared with the engines it judges.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import xxhash

from feature_store.definitions.aggregation import Aggregation, Function
from feature_store.timestamps import floor_to


@dataclass(frozen=True)
class Event:
    """One event of one entity: its time, its created time (None if the source has none), its columns."""

    time: int
    values: dict[str, Any] = field(default_factory=dict)
    created: int | None = None


def value(events: Iterable[Event], aggregation: Aggregation, time: int) -> Any:
    """Value(R, t): the aggregation over an entity's events, as of `time`. None is null."""
    inside = [e for e in events if _in_window(e, aggregation, time)]
    if aggregation.column == "*":
        return len(inside)
    present = [(e, v) for e in inside if (v := _clean(e.values.get(aggregation.column))) is not None]
    present.sort(key=lambda pair: _order_key(*pair))
    return fold([v for _, v in present], aggregation.function)


def _in_window(event: Event, aggregation: Aggregation, time: int) -> bool:
    if event.time >= time:
        return False
    return not aggregation.window or event.time >= floor_to(time - aggregation.window, aggregation.hop)


def _clean(value: Any) -> Any:
    """NaN and infinities count as null; -0.0 is 0.0."""
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    return value


def _order_key(event: Event, value: Any) -> tuple:
    created = -math.inf if event.created is None else event.created
    return event.time, created, value.encode() if isinstance(value, str) else value


def fold(values: Sequence[Any], function: Function) -> Any:
    """The function over non-null values in order. Exact rational arithmetic inside, rounded once at the end."""
    match function.kind:
        case "count":
            return len(values)
        case "last_n":
            return list(reversed(values))[: function.n]
        case "last_distinct_n" | "count_distinct" | "approx_count_distinct" | "approx_quantile_p":
            return _of_set(values, function)
    if not values:
        return None
    match function.kind:
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "first":
            return values[0]
        case "last":
            return values[-1]
    exact = [Fraction(v) for v in values]
    total = sum(exact, Fraction(0))
    if function.kind == "sum":
        if all(isinstance(v, int) for v in values):
            return int(total) if -(2**63) <= total < 2**63 else None
        return _rounded(total)
    mean = total / len(values)
    if function.kind == "mean":
        return _rounded(mean)
    if len(values) < 2:
        return None
    variance = _rounded(sum(((x - mean) ** 2 for x in exact), Fraction(0)) / (len(values) - 1))
    return variance if variance is None or function.kind == "var" else math.sqrt(variance)


def _of_set(values: Sequence[Any], function: Function) -> Any:
    """The functions of distinct or sorted values, by the contract's table."""
    match function.kind:
        case "last_distinct_n":
            return list(dict.fromkeys(reversed(values)))[: function.n]
        case "approx_quantile_p":
            rank = math.ceil(Fraction(function.n * len(values), 100))
            return _bucket_middle(float(sorted(values)[rank - 1])) if values else None
    hashes = _distinct_hashes(values)
    smallest = 4_096 if function.kind == "count_distinct" else 1_024
    exact = len(hashes) < smallest or (function.kind == "count_distinct" and len(hashes) == smallest)
    return len(hashes) if exact else (smallest - 1) * 2**64 // hashes[smallest - 1]


def _distinct_hashes(values: Sequence[Any]) -> list[int]:
    """XXH64 of the canonical bytes of each value, once each, in ascending order."""
    return sorted({xxhash.xxh64_intdigest(_canonical_bytes(v)) for v in values})


def _canonical_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if int(value) == value and -(2**63) <= value < 2**63:
        return int(value).to_bytes(8, "little", signed=True)
    return struct.pack("<d", value)


def _bucket_middle(value: float) -> float:
    """The midpoint of the doubles that share a value's sign, exponent and first seven bits of the mantissa."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    shared = bits >> 45
    if shared % 2**18 == 0:
        return 0.0
    (middle,) = struct.unpack("<d", struct.pack("<Q", (2 * shared + 1) << 44))
    return middle


def _rounded(exact: Fraction) -> float | None:
    try:
        return float(exact)
    except OverflowError:
        return None


def tolerance(values: Sequence[float], function: Function, expected: float) -> float:
    """How far an engine may be from the exact value (the square of it for `std`), by the contract's table."""
    n = max(len(values), 1)
    magnitude = math.fsum(abs(v) for v in values)
    match function.kind:
        case "sum":
            return 1e-9 * magnitude
        case "mean":
            return 1e-9 * magnitude / n
        case "var":
            return 1e-6 * expected + 1e-9 * math.fsum(v * v for v in values) / n
        case "std":
            return 1e-6 * expected**2 + 1e-9 * math.fsum(v * v for v in values) / n
    return 0.0
