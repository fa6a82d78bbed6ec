"""Where our answers differ from those of Feast's own Redis store, and why. What is not listed here is a defect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.definitions.types import ValueType
from feature_store.timestamps import HOUR, SECOND, micros
from tests.integration.twins.answers import Cell, same
from tests.integration.twins.definitions import View
from tests.integration.twins.rows import Row


@dataclass(frozen=True)
class Case:
    """A cell of a stored view: both answers, and all rows that came in of its entity. `confused` where Feast reads
    another entity's: see below.
    """

    view: View
    type: ValueType
    rows: Sequence[Row]
    ours: Cell
    feast: Cell
    now: int
    confused: bool

    @property
    def at_one_time(self) -> bool:
        return self.ours.time == self.feast.time

    @property
    def materialized(self) -> bool:
        return self.view.filling == "materialize" and self.at_one_time


@dataclass(frozen=True)
class Reason:
    """A difference and its reason; `holds` says of a cell whether it is this one."""

    text: str
    holds: Callable[[Case], bool]


def _present(cell: Cell, value: Any) -> bool:
    return cell.status == "PRESENT" and same(cell.value, value)


def _unknown(case: Case) -> bool:
    nothing = case.ours.value is None and case.ours.status == "NOT_FOUND" and case.ours.time == 0
    return nothing and not case.rows and _present(case.feast, None) and case.feast.time == 0


def _confused(case: Case) -> bool:
    return case.confused


def _keyless(case: Case) -> bool:
    return not case.view.keys and case.view.filling != "materialize" and _present(case.feast, None)


def _null(case: Case) -> bool:
    ours = case.ours.value is None and case.ours.status == "NULL_VALUE"
    return ours and _present(case.feast, None) and case.at_one_time


def _expired(case: Case) -> bool:
    ours = case.ours.value is None and case.ours.status == "OUTSIDE_MAX_AGE" and case.ours.time == 0
    limit = case.now - case.view.ttl * HOUR
    return ours and case.view.ttl > 0 and case.feast.status == "PRESENT" and case.feast.time < limit


def _corrected(case: Case) -> bool:
    return case.at_one_time and sum(row.time == case.ours.time for row in case.rows) > 1


def _to_come(case: Case) -> bool:
    return case.feast.time > case.now >= case.ours.time


def _ancient(case: Case) -> bool:
    return case.feast.time < case.ours.time < 0 and all(row.time < 0 for row in case.rows if row.time < case.now)


def _not_a_number(case: Case) -> bool:
    ours = case.ours.value
    return case.materialized and isinstance(ours, float) and math.isnan(ours) and _present(case.feast, None)


def _whole_seconds(case: Case) -> bool:
    if not case.materialized or case.type is not ValueType.TIMESTAMP or None in (case.ours.value, case.feast.value):
        return False
    return micros(case.ours.value) // SECOND * SECOND == micros(case.feast.value)


def _beside_a_null(case: Case) -> bool:
    ours, feast = case.ours.value, case.feast.value
    return case.materialized and case.type is ValueType.INT64 and ours != feast and int(float(ours)) == feast


def _null_in_a_list(case: Case) -> bool:
    ours, feast = case.ours.value, case.feast.value
    if not case.materialized or not isinstance(ours, list) or None not in ours or not isinstance(feast, list):
        return False
    stands_for = "" if case.type is ValueType.STRING_LIST else math.nan
    return same([stands_for if v is None else v for v in ours], feast)


#: In this order: the first that holds counts.
REASONS = {
    "wrong entity": Reason(
        "Feast reads a view with a renamed join key by the key's own column, where that comes later in the request.",
        _confused,
    ),
    "view without entity": Reason(
        "Feast writes a view without entities under no key, and reads it under that of a dummy entity: never found.",
        _keyless,
    ),
    "unknown entity": Reason(
        "Feast calls a value PRESENT of which no row ever came in; its own protobuf says NOT_FOUND.", _unknown
    ),
    "null": Reason("Feast calls a stored null PRESENT; its own protobuf says NULL_VALUE.", _null),
    "to come": Reason("Feast serves a row that is dated ahead at once, ours waits for its time.", _to_come),
    "expired": Reason("Feast's store does not apply ttl; its own protobuf says OUTSIDE_MAX_AGE.", _expired),
    "ancient": Reason("Feast compares no times before 1970: there what is written last stays, old or new.", _ancient),
    "corrected": Reason("Feast drops a row of an event time that it has, though it was created later.", _corrected),
    "NaN": Reason("Feast's converter makes a null of NaN; a file that we materialize keeps it.", _not_a_number),
    "whole seconds": Reason(
        "Feast's converter cuts times to seconds; ours keeps a file's microseconds.", _whole_seconds
    ),
    "beside a null": Reason("Feast's converter makes doubles of integers beside a null.", _beside_a_null),
    "null in a list": Reason("Feast's converter puts '' or NaN for a null in a list.", _null_in_a_list),
}


def reason_of(case: Case) -> str | None:
    """Why two answers differ; None where there is no reason."""
    return next((name for name, reason in REASONS.items() if reason.holds(case)), None)


@dataclass(frozen=True)
class Computed:
    """A cell of an on-demand view: both answers, and what both stores gave the view's function."""

    our_inputs: Sequence[Cell]
    feasts_inputs: Sequence[Cell]
    ours: Cell
    feast: Cell


def _other_inputs(case: Computed) -> bool:
    return not all(same(a.value, b.value) for a, b in zip(case.our_inputs, case.feasts_inputs, strict=True))


def _computed_null(case: Computed) -> bool:
    return case.ours.value is None and case.ours.status == "NULL_VALUE" and _present(case.feast, None)


def _computed_nan(case: Computed) -> bool:
    ours = case.ours.value
    return isinstance(ours, float) and math.isnan(ours) and _present(case.feast, None)


COMPUTED = {
    "other inputs": "The stored values that the function was given differ, for one of the reasons above.",
    "null": "Feast calls a computed null PRESENT.",
    "NaN": "Feast makes a null of a NaN that a function in Python mode returns.",
}

_COMPUTED_HOLDS = {"other inputs": _other_inputs, "null": _computed_null, "NaN": _computed_nan}


def computed_reason_of(case: Computed) -> str | None:
    """Why two computed values differ; None where there is no reason."""
    return next((name for name, holds in _COMPUTED_HOLDS.items() if holds(case)), None)
