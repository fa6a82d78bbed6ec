"""Windows of many entities folded by compiled code: one pass over the bytes of staircases and heads as they lie.

The same numbers, bit for bit, as windowed.Reading gives with numpy, several times faster. numba takes seconds to load
and to compile, so nobody waits for it: `load_behind` does it in a thread, and reads change over when it is done.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, no_type_check

import numpy as np

from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.types import ValueType
from feature_store.stores.online.head import HeadCodec
from feature_store.stores.online.steps import MOST_STEPS, StaircaseCodec

logger = logging.getLogger(__name__)

_KINDS = {"count": 0, "sum": 1, "mean": 2, "min": 3, "max": 4}
_FIELDS = {"sum": 1, "sum_high": 2, "sum_low": 3, "min": 4, "max": 5}

#: The compiled pass, once it is there.
_compiled: Callable[..., bool] | None = None
_lock = threading.Lock()


def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def load() -> None:
    """Loads numba and compiles the pass; some seconds the first time, less with the compiled code on disk."""
    global _compiled  # noqa: PLW0603
    with _lock:
        if _compiled is None:
            import numba

            made = numba.njit(cache=True, nogil=True)(_pass)
            _warm_up(made)
            _compiled = made


def load_behind() -> threading.Thread | None:
    """The same in a thread, where numba is installed; until it is done reads are folded with numpy."""
    if not available() or _compiled is not None:
        return None
    thread = threading.Thread(target=_load_quietly, name="isochron-compile", daemon=True)
    thread.start()
    return thread


def _load_quietly() -> None:
    try:
        load()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("windows are folded with numpy, for the compiled way cannot be loaded: %s", error)


class CompiledFold:
    """Folds the windows of many entities, for some aggregations of one view."""

    def __init__(self, codec: StaircaseCodec, head: HeadCodec, aggregations: Sequence[Aggregation]) -> None:
        self._codec, self._head, self._aggregations = codec, head, list(aggregations)

    @cached_property
    def able(self) -> bool:
        """Whether the aggregations are such that this way is open to them."""
        return self._head.fixed and all(a.function.kind in _KINDS for a in self._aggregations)

    def fold(
        self, bases: Sequence[bytes | None], heads: Sequence[bytes | None], times: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray] | None:
        """Per aggregation its values and which there are, and each staircase's `exact_from` (BEGINNING without one);
        None where the numbers must be folded the other way: while nothing is compiled, for head rows out of order, and
        for bytes that are not what they should be.
        """
        if _compiled is None:
            return None
        stairs, stairs_at = _joined(bases)
        rows, rows_at = _joined(heads)
        if stairs is None or rows is None:
            return None
        shape = (len(self._aggregations), len(times))
        integers, floats, valid = np.empty(shape, np.int64), np.empty(shape, np.float64), np.empty(shape, np.bool_)
        exact_from = np.empty(len(times), np.int64)
        done = _compiled(
            *_views(stairs), stairs_at, *_views(rows)[:2], rows_at, times, *self._program, integers, floats, valid,
            exact_from,
        )  # fmt: skip
        if not done:
            return None
        columns = [
            (_narrowed(floats[i], a.output) if self._is_float[i] else integers[i], valid[i])
            for i, a in enumerate(self._aggregations)
        ]
        return columns, exact_from

    @cached_property
    def _is_float(self) -> list[bool]:
        return [a.output.is_float for a in self._aggregations]

    @cached_property
    def _program(self) -> tuple[Any, ...]:
        """What is to be done, as numbers: see `_pass`."""
        codec, columns = self._codec, list(self._codec.columns)
        fields = [(c, f) for c, name in enumerate(columns) for f in codec.fields[name]]
        windows = list(dict.fromkeys((a.window, a.hop) for a in self._aggregations))
        words = self._head.row_size // 8
        return (
            np.array([w for w, _ in windows], np.int64),
            np.array([h or 1 for _, h in windows], np.int64),
            np.array([codec.grain, codec.code_type.itemsize == 8, codec.number_words], np.int64),
            np.array([codec.first_half, codec.third_word], np.int64),
            np.array([codec.counts[name] for name in columns], np.int64),
            np.array([codec.columns[name].type.is_float for name in columns], np.bool_),
            np.array([c for c, _ in fields], np.int64),
            np.array([_FIELDS.get(f.name, 0) for _, f in fields], np.int64),
            np.array([-1 if f.number is None else f.number for _, f in fields], np.int64),
            np.array([words, 1 + self._head.created, words - len(columns)], np.int64),
            np.array([_KINDS[a.function.kind] for a in self._aggregations], np.int64),
            np.array([-1 if a.column == "*" else columns.index(a.column) for a in self._aggregations], np.int64),
            np.array([windows.index((a.window, a.hop)) for a in self._aggregations], np.int64),
        )


def _joined(parts: Sequence[bytes | None]) -> tuple[bytes | None, np.ndarray]:
    """Parts of whole words behind one another and where each begins, in words; None where one is of no whole words."""
    sizes = np.array([len(part) if part else 0 for part in parts], np.int64)
    at = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes >> 3, out=at[1:])
    if (sizes & 7).any():
        return None, at
    return b"".join([*filter(None, parts), bytes(8)]), at


def _views(data: bytes) -> tuple[np.ndarray, ...]:
    words = np.frombuffer(data, np.int64)
    return words, words.view(np.float64), words.view(np.uint32), words.view(np.uint8)


def _narrowed(values: np.ndarray, output: ValueType) -> np.ndarray:
    return values.astype(np.float32) if output is ValueType.FLOAT32 else values


def _warm_up(made: Callable[..., bool]) -> None:
    """Compiles for the types that there are: a fold of nobody."""
    one = np.zeros(1, np.int64)
    words = _views(bytes(8))
    flags = np.zeros(1, np.bool_)
    program = (one, one, np.zeros(3, np.int64), np.zeros(2, np.int64), one, flags, one, one, one, np.ones(3, np.int64))
    out = (np.zeros((1, 0), np.int64), np.zeros((1, 0)), np.zeros((1, 0), np.bool_), np.zeros(0, np.int64))
    made(*words, one, *words[:2], one, np.zeros(0, np.int64), *program, one, one, one, *out)


@no_type_check
def _pass(  # noqa: PLR0912, PLR0915
    words: Any, doubles: Any, halves: Any, octets: Any, at: Any,
    row_words: Any, row_doubles: Any, rows_at: Any, times: Any,
    window: Any, hop: Any, sizes: Any, marks: Any, own: Any, floats: Any,
    field_column: Any, field_kind: Any, field_number: Any, row: Any,
    kind: Any, column: Any, which: Any,
    integers: Any, reals: Any, valid: Any, exact_from: Any,
) -> bool:  # fmt: skip
    """The pass, in the part of Python that numba compiles. False where it cannot be done this way.

    `words` are staircases, `at` where each begins; `row_words` heads likewise. `sizes`: grain, whether codes are wide,
    words of numbers. `marks`: what a staircase begins with, its fingerprint. `own`, `floats`: per column its number of
    counts, and whether it is of floats. `field_*`: per field its column, kind (1 sum, 2 and 3 limbs, 4 min, 5 max, 0
    others) and number of steps. `row`: words of a head row, and where in it null bits and columns begin. `kind`,
    `column`, `which`: per aggregation its function, column (-1: events) and window. Results by aggregation and entity.
    """
    windows, columns, fields = len(window), len(own), len(field_column)
    shape = (columns, windows)
    n, total = np.zeros(shape, np.int64), np.zeros(shape)
    high, low_limb = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    least, most = np.zeros(shape), np.zeros(shape)
    least_i, most_i = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    events, entry = np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    first_row, counts_at = np.zeros(windows, np.int64), np.zeros(columns, np.int64)
    for e in range(len(times)):
        time = times[e]
        begin, count, origin, place = at[e], 0, 0, 0
        exact_from[e] = -(2**63) + 1
        if at[e + 1] > begin:
            if at[e + 1] - begin < 4 or halves[2 * begin] != marks[0] or words[begin + 2] != marks[1]:
                return False
            count, origin = np.int64(halves[2 * begin + 1]), words[begin + 3]
            exact_from[e] = words[begin + 1]
            place = begin + 4 + sizes[2]
        # -- the entry of each window
        for w in range(windows):
            tail = (time - window[w]) // hop[w] * hop[w]
            wanted = np.int64(0)
            if window[w] > 0:
                wanted = max((tail - origin) // sizes[0] + 1, 1)
            a, b = np.int64(0), count
            while a < b:
                middle = (a + b) >> 1
                code = words[place + middle] if sizes[1] else np.int64(halves[2 * place + middle])
                if code < wanted:
                    a = middle + 1
                else:
                    b = middle
            entry[w] = a
        place += count if sizes[1] else (count + 1) >> 1
        events_at = 2 * place
        place += (count + 1) >> 1
        for w in range(windows):
            events[w] = np.int64(halves[events_at + entry[w]]) if entry[w] < count else 0
        # -- the settled state of each column and window
        for c in range(columns):
            for w in range(windows):
                n[c, w], total[c, w], high[c, w], low_limb[c, w] = 0, 0.0, 0, 0
                least[c, w], most[c, w] = math.inf, -math.inf
                least_i[c, w], most_i[c, w] = 2**63 - 1, -(2**63)
        f = 0
        for c in range(columns):
            if count > 0:
                counts_at[c] = events_at
                if halves[2 * (begin + 4) + own[c]] > 0:
                    counts_at[c] = 2 * place
                    place += (count + 1) >> 1
                for w in range(windows):
                    if entry[w] < count:
                        n[c, w] = np.int64(halves[counts_at[c] + entry[w]])
            while f < fields and field_column[f] == c:
                index, steps = np.int64(-1), count
                if count > 0:
                    if field_number[f] >= 0:
                        steps = np.int64(halves[2 * (begin + 4) + field_number[f]])
                        if steps <= MOST_STEPS and steps < count:
                            index = 8 * place
                            place += (count + 7) >> 3
                        else:
                            steps = count
                    for w in range(windows):
                        if entry[w] < count:
                            here = place + (entry[w] if index < 0 else np.int64(octets[index + entry[w]]))
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
        if at[e + 1] > begin and place > at[e + 1]:
            return False
        # -- the head: rows by time, those of each window the last ones before the time of the read
        size = row[0]
        start, rows = rows_at[e], (rows_at[e + 1] - rows_at[e]) // size
        if rows * size != rows_at[e + 1] - start:
            return False
        end = np.int64(0)
        for r in range(rows):
            if r > 0 and row_words[start + r * size] <= row_words[start + (r - 1) * size]:
                return False
            if row_words[start + r * size] < time:
                end = r + 1
        for w in range(windows):
            a, b = np.int64(0), end
            if window[w] > 0:
                tail = (time - window[w]) // hop[w] * hop[w]
                while a < b:
                    middle = (a + b) >> 1
                    if row_words[start + middle * size] < tail:
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
                    here = start + r * size
                    if row_words[here + row[1] + (c >> 6)] & mask:
                        continue
                    n[c, w] += 1
                    here += row[2] + c
                    if floats[c]:
                        value = row_doubles[here]
                        added += value
                        least[c, w], most[c, w] = min(least[c, w], value), max(most[c, w], value)
                    else:
                        whole = row_words[here]
                        high[c, w] += whole >> 32
                        low_limb[c, w] += whole & 0xFFFFFFFF
                        least_i[c, w], most_i[c, w] = min(least_i[c, w], whole), max(most_i[c, w], whole)
                total[c, w] += added
                high[c, w] += low_limb[c, w] >> 32
                low_limb[c, w] &= 0xFFFFFFFF
        # -- values
        for i in range(len(kind)):
            w, c = which[i], column[i]
            found = events[w] if c < 0 else n[c, w]
            integers[i, e], reals[i, e], valid[i, e] = 0, 0.0, found > 0
            if kind[i] == 0:
                integers[i, e], valid[i, e] = found, True
            elif found == 0:
                continue
            elif kind[i] == 1 and not floats[c]:
                fits = -(1 << 31) <= high[c, w] < (1 << 31)
                valid[i, e] = fits
                if fits:
                    integers[i, e] = (high[c, w] << 32) | low_limb[c, w]
            elif kind[i] <= 2:
                value = total[c, w] if floats[c] else high[c, w] * 2.0**32 + low_limb[c, w]
                value = value / found if kind[i] == 2 else value
                valid[i, e] = math.isfinite(value)
                if valid[i, e]:
                    reals[i, e] = value
            elif floats[c]:
                reals[i, e] = least[c, w] if kind[i] == 3 else most[c, w]
            else:
                integers[i, e] = least_i[c, w] if kind[i] == 3 else most_i[c, w]
    return True
