"""One windowed aggregation: a function over a column, a window and its hop, and the name of the feature it gives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from feature_store.definitions.types import ValueType
from feature_store.timestamps import DAY, HOUR, MINUTE, SECOND, duration_text

Kind = Literal[
    "count",
    "sum",
    "mean",
    "min",
    "max",
    "var",
    "std",
    "first",
    "last",
    "last_n",
    "last_distinct_n",
    "count_distinct",
    "approx_count_distinct",
    "approx_quantile_p",
]
KINDS: tuple[str, ...] = get_args(Kind)

#: Functions of a set of values that the online store does not keep: history computes them, an online view may not.
HISTORY_ONLY: tuple[Kind, ...] = ("last_distinct_n", "count_distinct", "approx_count_distinct", "approx_quantile_p")

_NUMBERED = re.compile(r"(last|last_distinct|approx_quantile)_([1-9]\d*)")
_NUMBERED_KINDS: dict[str, Kind] = {
    "last": "last_n",
    "last_distinct": "last_distinct_n",
    "approx_quantile": "approx_quantile_p",
}
_COUNTS = ("count", "count_distinct", "approx_count_distinct")
_MEASUREMENTS = ("mean", "var", "std", "approx_quantile_p")
_LISTS = ("last_n", "last_distinct_n")

LONGEST_LAST_N = 1_000
MOST_HOPS_ONLINE = 9_000


class Function(msgspec.Struct, frozen=True):
    """A function's kind and the number in its name: how many values `last_n` and `last_distinct_n` keep, the percent
    of `approx_quantile_p`; 0 for the others.
    """

    kind: Kind
    n: int = 0

    @classmethod
    def parse(cls, text: str) -> Function:
        """The function a Feast aggregation names; raises ValueError that says why a name is refused."""
        if match := _NUMBERED.fullmatch(text):
            kind, n = _NUMBERED_KINDS[match[1]], int(match[2])
            if kind == "approx_quantile_p" and n > 100:
                raise ValueError(f"'{text}' asks for more than 100 percent")
            if kind != "approx_quantile_p" and n > LONGEST_LAST_N:
                raise ValueError(f"'{text}' keeps more than {LONGEST_LAST_N} values")
            return cls(kind, n)
        plain = "mean" if text == "avg" else text
        if plain not in KINDS or plain in _NUMBERED_KINDS.values():
            raise ValueError(f"unknown function '{text}'")
        return cls(plain)  # type: ignore[arg-type]

    @staticmethod
    def names() -> list[str]:
        """How the functions are written, for error texts: `last_<n>` stands for last_1, last_2 and so on."""
        numbered = {kind: f"{name}_<{kind[-1]}>" for name, kind in _NUMBERED_KINDS.items()}
        return [numbered.get(kind, kind) for kind in get_args(Kind)]

    def __str__(self) -> str:
        return f"{self.kind[:-1]}{self.n}" if self.n else self.kind

    def accepts(self, column: ValueType) -> bool:
        """Whether the function is defined on a column of this type."""
        if column.is_list:
            return self.kind == "count"
        if self.kind in ("sum", "mean", "var", "std", "approx_quantile_p"):
            return column.is_numeric
        if self.kind in ("min", "max"):
            return column.is_numeric or column is ValueType.TIMESTAMP
        return True

    def output(self, column: ValueType) -> ValueType:
        """The type of the function's value on a column of this type."""
        if self.kind in _COUNTS:
            return ValueType.INT64
        if self.kind in _MEASUREMENTS:
            return ValueType.FLOAT64
        if self.kind == "sum":
            return ValueType.INT64 if column.is_integer else ValueType.FLOAT64
        return column.list_of if self.kind in _LISTS else column

    def column_of(self, output: ValueType) -> ValueType | None:
        """The column type that a declared output type implies; None where the output does not tell."""
        if self.kind in _COUNTS or self.kind in _MEASUREMENTS:
            return None
        return output.element if self.kind in _LISTS else output


class Aggregation(msgspec.Struct, frozen=True, kw_only=True):
    """An aggregation as the engines see it.

    `window` and `hop` are in microseconds; a `window` of 0 means all of history and has a `hop` of 0.
    `column` is the mapped name, or `*` for events; `output` the type of the value.
    """

    name: str
    function: Function
    column: str
    window: int
    hop: int
    output: ValueType

    def tail(self, time: int) -> int | None:
        """Start (included) of the window that ends before `time`; None means the beginning of time."""
        return (time - self.window) // self.hop * self.hop if self.window else None

    def __str__(self) -> str:
        over = f"over {duration_text(self.window)}" if self.window else "over all history"
        return f"{self.function}({self.column}) {over}"


def reach(aggregations: Iterable[Aggregation], time: int) -> int | None:
    """Start of the oldest of the windows that end before `time`; None where one has no beginning, or there is none."""
    tails = [a.tail(time) for a in aggregations]
    return None if None in tails else min((t for t in tails if t is not None), default=None)


def default_hop(window: int) -> int:
    """The hop of a window that declares none: 5 minutes below 12 hours, 1 hour below 12 days, else 1 day."""
    if window < 12 * HOUR:
        return 5 * MINUTE
    return HOUR if window < 12 * DAY else DAY


def resolve_hop(window: int, slide: int, tiling_hop: int | None) -> int:
    """The hop of a window, in the contract's order of precedence.

    `slide` is the declared slide interval (Feast stores the window itself when none was declared, which counts as
    none); `tiling_hop` the view's hop where tiling is enabled, else None.
    """
    if not window:
        return 0
    if 0 < slide < window:
        return slide
    return tiling_hop if tiling_hop else default_hop(window)


def hop_problem(window: int, hop: int, online: bool) -> tuple[str, str] | None:
    """Why a window and its hop are refused, and the way out; None when they are fine."""
    if not window:
        return None
    if hop < SECOND:
        return f"hop {duration_text(hop)} is below one second", "use a slide_interval of at least 1 second"
    if window % hop:
        return (
            f"hop {duration_text(hop)} does not divide its window {duration_text(window)}",
            "set slide_interval to a divisor of time_window",
        )
    if online and window // hop > MOST_HOPS_ONLINE:
        return (
            f"{window // hop:,} hops in the window are more than the {MOST_HOPS_ONLINE:,} an online view may have",
            "use a coarser slide_interval, or online=False",
        )
    return None
