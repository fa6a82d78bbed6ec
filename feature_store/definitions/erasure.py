"""Entities that were erased, and which of their records every engine leaves out, for ever.

A record is *at or below* an erasure if it has the erased key values and was known by then: its created time, or where
it has none the time in its file's time column (before any delay), is not after the moment of the erasure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field
from feature_store.errors import RequestError
from feature_store.timestamps import BEGINNING

#: In the table of a view's erasures the last time whose records are left out. (No join key begins like this.)
UNTIL = "__until"

_WHOLE = re.compile(r"-?0*[0-9]{1,19}")
_RANGES = {ValueType.INT32: 2**31, ValueType.INT64: 2**63}

KeyValue = bool | int | str | bytes


class Erasure(msgspec.Struct, frozen=True):
    """One erasure in a project: the join keys of the entity with their values as text (see `key_text`), and its moment
    (microseconds).

    `positions` are the log positions that the online store had folded by then, (epoch, next offset) by view and
    partition: what a log with positions is judged by. No source has them yet.
    """

    project: str
    keys: dict[str, str]
    erased_at: int
    positions: dict[str, dict[int, tuple[int, int]]] = {}


@dataclass(frozen=True)
class Erased:
    """The erasures by the same join keys of a view: `keys`, in the view's order, and for each combination of their
    values the time (microseconds) until which its records are left out.
    """

    keys: tuple[Field, ...]
    until: Mapping[tuple[KeyValue, ...], int]

    @cached_property
    def table(self) -> pa.Table:
        """The same as a table: the keys by name, and `__until`."""
        columns = {
            key.name: pa.array([values[i] for values in self.until], key.type.arrow) for i, key in enumerate(self.keys)
        }
        return pa.table({**columns, UNTIL: pa.array(list(self.until.values()), pa.int64())})

    def covers(self, rows: pa.Table, known: np.ndarray) -> np.ndarray:
        """Which rows are at or below an erasure; `rows` have the keys as their types, `known` is when each was."""
        there = np.ones(len(rows), bool)
        for key in self.keys:
            there &= np.asarray(pc.is_in(rows[key.name].combine_chunks(), self.table[key.name].combine_chunks()))
        covered = np.zeros(len(rows), bool)
        places = np.flatnonzero(there)
        some = rows.select([key.name for key in self.keys]).take(pa.array(places))
        values = zip(*(column.to_pylist() for column in some.columns), strict=True)
        for place, one in zip(places.tolist(), values, strict=True):
            covered[place] = self._covers(one, known[place])
        return covered

    def covers_one(self, values: Mapping[str, Any], known: int) -> bool:
        """Whether a record with these key values, which was known at that time, is at or below an erasure."""
        return self._covers(tuple(values[key.name] for key in self.keys), known)

    def _covers(self, values: tuple[KeyValue, ...], known: int) -> bool:
        until = self.until.get(values)
        return until is not None and known <= until


@dataclass(frozen=True)
class Erasures:
    """All erasures of a project, in the order in which they were made; later ones are only ever added behind."""

    log: tuple[Erasure, ...] = ()
    _of: dict[tuple[Field, ...], tuple[Erased, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, keys: Sequence[Field]) -> tuple[Erased, ...]:
        """Those that leave out records of a view with these join keys, by the keys they name; () where none does."""
        fields = tuple(keys)
        if fields not in self._of:
            self._of[fields] = _by_keys(self.log, fields)
        return self._of[fields]

    def since(self, earlier: Erasures) -> list[Erasure]:
        """Those that an earlier state did not have."""
        return list(self.log[len(earlier.log) :])


#: Where erasures come from: asked each time, so that one made meanwhile is heard of. Cheap while nothing changed: the
#: same object then.
LoadErasures = Callable[[], Erasures]

NO_ERASURES = Erasures()


def no_erasures() -> Erasures:
    """Of a project in which nothing was erased."""
    return NO_ERASURES


def _by_keys(log: Iterable[Erasure], keys: tuple[Field, ...]) -> tuple[Erased, ...]:
    found: dict[tuple[Field, ...], dict[tuple[KeyValue, ...], int]] = {}
    for erasure in log:
        if (values := values_in(erasure.keys, keys)) is not None:
            named = tuple(key for key in keys if key.name in values)
            until = found.setdefault(named, {})
            one = tuple(values[key.name] for key in named)
            until[one] = max(erasure.erased_at, until.get(one, BEGINNING))
    return tuple(Erased(named, until) for named, until in found.items())


def values_in(texts: Mapping[str, str], keys: Sequence[Field]) -> dict[str, KeyValue] | None:
    """Key values given as text, as the types of a view's join keys.

    None where the view has no such key, or one of a type that has no such value: it holds no records of them then.
    """
    types = {key.name: key.type for key in keys}
    values: dict[str, KeyValue] = {}
    for name, text in texts.items():
        value = key_value(text, types[name]) if name in types else None
        if value is None:
            return None
        values[name] = value
    return values or None


def key_value(text: str, wanted: ValueType) -> KeyValue | None:
    """A key value that a text stands for, None where the type has no such value: whole numbers, true or false, bytes as
    hex digits, text as it is.
    """
    if wanted is ValueType.STRING:
        return text
    if wanted is ValueType.BOOL:
        return {"true": True, "false": False}.get(text)
    if wanted is ValueType.BYTES:
        return bytes.fromhex(text) if re.fullmatch(r"([0-9a-fA-F]{2})*", text) else None
    limit = _RANGES.get(wanted, 0)
    number = int(text) if _WHOLE.fullmatch(text) else limit
    return number if -limit <= number < limit else None


def key_text(name: str, value: Any) -> str:
    """The text of a key value, as erasures are written down. Raises RequestError for what is no key's value."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, bytes):
        return value.hex()
    raise RequestError(name, f"is a {type(value).__name__}, which no join key is; give its value")


def when_known(times: np.ndarray, created: np.ndarray, delay: int) -> np.ndarray:
    """When records were known: their created time, or else (BEGINNING) their event time without the source's delay."""
    return np.where(created == BEGINNING, times - delay, created)


def left_out(erased: Sequence[Erased], rows: pa.Table, known: np.ndarray) -> np.ndarray:
    """Which rows are at or below any of some erasures; arguments as for `Erased.covers`."""
    covered = np.zeros(len(rows), bool)
    for one in erased:
        covered |= one.covers(rows, known)
    return covered
