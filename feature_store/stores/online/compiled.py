"""Windows of many entities folded by compiled code: one pass over the bytes of staircases and heads as they lie.

The same numbers, bit for bit, as windowed.Reading gives with numpy, several times faster. numba takes seconds to load
and to compile, so nobody waits for it: `load_behind` does it in a thread, and reads change over when it is done.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.types import ValueType
from feature_store.stores.online.head import HeadCodec
from feature_store.stores.online.steps import MOST_STEPS, StaircaseCodec

logger = logging.getLogger(__name__)

_KINDS = {"count": 0, "sum": 1, "mean": 2, "min": 3, "max": 4}
_FIELDS = {"sum": 1, "sum_high": 2, "sum_low": 3, "min": 4, "max": 5}

#: Bytes whose place in memory is known to us, if it is at all.
_SAMPLE = bytes(range(24))
_EMPTY = b""

#: The compiled pass (compiled_pass.fold), once it is there.
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
            from feature_store.stores.online.compiled_pass import first_word, fold

            if first_word(id(_SAMPLE)) != int.from_bytes(_SAMPLE[:8], "little") + len(_SAMPLE):
                raise RuntimeError("this Python keeps bytes otherwise than CPython does")
            _compiled = fold


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
    """Folds the windows of entities, for some aggregations of one view."""

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
        made = self._run([*bases, *heads], times)
        if made is None:
            return None
        count, n = len(self._aggregations), len(times)
        size, at = count * n, 2 * n
        integers = made[at : at + size].reshape(count, n)
        reals = made[at + size : at + 2 * size].view(np.float64).reshape(count, n)
        valid = made[at + 2 * size :].view(np.bool_)[:size].reshape(count, n)
        columns = [
            (_narrowed(reals[i], a.output) if self._is_float[i] else integers[i], valid[i])
            for i, a in enumerate(self._aggregations)
        ]
        return columns, made[n : 2 * n]

    def fold_one(self, base: bytes | None, head: bytes | None, time: int) -> list[Any] | None:
        """The values for one entity, None for null; None for all as `fold`."""
        made = self._run([base, head], time)
        if made is None:
            return None
        count = len(self._aggregations)
        integers, reals = made[2 : 2 + count].tolist(), made[2 + count : 2 + 2 * count].view(np.float64).tolist()
        there = made[2 + 2 * count :].view(np.uint8).tolist()
        values = [
            (real if is_float else whole) for is_float, real, whole in zip(self._is_float, reals, integers, strict=True)
        ]
        if 0 in there[:count]:
            values = [value if known else None for value, known in zip(values, there, strict=False)]
        return values

    def _run(self, parts: list[bytes | None], times: np.ndarray | int) -> np.ndarray | None:
        """The numbers of a pass over staircases and the heads behind them: see compiled_pass.fold."""
        if _compiled is None:
            return None
        n, count = len(parts) // 2, len(self._aggregations)
        numbers = np.empty(2 * n + 2 * count * n + (count * n + 7) // 8, np.int64)
        numbers[:n] = times
        # The parts are in use until the pass has ended: this list holds them.
        held = [part or _EMPTY for part in parts]
        objects = np.fromiter(map(id, held), np.int64, 2 * n)
        address, length = self._program[1:]
        done = _compiled(n, objects.ctypes.data, numbers.ctypes.data, address, length)
        return numbers if done else None

    @cached_property
    def _is_float(self) -> list[bool]:
        return [a.output.is_float for a in self._aggregations]

    @cached_property
    def _program(self) -> tuple[np.ndarray, int, int]:
        """What is to be done, as numbers, with their address and how many they are: see compiled_pass.fold."""
        codec, columns = self._codec, list(self._codec.columns)
        fields = [(c, f) for c, name in enumerate(columns) for f in codec.fields[name]]
        windows = list(dict.fromkeys((a.window, a.hop) for a in self._aggregations))
        words = self._head.row_size // 8
        numbers = [
            *(len(windows), len(columns), len(fields), len(self._aggregations)),
            *(codec.grain, codec.code_type.itemsize == 8, codec.number_words, codec.first_half, codec.third_word),
            *(words, 1 + self._head.created, words - len(columns), MOST_STEPS),
            *(w for w, _ in windows),
            *(h or 1 for _, h in windows),
            *(codec.counts[name] for name in columns),
            *(codec.columns[name].type.is_float for name in columns),
            *(c for c, _ in fields),
            *(_FIELDS.get(f.name, 0) for _, f in fields),
            *(-1 if f.number is None else f.number for _, f in fields),
            *(_KINDS[a.function.kind] for a in self._aggregations),
            *(-1 if a.column == "*" else columns.index(a.column) for a in self._aggregations),
            *(windows.index((a.window, a.hop)) for a in self._aggregations),
        ]
        made = np.array(numbers, np.int64)
        return made, made.ctypes.data, len(made)


def _narrowed(values: np.ndarray, output: ValueType) -> np.ndarray:
    return values.astype(np.float32) if output is ValueType.FLOAT32 else values
