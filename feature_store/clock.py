"""Where 'now' comes from: a clock is passed in, never read inside logic."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that tells the present as microseconds since the epoch, UTC."""

    def now(self) -> int: ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> int:
        return time.time_ns() // 1_000


class ManualClock:
    """A clock moved by hand: for tests, and for replaying a past day as if it were today."""

    def __init__(self, now: int = 0) -> None:
        self._now = now

    def now(self) -> int:
        return self._now

    def set(self, now: int) -> None:
        self._now = now

    def advance(self, duration: int) -> None:
        self._now += duration
