"""The 64-bit hash of a value, by which distinct values are told apart and counted, the same in every engine.

XXH64 with seed 0 over a value's canonical bytes. A number or boolean that is a whole number within int64: its eight
bytes, little-endian two's complement, so 5, 5.0 and a float32 of 5 are one value; any other number: the eight bytes of
its double. A time: its microseconds as such a whole number. Text: its UTF-8. Byte strings: as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from feature_store.definitions.types import ValueType

if TYPE_CHECKING:
    from feature_store.aggregations.events import Column

_PRIME_1, _PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)

#: Values hashed at a time: what they need in between stays in the processor's cache.
_CHUNK = 1 << 15


def hashes_of(column: Column, rows: np.ndarray) -> np.ndarray:
    """The hash (uint64) of a column's value in each of some rows, none of which is null."""
    values = column.values[rows]
    if column.type in (ValueType.STRING, ValueType.BYTES):
        return _text_table(column, values, rows)[values]
    return hash_numbers(values)


def _text_table(column: Column, ranks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The hash of each text by its rank: a text is hashed once, however often it comes."""
    witness = np.full(int(ranks.max(initial=-1)) + 1, -1, np.int64)
    witness[ranks] = rows
    present = np.flatnonzero(witness >= 0)
    texts = column.arrow.take(pa.array(witness[present])).cast(pa.binary()).to_pylist()
    table = np.zeros(len(witness), np.uint64)
    table[present] = np.fromiter(map(xxhash.xxh64_intdigest, texts), np.uint64, len(texts))
    return table


def hash_numbers(values: np.ndarray) -> np.ndarray:
    """The hashes of numbers (int64, or float64 that are finite)."""
    hashes = np.empty(len(values), np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(values), _CHUNK):
            part = slice(start, start + _CHUNK)
            hashes[part] = _xxh64(_canonical_words(values[part]))
    return hashes


def _canonical_words(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int64:
        return values.view(np.uint64)
    # 2^63 is a double, the largest int64 is none: the upper end is excluded.
    whole = (np.floor(values) == values) & (values >= -(2.0**63)) & (values < 2.0**63)
    return np.where(whole, np.where(whole, values, 0.0).astype(np.int64).view(np.uint64), values.view(np.uint64))


def _xxh64(words: np.ndarray) -> np.ndarray:
    """XXH64 with seed 0 of inputs of eight bytes, each given as the number that its bytes are, little-endian."""
    hashed = _PRIME_5 + np.uint64(8) ^ _rotated(words * _PRIME_2, 31) * _PRIME_1
    hashed = _rotated(hashed, 27) * _PRIME_1 + _PRIME_4
    hashed ^= hashed >> np.uint64(33)
    hashed *= _PRIME_2
    hashed ^= hashed >> np.uint64(29)
    hashed *= _PRIME_3
    hashed ^= hashed >> np.uint64(32)
    return hashed


def _rotated(words: np.ndarray, left: int) -> np.ndarray:
    return words << np.uint64(left) | words >> np.uint64(64 - left)
