"""The suite of test_online_equals_reference on every way Redis is run, beside the embedded store and a single Redis.

It takes whatever tests that file has, with fewer random examples: what they are about does not depend on where Redis
runs, only whether the same comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.stores.online.backend import Backend
from feature_store.stores.online.open import open_backend
from tests.properties import test_online_equals_reference as suite
from tests.properties.test_online_equals_reference import examples, far_from_greenwich
from tests.redis_fixtures import REDIS_FIXTURES, config_of

__all__ = ["far_from_greenwich"]

#: Of tests with many seeds, these.
SEEDS = (1, 2)


@pytest.fixture(scope="module", params=[name for name in REDIS_FIXTURES if name != "redis_single"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """All but the single server, on which the whole suite runs."""
    servers = request.getfixturevalue(request.param)
    servers.flush()
    opened = open_backend(config_of(servers))
    yield opened
    opened.close()


def marks(test: Callable[..., None], name: str) -> list[pytest.Mark]:
    return [mark for mark in getattr(test, "pytestmark", []) if mark.name == name]


def with_fewer_seeds(test: Callable[..., None]) -> Callable[..., None]:
    @pytest.mark.parametrize("seed", SEEDS)
    def fewer(backend: Backend, seed: int) -> None:
        test(backend, seed)

    return fewer


def taken() -> dict[str, Callable[..., None]]:
    """The tests of the suite that ask for a store. Those of known faults are about what lies above it."""
    found = {}
    for name, test in vars(suite).items():
        if not name.startswith("test_") or "backend" not in inspect.signature(test).parameters:
            continue
        if hasattr(test, "hypothesis") or marks(test, "xfail"):
            continue
        seeded = any(mark.args[0] == "seed" for mark in marks(test, "parametrize"))
        found[name] = with_fewer_seeds(test) if seeded else test
    return found


assert len(taken()) > 15
globals().update(taken())


def again(test: Any, count: int, **strategies: Any) -> Callable[..., None]:
    """A test over random examples with fewer of them."""
    return examples(count)(given(**strategies)(test.hypothesis.inner_test))


test_plain_reads_between_writes = again(
    suite.test_plain_reads_between_writes_equal_the_as_of_join_by_hand_or_are_flagged,
    6,
    names=suite.plain_names,
    ttl=suite.ttls,
    data=st.data(),
)
test_order_and_batches_of_writes_do_not_matter = again(
    suite.test_order_and_batches_of_writes_do_not_matter_and_history_says_the_same,
    3,
    names=suite.plain_names,
    ttl=suite.ttls,
    data=st.data(),
    seed=st.integers(0, 99),
)
