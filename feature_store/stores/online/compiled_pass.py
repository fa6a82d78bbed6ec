"""The compiled pass over staircases and heads as they lie. Importing this loads numba and compiles, or loads what was
compiled before; only compiled.py does.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

#: Numbers at the beginning of a program: how many windows, columns, fields and aggregations it has, then the grain,
#: whether codes are wide, words of numbers, what a staircase begins with (half a word, then its fingerprint), words of
#: a head row, where in it null bits and columns begin, and the most steps a field is written by. (A constant of another
#: module would stay what it was when this was compiled.)
HEADER = 13

#: Where CPython has the size of a bytes object and its bytes: reading them there spares a call for each.
SIZE_AT, CONTENT_AT = 16, bytes.__basicsize__ - 1

_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), code


@njit
@no_type_check
def _content(address: int) -> Any:
    """Where the bytes of a bytes object lie, and how many they are."""
    return _pointer(address + CONTENT_AT), carray(_pointer(address + SIZE_AT), (1,), np.int64)[0]


@njit("boolean(int64, int64, int64, int64, int64)", cache=True, nogil=True)
@no_type_check
def fold(count_of: int, values: int, numbers: int, program: int, length: int) -> bool:  # noqa: PLR0912, PLR0915
    """Folds the windows of `count_of` entities. False where it cannot be done this way: head rows out of order, bytes
    that are not what they should be.

    The others are addresses. `values`: of bytes objects, the staircases and then the heads. `numbers`, of eight bytes
    but for the last: the times of the read; then the results, by entity from when on it is exact, and by aggregation
    and entity a whole number, a real one, and in a byte whether there is a value. `program` has `length` numbers:
    HEADER, then per window its length and hop; per column its number of counts and whether it is of floats; per field
    its column, kind (1 sum, 2 and 3 limbs, 4 min, 5 max, 0 others) and number of steps; per aggregation its function,
    column (-1: events) and window.
    """
    object_of = carray(_pointer(values), (2 * count_of,), np.int64)
    time_of = carray(_pointer(numbers), (count_of,), np.int64)
    p = carray(_pointer(program), (length,), np.int64)
    windows, columns, fields, wanted_all = p[0], p[1], p[2], p[3]
    grain, wide, number_words, mark, fingerprint = p[4], p[5], p[6], p[7], p[8]
    row_words, nulls_at, columns_at, most_steps = p[9], p[10], p[11], p[12]
    at = np.int64(HEADER)
    window, hop = p[at : at + windows], p[at + windows : at + 2 * windows]
    at += 2 * windows
    own, floats = p[at : at + columns], p[at + columns : at + 2 * columns]
    at += 2 * columns
    field_column, field_kind = p[at : at + fields], p[at + fields : at + 2 * fields]
    field_number = p[at + 2 * fields : at + 3 * fields]
    at += 3 * fields
    kind, column = p[at : at + wanted_all], p[at + wanted_all : at + 2 * wanted_all]
    which = p[at + 2 * wanted_all : at + 3 * wanted_all]
    results = numbers + 16 * count_of
    shape_out, size_out = (wanted_all, count_of), 8 * wanted_all * count_of
    exact_out = carray(_pointer(numbers + 8 * count_of), (count_of,), np.int64)
    whole_out = carray(_pointer(results), shape_out, np.int64)
    real_out = carray(_pointer(results + size_out), shape_out, np.float64)
    valid_out = carray(_pointer(results + 2 * size_out), shape_out, np.uint8)

    shape = (columns, windows)
    n, total = np.zeros(shape, np.int64), np.zeros(shape)
    high, low_limb = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    least, most = np.zeros(shape), np.zeros(shape)
    least_i, most_i = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    events, entry = np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    first_row = np.zeros(windows, np.int64)
    for e in range(count_of):
        time = time_of[e]
        stairs, stairs_size = _content(object_of[e])
        head, head_size = _content(object_of[count_of + e])
        if stairs_size & 7 or head_size & 7:
            return False
        stairs_words, head_words = stairs_size >> 3, head_size >> 3
        words = carray(stairs, (stairs_words,), np.int64)
        doubles = carray(stairs, (stairs_words,), np.float64)
        halves = carray(stairs, (2 * stairs_words,), np.uint32)
        octets = carray(stairs, (8 * stairs_words,), np.uint8)
        heads = carray(head, (head_words,), np.int64)
        head_doubles = carray(head, (head_words,), np.float64)
        count, origin, place = np.int64(0), np.int64(0), np.int64(0)
        exact_out[e] = _LOWEST + 1
        if stairs_words > 0:
            if stairs_words < 4 + number_words or halves[0] != mark or words[2] != fingerprint:
                return False
            count, origin = np.int64(halves[1]), words[3]
            exact_out[e] = words[1]
            place = 4 + number_words
        codes = count if wide else (count + 1) >> 1
        if place + codes + ((count + 1) >> 1) > stairs_words:
            return False
        # -- the entry of each window
        for w in range(windows):
            wanted = np.int64(0)
            if window[w] > 0:
                tail = (time - window[w]) // hop[w] * hop[w]
                wanted = max((tail - origin) // grain + 1, 1)
            a, b = np.int64(0), count
            while a < b:
                middle = (a + b) >> 1
                code = words[place + middle] if wide else np.int64(halves[2 * place + middle])
                if code < wanted:
                    a = middle + 1
                else:
                    b = middle
            entry[w] = a
        place += codes
        events_at = 2 * place
        place += (count + 1) >> 1
        for w in range(windows):
            events[w] = np.int64(halves[events_at + entry[w]]) if entry[w] < count else 0
        # -- the settled state of each column and window
        for c in range(columns):
            for w in range(windows):
                n[c, w], total[c, w], high[c, w], low_limb[c, w] = 0, 0.0, 0, 0
                least[c, w], most[c, w] = math.inf, -math.inf
                least_i[c, w], most_i[c, w] = _HIGHEST, _LOWEST
        f = 0
        for c in range(columns):
            if count > 0:
                counts_at = events_at
                if halves[8 + own[c]] > 0:
                    counts_at = 2 * place
                    place += (count + 1) >> 1
                    if place > stairs_words:
                        return False
                for w in range(windows):
                    if entry[w] < count:
                        n[c, w] = np.int64(halves[counts_at + entry[w]])
            while f < fields and field_column[f] == c:
                if count > 0:
                    index, steps = np.int64(-1), count
                    if field_number[f] >= 0:
                        steps = np.int64(halves[8 + field_number[f]])
                        if steps <= most_steps and steps < count:
                            index = 8 * place
                            place += (count + 7) >> 3
                        else:
                            steps = count
                    if place + steps > stairs_words:
                        return False
                    for w in range(windows):
                        if entry[w] < count:
                            step = entry[w] if index < 0 else np.int64(octets[index + entry[w]])
                            if step >= steps:
                                return False
                            here = place + step
                            if field_kind[f] == 1:
                                total[c, w] = doubles[here]
                            elif field_kind[f] == 2:
                                high[c, w] = words[here]
                            elif field_kind[f] == 3:
                                low_limb[c, w] = words[here]
                            elif field_kind[f] == 4:
                                least[c, w], least_i[c, w] = doubles[here], words[here]
                            elif field_kind[f] == 5:
                                most[c, w], most_i[c, w] = doubles[here], words[here]
                    place += steps
                f += 1
        # -- the head: rows by time, those of each window the last ones before the time of the read
        rows = head_words // row_words
        if rows * row_words != head_words:
            return False
        end = np.int64(0)
        for r in range(rows):
            if r > 0 and heads[r * row_words] <= heads[(r - 1) * row_words]:
                return False
            if heads[r * row_words] < time:
                end = r + 1
        for w in range(windows):
            a, b = np.int64(0), end
            if window[w] > 0:
                tail = (time - window[w]) // hop[w] * hop[w]
                while a < b:
                    middle = (a + b) >> 1
                    if heads[middle * row_words] < tail:
                        a = middle + 1
                    else:
                        b = middle
            first_row[w] = a
            events[w] += end - a
        for c in range(columns):
            mask = np.int64(1) << np.int64(c & 63)
            for w in range(windows):
                added = 0.0
                for r in range(first_row[w], end):
                    here = r * row_words
                    if heads[here + nulls_at + (c >> 6)] & mask:
                        continue
                    n[c, w] += 1
                    here += columns_at + c
                    if floats[c]:
                        value = head_doubles[here]
                        added += value
                        least[c, w], most[c, w] = min(least[c, w], value), max(most[c, w], value)
                    else:
                        whole = heads[here]
                        high[c, w] += whole >> 32
                        low_limb[c, w] += whole & 0xFFFFFFFF
                        least_i[c, w], most_i[c, w] = min(least_i[c, w], whole), max(most_i[c, w], whole)
                total[c, w] += added
                high[c, w] += low_limb[c, w] >> 32
                low_limb[c, w] &= 0xFFFFFFFF
        # -- values
        for i in range(wanted_all):
            w, c = which[i], column[i]
            found = events[w] if c < 0 else n[c, w]
            whole_out[i, e], real_out[i, e], valid_out[i, e] = 0, 0.0, found > 0
            if kind[i] == 0:
                whole_out[i, e], valid_out[i, e] = found, True
            elif found == 0:
                continue
            elif kind[i] == 1 and not floats[c]:
                fits = -(1 << 31) <= high[c, w] < (1 << 31)
                valid_out[i, e] = fits
                if fits:
                    whole_out[i, e] = (high[c, w] << 32) | low_limb[c, w]
            elif kind[i] <= 2:
                value = total[c, w] if floats[c] else high[c, w] * 2.0**32 + low_limb[c, w]
                value = value / found if kind[i] == 2 else value
                finite = math.isfinite(value)
                valid_out[i, e] = finite
                if finite:
                    real_out[i, e] = value
            elif floats[c]:
                real_out[i, e] = least[c, w] if kind[i] == 3 else most[c, w]
            else:
                whole_out[i, e] = least_i[c, w] if kind[i] == 3 else most_i[c, w]
    return True


@njit("int64(int64)")
@no_type_check
def first_word(address: int) -> int:
    """The first word of a bytes object, plus its size: to see whether they lie where we look for them."""
    content, size = _content(address)
    return carray(content, (1,), np.int64)[0] + size
