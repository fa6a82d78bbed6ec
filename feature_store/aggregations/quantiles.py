"""Quantiles of ranges by buckets: which bucket of a double's first bits holds the value of a given rank.

A bucket is one sign, exponent and top seven bits of the mantissa: 128 buckets to a factor of two, alike for every
column, so that counts per bucket of two sets of values add up to those of both. Its middle is within 0.4 % of each
value in it. The bucket that holds zero (and magnitudes below 2^-1029) gives 0.0 instead: no middle is near zero.
"""

from __future__ import annotations

import numpy as np

from feature_store.aggregations.wavelet import kth_smallest

#: The bits of a double's mantissa that a bucket does not tell, and how many buckets there are for either sign.
_BITS_BELOW = 52 - 7
_BUCKETS = 1 << (63 - _BITS_BELOW)


def buckets(values: np.ndarray) -> np.ndarray:
    """The bucket number of finite doubles, 0 up in the order of their values."""
    bits = values.view(np.int64)
    size = (bits & np.int64(2**63 - 1)) >> _BITS_BELOW
    return np.where(bits < 0, _BUCKETS - 1 - size, _BUCKETS + size)


def middles(bucket: np.ndarray) -> np.ndarray:
    """The arithmetic midpoint of each bucket, 0.0 for the two at zero."""
    negative = bucket < _BUCKETS
    size = np.where(negative, _BUCKETS - 1 - bucket, bucket - _BUCKETS)
    middle = (size << _BITS_BELOW | 1 << (_BITS_BELOW - 1)).view(np.float64)
    return np.where(size == 0, 0.0, np.where(negative, -middle, middle))


def quantiles(values: np.ndarray, low: np.ndarray, high: np.ndarray, percent: np.ndarray) -> np.ndarray:
    """The middle of the bucket that holds rank ceil(percent * n / 100) of the n values low to high, n above 0."""
    bucket = buckets(values.astype(np.float64, copy=False))
    present = np.zeros(2 * _BUCKETS, bool)
    present[bucket] = True
    rank = np.cumsum(present, dtype=np.int32) - 1
    k = (percent * (high - low) + 99) // 100
    return middles(np.flatnonzero(present)[kth_smallest(rank[bucket], low, high, k)])
