"""Questions about ranges of an array of small whole numbers, answered for all ranges at once.

A wavelet matrix (Claude, Navarro and Ordonez, 2015): the array is gone through bit by bit from the highest, each time
put in a new order, those with the bit clear first. A range stays a range in the new order, and how many of its elements
have the bit clear is a difference of two counts. Only one level is held at a time: every range takes its step on it
before the next is made. Costs (length + number of ranges) * bits, whatever the ranges' lengths or overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Level:
    """One bit of an array: `clear` says whose bit is clear, `zeros[i]` how many such elements lie before place i."""

    bit: int
    clear: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, bit: int) -> Level:
        clear = (values & (1 << bit)) == 0
        zeros = np.zeros(len(values) + 1, np.int32)
        np.cumsum(clear, dtype=np.int32, out=zeros[1:])
        return cls(bit, clear, zeros)

    def divide(self, array: np.ndarray) -> np.ndarray:
        """An array in the order of the next level: first the elements whose bit is clear."""
        # compress is several times as fast as indexing with a mask that has no pattern.
        return np.concatenate([np.compress(self.clear, array), np.compress(~self.clear, array)])

    def clear_before(self, place: np.ndarray) -> np.ndarray:
        """Where a range's edge comes to lie among the elements whose bit is clear."""
        return self.zeros.take(place)

    def step(self, place: np.ndarray, clear_before: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """A range's edge on the next level, among the set bits where `taken`, else among the clear ones."""
        return np.where(taken, int(self.zeros[-1]) + place - clear_before, clear_before)


def levels(values: np.ndarray, bits: int) -> Iterator[Level]:
    """The levels of an array of numbers from 0 to 2^bits - 1, from the highest bit down."""
    for bit in reversed(range(bits)):
        level = Level.of(values, bit)
        yield level
        if bit:
            values = level.divide(values)


def count_below(values: np.ndarray, low: np.ndarray, high: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """How many of `values[low:high]` are below `bound`, for every triple. Nothing is negative, low <= high."""
    bits = max(int(values.max(initial=0)), int(bound.max(initial=0))).bit_length()
    found = np.zeros(len(low), np.int64)
    for level in levels(values, bits):
        before_low, before_high = level.clear_before(low), level.clear_before(high)
        taken = bound & (1 << level.bit) != 0
        found += np.where(taken, before_high - before_low, 0)
        low, high = level.step(low, before_low, taken), level.step(high, before_high, taken)
    return found


def kth_smallest(values: np.ndarray, low: np.ndarray, high: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The k-th smallest of `values[low:high]` for every triple, 1 <= k <= high - low. No value is negative."""
    found = np.zeros(len(low), np.int64)
    for level in levels(values, int(values.max(initial=0)).bit_length()):
        before_low, before_high = level.clear_before(low), level.clear_before(high)
        clear = before_high - before_low
        taken = k > clear
        found |= np.where(taken, 1 << level.bit, 0)
        k = k - np.where(taken, clear, 0)
        low, high = level.step(low, before_low, taken), level.step(high, before_high, taken)
    return found
