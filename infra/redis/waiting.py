"""Waiting for what comes about by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE = 0.02


def comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Asks again and again until the condition holds; False if it did not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True
