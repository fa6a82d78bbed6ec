"""The suffix staircase: codec, the starts that readers need, and merge against building at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.aggregations.events import Column, Events
from feature_store.aggregations.reference import value
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import Field, WindowedView
from feature_store.errors import CorruptState
from feature_store.stores.online.staircase import Base, Ordered, StaircaseBuilder, newest
from feature_store.stores.online.steps import StaircaseCodec, Staircases
from feature_store.testing.event_logs import Log, LogRow, random_log, values_array
from feature_store.testing.views import COLUMNS, aggregation, aggregation_sets, hops
from feature_store.timestamps import BEGINNING, DAY, HOUR, MINUTE, SECOND

SETTINGS = settings(max_examples=60, derandomize=True, deadline=None)
KEY = (Field("customer", ValueType.INT64),)
NOW = 1_533_124_800 * SECOND


def view_of(aggregations: tuple) -> WindowedView:
    source = Source(name="s", path="p", timestamp_field="ts")
    return WindowedView(name="view", keys=KEY, aggregations=aggregations, source=source)


def events_of(view: WindowedView, rows: list[LogRow]) -> Events:
    """One entity's rows as events in folding order."""
    rows = sorted(rows, key=lambda r: (r.time or 0, BEGINNING if r.created is None else r.created))
    columns = {}
    for name, read_as in view.column_types().items():
        array = values_array([r.values[name] for r in rows], COLUMNS[name])
        if read_as is ValueType.BOOL and COLUMNS[name] is not ValueType.BOOL:
            finite = pa.compute.is_finite(array) if COLUMNS[name].is_float else array.is_valid()
            array = pa.compute.if_else(pa.compute.fill_null(finite, False), True, pa.scalar(None, pa.bool_()))
        columns[name] = Column.of(array.cast(read_as.arrow, safe=False), read_as)
    return Events(
        np.array([0, len(rows)]),
        np.array([r.time for r in rows], np.int64),
        np.array([BEGINNING if r.created is None else r.created for r in rows], np.int64),
        columns,
    )


@st.composite
def built(draw: st.DrawFn) -> tuple[StaircaseBuilder, StaircaseCodec, Log]:
    """A view and a log of one entity, all before NOW."""
    aggregations = draw(aggregation_sets())
    columns = {a.column: COLUMNS[a.column] for a in aggregations if a.column != "*"}
    span = draw(st.sampled_from([MINUTE, DAY, 40 * DAY]))
    log = random_log(draw(st.integers(0, 10**6)), draw(st.integers(0, 25)), KEY, columns, NOW - span, span, entities=1)
    view = view_of(aggregations)
    return StaircaseBuilder(view), StaircaseCodec(view), log


def same(one: Base, other: Base) -> bool:
    states = all(
        one.states[n][f].tobytes() == other.states[n][f].tobytes() and one.states[n].keys() == other.states[n].keys()
        for n in one.states
        for f in one.states[n]
    )
    rest = (one.exact_from, one.starts.tolist(), one.states.keys(), repr(one.firsts), repr(one.lasts))
    return states and rest == (
        other.exact_from,
        other.starts.tolist(),
        other.states.keys(),
        repr(other.firsts),
        repr(other.lasts),
    )


@SETTINGS
@given(built())
def test_a_staircase_is_read_as_it_was_written(case: tuple) -> None:
    builder, codec, log = case
    (base,) = builder.build(events_of(codec.view, list(log.rows)), NOW)
    data = codec.encode(base)
    assert same(codec.decode(data), base)
    assert codec.encode(codec.decode(data)) == data


@SETTINGS
@given(built(), st.integers(0, 99), st.lists(st.sampled_from([0, 1, SECOND, HOUR, DAY]), min_size=1, max_size=4))
def test_merging_in_any_order_equals_building_at_once(case: tuple, seed: int, ticks: list[int]) -> None:
    builder, codec, log = case
    rows = random.Random(seed).sample(list(log.rows), len(log.rows))
    base, clock = None, NOW
    for i, tick in enumerate(ticks):
        clock += tick
        base = builder.merge(base, events_of(codec.view, rows[i :: len(ticks)]), clock)
        base = codec.decode(codec.encode(base))
    (whole,) = builder.build(events_of(codec.view, rows), clock)
    assert base is not None
    assert base.exact_from == whole.exact_from == clock
    assert base.starts.tolist() == whole.starts.tolist()
    for name, state in whole.states.items():
        for part in state:
            exact = part not in ("sum", "mean", "m2")
            assert not exact or state[part].tobytes() == base.states[name][part].tobytes(), (name, part)
    assert repr(base.firsts) == repr(whole.firsts)
    assert repr(base.lasts) == repr(whole.lasts)


@SETTINGS
@given(built(), st.integers(0, 99))
def test_an_entry_answers_every_window_from_its_tail(case: tuple, seed: int) -> None:
    """Counts of events, for all windows at all times from `exact_from` on: no start is too coarse, none is missing."""
    builder, codec, log = case
    (base,) = builder.build(events_of(codec.view, list(log.rows)), NOW)
    rng = random.Random(seed)
    events = log.events(log.rows[0].keys) if log.rows else []
    for a in codec.view.aggregations:
        steps = hops([a]) or [SECOND]
        for time in (NOW, NOW + 1, *(NOW + rng.randrange(2 * rng.choice(steps)) for _ in range(8))):
            count = aggregation("count", "*", a.window, a.hop)
            found = builder.state_at("*", base, base.entry(a.tail(time)))["n"][0]
            assert found == value(events, count, time), (a.name, time)


#   age           older <-----------------------------------------> NOW
#   1 h by 5 m                                             [--------]
#   1 d by 1 h                    [---------------------------------]
#   starts        (dropped)        on hours ..............  on 5 min
def test_starts_are_coarser_with_age_and_end_where_no_window_reaches() -> None:
    codec = StaircaseBuilder(
        view_of((aggregation("count", "*", HOUR, 5 * MINUTE), aggregation("count", "*", DAY, HOUR)))
    )
    times = np.array([NOW - 1, NOW - HOUR, NOW - HOUR - 1, NOW - DAY, NOW - DAY - 1])
    assert codec.starts(times, NOW).tolist() == [NOW - 5 * MINUTE, NOW - HOUR, NOW - 2 * HOUR, NOW - DAY, BEGINNING]


def test_hops_that_are_no_multiples_share_the_starts_of_their_divisor() -> None:
    codec = StaircaseBuilder(
        view_of((aggregation("count", "*", 6 * SECOND, 2 * SECOND), aggregation("count", "*", 6 * SECOND, 3 * SECOND)))
    )
    now = 600 * SECOND
    assert codec.starts(np.array([now - 1, now - 6 * SECOND]), now).tolist() == [now - SECOND, now - 6 * SECOND]


def test_the_newest_of_two_lists_keep_their_order_keys() -> None:
    a = Ordered([9, 5, 5], [1, 2, 1], ["x", "é", "y"])
    b = Ordered([9, 5], [1, 2], ["z", "z"])
    assert newest(a, b, 4) == Ordered([9, 9, 5, 5], [1, 1, 2, 2], ["z", "x", "é", "z"])
    assert newest(a, b, 0) == Ordered([], [], [])


GOLDEN_VIEW = (
    aggregation("count", "*", HOUR, 5 * MINUTE, name="n"),
    aggregation("last_3", "text", HOUR, 5 * MINUTE, name="last"),
    aggregation("first", "whole", HOUR, 5 * MINUTE, name="first"),
    aggregation("sum", "whole", HOUR, 5 * MINUTE, name="sum"),
    aggregation("std", "real", HOUR, 5 * MINUTE, name="std"),
)


def golden_base(codec: StaircaseCodec) -> Base:
    rows: list[tuple[int, int | None, dict[str, Any]]] = [
        (NOW - 10 * MINUTE, None, {"text": "é", "whole": -2, "real": 0.5}),
        (NOW - 10 * MINUTE, 5, {"text": None, "whole": 2**62, "real": 1.5}),
        (NOW - 1, 7, {"text": "b", "whole": None, "real": None}),
    ]
    (base,) = StaircaseBuilder(codec.view).build(
        events_of(codec.view, [LogRow((1,), t, c, v) for t, c, v in rows]), NOW
    )
    return base


def test_the_bytes_of_a_staircase_of_version_2() -> None:
    codec = StaircaseCodec(view_of(GOLDEN_VIEW))
    assert codec.encode(golden_base(codec)).hex() == "".join(GOLDEN)


NONE_YET = "ffffffffffffff7f"
GOLDEN = (
    *("4953", "02", "00", "02000000", "00b0196f5e720500", "d06b6fcb1500f478"),  # entries, exact_from, fingerprint
    "006a564b5e720500",  # origin
    *("01000000", "01000000", "01000000", "00000000"),  # counts of their own: real, text, whole
    *("01000000", "02000000"),  # codes of the starts, in hops of 5 minutes
    *("03000000", "01000000"),  # events from each start on
    *("02000000", "00000000"),  # real: n
    *("000000000000f03f", "0000000000000000"),  # real: mean
    *("000000000000e03f", "0000000000000000"),  # real: m2
    *("02000000", "01000000"),  # text: n
    *("02000000", "00000000"),  # whole: n
    *("ffffff3f00000000", "0000000000000000"),  # whole: high limb of the sum
    *("feffffff00000000", "0000000000000000"),  # whole: low limb
    *("02000000", "feffffffffffffff", "0000000000000000", "00000000"),  # whole: first value from each start on
    *("006a564b5e720500", NONE_YET),  # whole: its time
    *("0100000000000080", NONE_YET),  # whole: its created time
    *("02000000", "01000000", "02000000", "62", "c3a9", "00"),  # text: last values, newest first
    *("ffaf196f5e720500", "006a564b5e720500"),  # text: their times
    *("0700000000000000", "0100000000000080"),  # text: their created times
)


def test_minima_and_maxima_are_kept_as_steps() -> None:
    """Of 300 entries whose maximum changes twice, two values and a byte an entry are kept."""
    view = view_of((aggregation("max", "real", DAY, 5 * MINUTE), aggregation("min", "real", DAY, 5 * MINUTE)))
    codec = StaircaseCodec(view)
    rows = [LogRow((1,), NOW - (300 - i) * 5 * MINUTE + 1, None, {"real": 1.0 + (i == 80)}) for i in range(20, 300)]
    (base,) = StaircaseBuilder(view).build(events_of(view, rows), NOW)
    data = codec.encode(base)
    assert same(codec.decode(data), base)
    assert len(data) == 32 + 16 + 280 * 4 + 280 * 4 + (280 + 2 * 8) + (280 + 1 * 8)


@SETTINGS
@given(st.lists(built(), min_size=1, max_size=1), st.integers(0, 99), st.lists(st.booleans(), min_size=1, max_size=6))
def test_many_staircases_as_they_lie_say_what_each_says(cases: list[tuple], seed: int, present: list[bool]) -> None:
    ((builder, codec, log),) = cases
    rng = random.Random(seed)
    rows = list(log.rows)
    bases: list[Base | None] = []
    for there in present:
        some = rng.sample(rows, rng.randrange(len(rows) + 1))
        bases.append(builder.build(events_of(codec.view, some), NOW)[0] if there else None)
    stairs = Staircases(codec, [codec.encode(base) if base else None for base in bases])
    assert stairs.exact_from.tolist() == [base.exact_from if base else BEGINNING for base in bases]
    times = [NOW + rng.choice([0, 1, SECOND, HOUR, DAY]) for _ in bases]
    tails = [[BEGINNING if (tail := a.tail(t)) is None else tail for t in times] for a in codec.view.aggregations]
    found = stairs.find(np.array(tails, np.int64))
    for w, a in enumerate(codec.view.aggregations):
        for i, base in enumerate(bases):
            assert found[w, i] == (base.entry(a.tail(times[i])) if base else 0)
    events = stairs.events(found)
    for name, plan in codec.columns.items():
        state = stairs.state(name, found, plan.measures)
        for part, values in state.items():
            for (w, i), value_here in zip(np.ndindex(found.shape), values, strict=True):
                expected = builder.state_at(name, bases[i], int(found[w, i]))[part][0]
                assert value_here.tobytes() == expected.tobytes(), (name, part)
                assert events[w, i] == builder.state_at("*", bases[i], int(found[w, i]))["n"][0]


def test_the_fingerprint_of_a_view_stays_what_it_was() -> None:
    """A changed fingerprint makes every store unreadable until it is filled again: it must be meant."""
    assert view_of(GOLDEN_VIEW).fingerprint == GOLDEN_FINGERPRINT


GOLDEN_FINGERPRINT = "d06b6fcb1500f4780c010ee0c378b5bf154d5780febef7bbcc5147d8883fbf83"


def test_a_staircase_of_another_version_or_definition_is_never_guessed_at() -> None:
    codec, other = StaircaseCodec(view_of(GOLDEN_VIEW)), StaircaseCodec(view_of(GOLDEN_VIEW[:1]))
    good = codec.encode(golden_base(codec))
    for bad in (b"", good[:10], b"XX" + good[2:], good[:2] + b"\x01" + good[3:]):
        with pytest.raises(
            CorruptState, match="view 'view': a stored value is of no version that can be read; bootstrap"
        ):
            codec.decode(bad)
    with pytest.raises(CorruptState, match="view 'view': a stored value is of another definition; bootstrap it again"):
        other.decode(good)


def test_a_staircase_that_is_cut_off_is_never_guessed_at() -> None:
    codec = StaircaseCodec(view_of(GOLDEN_VIEW))
    good = codec.encode(golden_base(codec))
    for length in range(len(good)):
        with pytest.raises(CorruptState):
            codec.decode(good[:length])
