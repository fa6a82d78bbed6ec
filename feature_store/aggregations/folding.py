"""Folds over ranges of values: the state of every range, in one fixed order of operations a range.

Doubling: after step k, element i holds the fold of the 2^k values from i on; a range takes one such block for each bit
of its length, the least first. The blocks start where the range starts, so equal ranges give equal bits wherever they
lie. Costs len(values) * log2(longest range), whatever the number of ranges or their overlap.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from feature_store.aggregations.measures import MEASURES, Measure, State, put, take

#: Steps at which blocks that no range still needs are dropped: a hot entity's long ranges then cost its own size only.
_COMPACTED = frozenset(64 * 8**i for i in range(18))


def fold_ranges(values: np.ndarray, low: np.ndarray, high: np.ndarray, measures: Iterable[str]) -> State:
    """The state of `values[low:high]` for every pair, folded from the first value to the last."""
    length = np.maximum(high - low, 0)
    state: State = {"n": length.astype(np.int64)}
    for name in measures:
        state |= _fold(values, low, length, MEASURES[name])
    return state


def _fold(values: np.ndarray, low: np.ndarray, length: np.ndarray, measure: Measure) -> State:
    types = dict.fromkeys(measure.fields, measure.dtype or values.dtype)
    result = {f: np.full(len(low), v, types[f]) for f, v in measure.identity(values.dtype).items()}
    blocks = measure.lift(values)
    ranges = np.flatnonzero(length)
    position, left = low[ranges], length[ranges]
    step = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while ranges.size:
            due = np.flatnonzero(left & step)
            at = ranges[due]
            before = take(result, at) | {"n": length[at] & (step - 1)}
            block = take(blocks, position[due]) | {"n": np.array(step)}
            put(result, at, measure.combine(before, block))
            position[due] += step
            longer = np.flatnonzero(length[ranges] >= 2 * step)
            ranges, position, left = ranges[longer], position[longer], left[longer]
            if not ranges.size:
                break
            if step in _COMPACTED:
                # What is left of a range is a multiple of twice the step; its last block begins a step before its end.
                blocks, position = _compacted(blocks, position, position + (left & -(2 * step)) - step + 1)
            half = {"n": np.array(step)}
            first, second = (take(blocks, part) | half for part in (slice(None, -step), slice(step, None)))
            blocks = measure.combine(first, second)
            step *= 2
    return result


def _compacted(blocks: State, low: np.ndarray, high: np.ndarray) -> tuple[State, np.ndarray]:
    """The blocks that begin in any of the ranges, and where the ranges begin among them."""
    size = len(next(iter(blocks.values())))
    kept = np.cumsum(np.bincount(low, minlength=size + 1) - np.bincount(high, minlength=size + 1))[:size] > 0
    if 2 * np.count_nonzero(kept) > size:
        return blocks, low
    return take(blocks, kept), (np.cumsum(kept) - 1)[low]


def fold_short(values: np.ndarray, low: np.ndarray, high: np.ndarray, measures: Iterable[str]) -> State:
    """The state of `values[low:high]` for every pair where ranges are few and short.

    Sums run from the first value to the last, one by one, so that whoever folds a range by itself gets the same bits.
    """
    length = np.maximum(high - low, 0)
    state: State = {"n": length}
    spread: tuple[np.ndarray, np.ndarray] | None = None
    for name in measures:
        measure = MEASURES[name]
        if name == "moments":
            state |= _fold(values, low, length, measure)
        elif name in _REDUCED:
            none = measure.identity(values.dtype)[name]
            state[name] = _reduced(_REDUCED[name], values, low, high, none)
        else:
            spread = spread or _spread(low, length)
            for field, lifted in measure.lift(values).items():
                state[field] = _added(lifted, *spread, len(low))
    if "sum_low" in state:
        state["sum_high"] += state["sum_low"] >> 32
        state["sum_low"] &= (1 << 32) - 1
    return state


def _spread(low: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of every range one after the other, and which range each is of."""
    number = np.repeat(np.arange(len(low)), length)
    shift = low - (np.cumsum(length) - length)
    return np.arange(len(number)) + shift[number], number


def _added(values: np.ndarray, places: np.ndarray, number: np.ndarray, count: int) -> np.ndarray:
    """The sum of each range. Limbs of integers are summed as floats, which is exact for so few of them."""
    total = np.bincount(number, values[places], count)
    return total if values.dtype.kind == "f" else total.astype(np.int64)


def _reduced(reduce: np.ufunc, values: np.ndarray, low: np.ndarray, high: np.ndarray, none: float) -> np.ndarray:
    """The least or greatest value of each range; `none` for an empty one."""
    found = np.full(len(low), none, values.dtype)
    filled = np.flatnonzero(high > low)
    if filled.size:
        # reduceat folds from each index to the next one: every other result is that of a range. It takes no index
        # behind the last value, hence the one more.
        edges = np.stack([low[filled], high[filled]], axis=1).ravel()
        found[filled] = reduce.reduceat(np.append(values, values[-1:]), edges)[::2]
    return found


#: What makes one of two values of a measure's field.
_REDUCED = {"min": np.minimum, "max": np.maximum}
