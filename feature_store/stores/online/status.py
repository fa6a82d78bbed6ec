"""What an online read says of each value, in Feast's words."""

from __future__ import annotations

import enum


class Status(enum.StrEnum):
    """Windowed values are PRESENT or NULL_VALUE; the other two belong to plain views."""

    PRESENT = "PRESENT"
    NULL_VALUE = "NULL_VALUE"
    NOT_FOUND = "NOT_FOUND"
    OUTSIDE_MAX_AGE = "OUTSIDE_MAX_AGE"
