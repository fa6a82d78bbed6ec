"""A spine in the order of entity and time: the order in which the sorted rows of a source come by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from feature_store.engines.engine import Spine


@dataclass(frozen=True)
class SortedSpine:
    """`entity` (a number for each distinct key, -1 where one is null) and `times` of the asking rows, sorted by both.

    `order` are their places in the spine. `keys` are the distinct keys, the row of each being its entity's number.
    """

    entity: np.ndarray
    times: np.ndarray
    order: np.ndarray
    keys: pa.Table

    @classmethod
    def of(cls, spine: Spine, key_columns: Mapping[str, str]) -> SortedSpine:
        """Sorts a spine; `key_columns` maps a view's join keys to the spine's columns."""
        entity, keys = _numbered({key: spine.keys[column] for key, column in key_columns.items()}, len(spine))
        order = np.lexsort((spine.times, entity))
        return cls(entity[order], spine.times[order], order, keys)

    @property
    def entities(self) -> int:
        return len(self.keys)

    def between(self, first: int, last: int) -> SortedSpine:
        """The rows of entities `first` to `last`, both included; those without an entity come with the first one."""
        start = np.searchsorted(self.entity, first) if first else 0
        rows = slice(start, np.searchsorted(self.entity, last, "right"))
        return SortedSpine(self.entity[rows], self.times[rows], self.order[rows], self.keys)

    def restored(self, parts: Sequence[pa.Array]) -> pa.Array:
        """Values of all rows in sorted order, in the order of the spine."""
        return pa.chunked_array(parts).combine_chunks().take(self._places)

    @cached_property
    def _places(self) -> pa.Array:
        """Where in sorted order each row of the spine is."""
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        return pa.array(places)


def _numbered(keys: Mapping[str, pa.Array], rows: int) -> tuple[np.ndarray, pa.Table]:
    """A number for each distinct combination of keys, and the combinations; a view without keys has one entity."""
    if not keys:
        return np.zeros(rows, np.int64), pa.table({"__entity": np.zeros(1, np.int64)})
    number = np.zeros(rows, np.int64)
    first = np.zeros(1, np.int64)
    for array in keys.values():
        encoded = array.dictionary_encode()
        codes = np.asarray(encoded.indices.cast(pa.int64()).fill_null(-1))
        # Numbers stay below rows * rows, for each step numbers what came before anew.
        pairs = np.where((number >= 0) & (codes >= 0), number * len(encoded.dictionary) + codes, -1)
        number, first = _ranked(pairs)
    distinct = pa.table({name: array.take(pa.array(first)) for name, array in keys.items()})
    return number, distinct.append_column("__entity", pa.array(np.arange(len(first))))


def _ranked(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each code's number in order of first appearance (-1 stays), and where each first appears."""
    encoded = pa.array(codes, mask=codes < 0).dictionary_encode()
    number = np.asarray(encoded.indices.cast(pa.int64()).fill_null(-1))
    first = np.full(len(encoded.dictionary), len(codes), np.int64)
    present = np.flatnonzero(number >= 0)
    first[number[present[::-1]]] = present[::-1]
    return number, first
