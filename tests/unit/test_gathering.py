"""Reads that are done together: who goes with whom, and that each gets its own rows or its own error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from feature_store.clock import ManualClock
from feature_store.definitions.types import ValueType
from feature_store.errors import RequestError, StoreError
from feature_store.retrieval.online import Prepared
from serving.encodings import Rows
from serving.gathering import MOST_ROWS, Gathering

KEYS = {"id": ValueType.INT64, "name": ValueType.STRING}


class Reads:
    """A handle whose reads end when they are told to, and what they were asked for."""

    def __init__(self, keys: Mapping[str, ValueType] = KEYS, on_demand: Sequence[Any] = ()) -> None:
        self.keys, self.request = dict(keys), SimpleNamespace(on_demand=on_demand)
        self.asked: list[list[Any]] = []
        self.waiting: list[asyncio.Future[None]] = []
        self.holding = False
        self.refused: dict[Any, Exception] = {}

    async def read_async(self, entities: Mapping[str, Sequence[Any]], as_of: int) -> Any:
        ids = list(entities["id"])
        self.asked.append(ids)
        if self.holding:
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]
        for one in ids:
            if one in self.refused:
                raise self.refused[one]
        return SimpleNamespace(as_of=[as_of] * len(ids), ids=ids)


def gathering(reads: Reads) -> Gathering:
    return Gathering(cast("Prepared", reads), ManualClock(7))


def entities(*ids: Any, **more: list[Any]) -> dict[str, list[Any]]:
    return {"id": list(ids), "name": ["n"] * len(ids), **more}


async def ids_of(read: Coroutine[Any, Any, Rows]) -> list[Any]:
    rows = await read
    return cast("Any", rows.answer).ids[rows.low : rows.high]


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 10)

    asyncio.run(bounded())


def test_those_who_are_ready_together_are_read_together() -> None:
    async def scenario() -> None:
        reads = Reads()
        gather = gathering(reads)
        asked = [[1], [2, 3], [4]]
        assert await asyncio.gather(*(ids_of(gather.read(entities(*ids))) for ids in asked)) == asked
        assert reads.asked == [[1, 2, 3, 4]]
        assert await ids_of(gather.read(entities(5))) == [5]
        assert reads.asked[1:] == [[5]]

    run(scenario)


def test_those_who_come_while_one_is_under_way_go_with_the_next() -> None:
    async def scenario() -> None:
        reads = Reads()
        reads.holding = True
        gather = gathering(reads)
        tasks = [asyncio.create_task(ids_of(gather.read(entities(1))))]
        await asyncio.sleep(0.01)
        for one in (2, 3):
            tasks.append(asyncio.create_task(ids_of(gather.read(entities(one)))))
            await asyncio.sleep(0.01)
        assert reads.asked == [[1]]
        reads.waiting[0].set_result(None)
        await asyncio.sleep(0.01)
        assert reads.asked == [[1], [2, 3]]
        reads.waiting[1].set_result(None)
        assert await asyncio.gather(*tasks) == [[1], [2], [3]]

    run(scenario)


def test_a_full_one_does_not_wait() -> None:
    async def scenario() -> None:
        reads = Reads()
        reads.holding = True
        gather = gathering(reads)
        sizes = [1, MOST_ROWS - 1, 2, 1]
        tasks = []
        for size in sizes:
            tasks.append(asyncio.create_task(ids_of(gather.read(entities(*range(size))))))
            await asyncio.sleep(0.01)
        # The second waits for the first, until the third finds no room in it; the fourth goes with the third.
        assert [len(ids) for ids in reads.asked] == [1, MOST_ROWS - 1]
        for waiting in list(reads.waiting):
            waiting.set_result(None)
        await asyncio.sleep(0.01)
        assert [len(ids) for ids in reads.asked] == [1, MOST_ROWS - 1, 3]
        reads.waiting[-1].set_result(None)
        assert [len(ids) for ids in await asyncio.gather(*tasks)] == sizes

    run(scenario)


@pytest.mark.parametrize(
    "odd",
    [
        entities("1"),
        entities(True),
        entities(1.0),
        entities(None),
        entities(),
        entities(1, 2, name=["n"]),
        entities(1, more=[1, 2]),
        {"id": [1]},
        entities(*range(MOST_ROWS + 1)),
    ],
)
def test_what_is_not_as_it_should_be_is_read_alone(odd: dict[str, list[Any]]) -> None:
    async def scenario() -> None:
        reads = Reads()
        gather = gathering(reads)
        await asyncio.gather(gather.read(entities(10)), gather.read(odd), gather.read(entities(11)))
        assert sorted(map(len, reads.asked)) == sorted([2, len(odd["id"])])
        assert [10, 11] in reads.asked

    run(scenario)


def test_functions_and_keys_that_are_read_otherwise_go_alone() -> None:
    async def scenario() -> None:
        for reads in (Reads(on_demand=["f"]), Reads({"id": ValueType.BYTES}), Reads({})):
            gather = gathering(reads)
            await asyncio.gather(gather.read({"id": [1]}), gather.read({"id": [2]}))
            assert reads.asked == [[1], [2]]

    run(scenario)


def test_what_one_is_refused_harms_no_other() -> None:
    async def scenario() -> None:
        reads = Reads()
        reads.refused = {2: RequestError("id", "is 2")}
        gather = gathering(reads)
        told = await asyncio.gather(*(ids_of(gather.read(entities(one))) for one in (1, 2, 3)), return_exceptions=True)
        assert (told[0], told[2]) == ([1], [3])
        assert isinstance(told[1], RequestError)
        assert reads.asked == [[1, 2, 3], [1], [2], [3]]

    run(scenario)


def test_a_store_that_does_not_answer_is_asked_once_for_all() -> None:
    async def scenario() -> None:
        reads = Reads()
        reads.refused = {2: StoreError("it is away")}
        gather = gathering(reads)
        told = await asyncio.gather(*(gather.read(entities(one)) for one in (1, 2, 3)), return_exceptions=True)
        assert [type(error) for error in told] == [StoreError] * 3
        assert reads.asked == [[1, 2, 3]]
        # And whoever comes later is read again.
        assert await ids_of(gather.read(entities(4))) == [4]

    run(scenario)


def test_one_who_is_not_waited_for_any_more_takes_no_answer_from_others() -> None:
    async def scenario() -> None:
        reads = Reads()
        reads.holding = True
        gather = gathering(reads)
        under_way = [asyncio.create_task(ids_of(gather.read(entities(one)))) for one in (1, 2)]
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(ids_of(gather.read(entities(one)))) for one in (3, 4)]
        await asyncio.sleep(0.01)
        for gone in (under_way[0], waiting[0]):
            gone.cancel()
        await asyncio.sleep(0.01)
        for turn in range(2):
            reads.waiting[turn].set_result(None)
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(*under_way, *waiting, return_exceptions=True)
        assert [isinstance(a, asyncio.CancelledError) or a for a in answers] == [True, [2], True, [4]]
        reads.holding = False
        assert await ids_of(gather.read(entities(5))) == [5]

    run(scenario)
