"""Times as the whole project holds them: whole microseconds since the epoch, UTC, in an int64."""

from __future__ import annotations

import datetime as dt
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

#: Below every event time, and above: open ends of ranges. (One above the lowest int64, which SQL cannot write.)
BEGINNING = -(2**63) + 1
END = 2**63 - 1

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_DURATION = re.compile(r"(\d+)(us|ms|s|m|h|d)")
_UNITS = {"us": 1, "ms": 1_000, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}


def micros(moment: dt.datetime) -> int:
    """Microseconds since the epoch of a datetime; a naive one is read as UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    return (aware - _EPOCH) // _MICROSECOND


def moment(time: int) -> dt.datetime:
    """The aware UTC datetime of a time in microseconds."""
    return _EPOCH + dt.timedelta(microseconds=int(time))


def iso(time: int) -> str:
    """A time as text for people; times beyond the calendar are written as what they are."""
    try:
        return moment(time).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return f"{time} us"


def parse_time(text: str) -> int:
    """Microseconds of an ISO 8601 text such as `2018-08-01T12:00:00Z`; without an offset it is UTC.

    Raises ValueError when the text is no such time.
    """
    return micros(dt.datetime.fromisoformat(text.strip()))


def parse_duration(text: str) -> int:
    """Microseconds of a text such as `7d`, `36h`, `90s` or `1d12h`; raises ValueError for others."""
    parts = _DURATION.findall(text)
    if not parts or "".join(n + unit for n, unit in parts) != text:
        raise ValueError(f"'{text}' is no duration; write it like 7d, 36h, 15m, 90s")
    return sum(int(n) * _UNITS[unit] for n, unit in parts)


def duration_text(duration: int) -> str:
    """A duration in the largest unit that divides it: 86,400,000,000 is `1d`."""
    for unit in ("d", "h", "m", "s", "ms"):
        if duration and duration % _UNITS[unit] == 0:
            return f"{duration // _UNITS[unit]}{unit}"
    return f"{duration}us"


def floor_to(time: int, hop: int) -> int:
    """The largest multiple of `hop` since the epoch that is not after `time` (also before 1970)."""
    return time // hop * hop


def arrow_micros(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """An Arrow timestamp column of any unit and zone as int64 microseconds, finer units floored; nulls stay."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.type.unit == "ns":
        nanos = array.view(pa.int64())
        quotient = pc.divide(nanos, 1000)
        truncated_up = pc.and_(pc.less(nanos, 0), pc.not_equal(pc.multiply(quotient, 1000), nanos))
        return pc.subtract(quotient, pc.cast(truncated_up, pa.int64()))
    return array.cast(pa.timestamp("us", array.type.tz)).view(pa.int64())


def arrow_timestamps(times: np.ndarray | pa.Array) -> pa.Array:
    """int64 microseconds as an Arrow UTC timestamp array."""
    return pa.array(times, pa.int64()).view(pa.timestamp("us", "UTC"))
