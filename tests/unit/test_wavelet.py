"""Questions about ranges of small whole numbers, against sorting each range."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.aggregations.spans import Spans
from feature_store.aggregations.wavelet import count_below, kth_smallest

SETTINGS = settings(max_examples=200, derandomize=True, deadline=None)

numbers = st.integers(0, 3) | st.integers(0, 40) | st.integers(0, 2**31 - 1)


@st.composite
def ranged(draw: st.DrawFn, empty: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An array and ranges of it, that overlap, touch, repeat or lie apart."""
    values = draw(st.lists(numbers, min_size=1, max_size=40))
    edges = st.tuples(st.integers(0, len(values)), st.integers(0, len(values))).map(sorted)
    pairs = draw(st.lists(edges.filter(lambda e: empty or e[0] < e[1]), max_size=12))
    bounds = np.array(pairs, np.int64).reshape(-1, 2)
    return np.array(values, np.int32), bounds[:, 0], bounds[:, 1]


@SETTINGS
@given(ranged(), st.data())
def test_count_below_counts(case: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    values, low, high = case
    bound = np.array(data.draw(st.lists(numbers, min_size=len(low), max_size=len(low))), np.int64)
    expected = [sum(v < b for v in values[i:j].tolist()) for i, j, b in zip(low, high, bound, strict=True)]
    assert count_below(values, low, high, bound).tolist() == expected


@SETTINGS
@given(ranged(empty=False), st.data())
def test_kth_smallest_is_the_kth_of_the_sorted_range(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    values, low, high = case
    k = np.array([data.draw(st.integers(1, int(size))) for size in high - low], np.int64)
    expected = [sorted(values[i:j].tolist())[n - 1] for i, j, n in zip(low, high, k, strict=True)]
    assert kth_smallest(values, low, high, k).tolist() == expected


def test_every_range_of_a_longer_array() -> None:
    values = np.random.default_rng(3).integers(0, 1_000, 150).astype(np.int32)
    low, high = np.triu_indices(len(values) + 1, 1)
    middle = (high - low + 1) // 2
    pairs = list(zip(low.tolist(), high.tolist(), strict=True))
    assert kth_smallest(values, low, high, middle).tolist() == [sorted(values[i:j])[(j - i - 1) // 2] for i, j in pairs]
    below = count_below(values, low, high, np.full(len(low), 500))
    assert below.tolist() == [int((values[i:j] < 500).sum()) for i, j in pairs]


def test_nothing_asked_and_nothing_there() -> None:
    none = np.zeros(0, np.int64)
    assert kth_smallest(np.array([1, 2]), none, none, none).tolist() == []
    assert count_below(np.zeros(0, np.int32), np.array([0]), np.array([0]), np.array([5])).tolist() == [0]


#   ranges      [-----)      [--)[---)
#                  [-----)          [--)
#   spans       [--------)   [--)[-----)     ranges that only touch are not joined
@SETTINGS
@given(ranged(empty=False), st.integers(1, 20))
def test_spans_hold_every_range_whole_and_nothing_else(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], most: int
) -> None:
    values, low, high = case
    spans = Spans.of(low, high)
    ranges = list(zip(low.tolist(), high.tolist(), strict=True))
    needed = sorted({place for i, j in ranges for place in range(i, j)})
    assert spans.places().tolist() == needed
    joined = {p for p in needed if any(i < p < j for i, j in ranges)}
    assert spans.starts.tolist() == [p for p in needed if p not in joined]
    copy = values[spans.places()]
    for (i, j), first, last in zip(ranges, *(edge.tolist() for edge in spans.moved(low, high)), strict=True):
        assert copy[first:last].tolist() == values[i:j].tolist()
    moved_low, moved_high = spans.moved(low, high)
    seen, at = [], 0
    for part, numbers_of in spans.batches(low, most):
        assert part.start == at
        at = part.stop
        assert part.stop - part.start < most + int(spans.lengths.max())
        assert (moved_low[numbers_of] >= part.start).all()
        assert (moved_high[numbers_of] <= part.stop).all()
        seen += numbers_of.tolist()
    assert at == len(needed)
    assert sorted(seen) == list(range(len(low)))
