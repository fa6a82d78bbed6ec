"""How long and how often a request is tried."""

from __future__ import annotations

import time

from feature_store.stores.online.redis.failures import Failure, Overdue, Passing, Redo

#: Seconds before a new try, doubled each time up to the longest.
_FIRST_DELAY, _LONGEST_DELAY = 0.005, 0.2

#: How often a request follows at once where Redis sends it; nodes that disagree would send it to and fro.
_FOLLOWED = 5


class Patience:
    """From now on, for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self._delay = _FIRST_DELAY
        self._followed = 0
        # The last try's beginning, and why it was made.
        self._tried = self.deadline - seconds
        self._before: Failure | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline, 0 after it."""
        return max(self.deadline - time.monotonic(), 0.0)

    def pause(self, failure: Failure) -> float | None:
        """Seconds to wait before the next try; None where there is none: it would not help, or be too late."""
        if not isinstance(failure, Passing):
            return None
        delay = self._next(failure)
        if delay >= self.left:
            return None
        self._tried, self._before = time.monotonic() + delay, failure
        return delay

    def reason(self, failure: Failure) -> Failure:
        """What to tell of a last failure: where its try had little time, why the one before it failed."""
        hurried = self.deadline - self._tried < self.seconds / 2
        return self._before if hurried and self._before and isinstance(failure, Overdue) else failure

    def _next(self, failure: Failure) -> float:
        if isinstance(failure, Redo) and self._followed < _FOLLOWED:
            self._followed += 1
            return 0.0
        delay, self._delay = self._delay, min(2 * self._delay, _LONGEST_DELAY)
        return delay
