"""Card transactions with frauds, drawn from the simulated process of the Fraud Detection Handbook (chapter 3).

Written from the process' description in numpy, a day at a time over all customers:

- A customer lives at a uniform place in a square of side 100, spends Normal(mean, mean / 2) per transaction with mean
  uniform in (5, 100), and makes Poisson(rate) transactions a day with rate uniform in (0, 4).
- A terminal stands at a uniform place; a customer uses those nearer than `radius`, each equally likely.
- Frauds come in three scenarios: large amounts, compromised terminals, compromised customers (`_Frauds`).

The same process gives the same tables, byte for byte, under one version of numpy (whose streams may change with it).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.fraud_published import CUSTOMERS, TERMINALS, TRANSACTIONS
from feature_store.errors import SourceError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SIDE = 100.0
DAY_SECONDS = 86_400
MIDDAY_SECONDS = DAY_SECONDS / 2
SPREAD_SECONDS = 20_000

#: Scenario 1: every transaction above this amount is a fraud.
LARGE_AMOUNT = 220.0
#: Scenario 2: so many terminals are compromised each day, for so many days from that day on.
TERMINALS_A_DAY, TERMINAL_DAYS = 2, 28
#: Scenario 3: so many customers a day, for so many days; of their transactions one in so many, times so much.
CUSTOMERS_A_DAY, CUSTOMER_DAYS, ONE_IN, TIMES = 3, 14, 3, 5.0

#: Distances are taken for blocks of customers of at most so many customer-terminal pairs: 16 MB for each temporary.
_PAIRS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class FraudProcess:
    """What is drawn: how many customers, terminals and days, from which day on, and the seed of every draw.

    `radius` is the distance (in a square of side 100) within which a customer uses a terminal. The defaults are the
    book's. Raises SourceError for a count or radius that is not positive, or a negative seed.
    """

    customers: int = 5_000
    terminals: int = 10_000
    days: int = 62
    start: dt.date = dt.date(2018, 4, 1)
    radius: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("customers", "terminals", "days", "radius"):
            if not getattr(self, name) > 0:
                raise SourceError(f"a fraud process needs {name} above 0, not {getattr(self, name)}.")
        if self.seed < 0:
            raise SourceError(f"a fraud process needs a seed of 0 or more, not {self.seed}.")


@dataclass(frozen=True)
class FraudData:
    """What came out: Arrow tables in the shapes of `datasets.fraud_published`.

    `transactions` is sorted by time and TRANSACTION_ID is the row number; TX_FRAUD is 0 or 1, TX_FRAUD_SCENARIO 0 for
    genuine, else the last of scenarios 1, 2, 3 that applied. Profiles are known from `start`, midnight.
    """

    transactions: pa.Table
    customers: pa.Table
    terminals: pa.Table


def generate(process: FraudProcess, on_day: Callable[[int], None] | None = None) -> FraudData:
    """Draw the process' tables; `on_day` is called with 0, 1, ... as each day's transactions have been drawn.

    A longer process repeats a shorter one with the same seed, except for scenario 3 in the shorter one's last 13
    days: there the customers' days after its end are not yet known.
    """
    customers = _Customers.draw(process)
    terminals = _Places.draw(_stream(process, "terminals"), process.terminals)
    reach = _reach(customers.places, terminals, process.radius)
    purchases = _Purchases.join(_each_day(process, customers, reach, on_day))
    frauds = _Frauds.draw(process, purchases)
    return FraudData(
        transactions=_transactions_table(process, purchases, frauds),
        customers=_customers_table(process, customers),
        terminals=_terminals_table(terminals),
    )


#: Each kind of draw has a stream of its own, so that one more terminal does not change the customers. The position
#: in this tuple is part of the seed: append, never reorder.
_STREAMS = ("customers", "terminals", "purchases", "compromised terminals", "compromised customers", "raised amounts")


def _stream(process: FraudProcess, kind: str, day: int = 0) -> np.random.Generator:
    """The random stream of one kind of draw on one day: it does not depend on how much other streams were used."""
    key = (_STREAMS.index(kind), day)
    return np.random.default_rng(np.random.SeedSequence(process.seed, spawn_key=key))


@dataclass(frozen=True)
class _Places:
    """Points in the square, float64[n] each."""

    x: Floats
    y: Floats

    @classmethod
    def draw(cls, random: np.random.Generator, count: int) -> _Places:
        return cls(random.uniform(0, SIDE, count), random.uniform(0, SIDE, count))


@dataclass(frozen=True)
class _Customers:
    """Customers' profiles, float64[n] each: place, mean amount of a transaction, mean transactions per day."""

    places: _Places
    mean_amount: Floats
    daily_rate: Floats

    @classmethod
    def draw(cls, process: FraudProcess) -> _Customers:
        random = _stream(process, "customers")
        places = _Places.draw(random, process.customers)
        return cls(places, random.uniform(5, 100, process.customers), random.uniform(0, 4, process.customers))

    @property
    def std_amount(self) -> Floats:
        return self.mean_amount / 2


@dataclass(frozen=True)
class _Reach:
    """Which terminals each customer can use: customer c's are `terminal[first[c] : first[c] + count[c]]`."""

    terminal: Ints
    first: Ints
    count: Ints


def _reach(customers: _Places, terminals: _Places, radius: float) -> _Reach:
    """Every pair nearer than the radius, customer by customer, without holding all the distances at once."""
    block = max(1, _PAIRS_AT_ONCE // len(terminals.x))
    masks = (_near(customers, terminals, radius, at, at + block) for at in range(0, len(customers.x), block))
    found = [(np.nonzero(mask)[1], np.count_nonzero(mask, axis=1)) for mask in masks]
    count = np.concatenate([counts for _, counts in found])
    return _Reach(np.concatenate([ids for ids, _ in found]), np.cumsum(count) - count, count)


def _near(customers: _Places, terminals: _Places, radius: float, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """bool[customers from start to stop, terminals]: nearer than the radius."""
    distance = np.subtract.outer(customers.x[start:stop], terminals.x) ** 2
    distance += np.subtract.outer(customers.y[start:stop], terminals.y) ** 2
    return distance < radius**2


@dataclass(frozen=True)
class _Purchases:
    """Transactions by time, a row each: day since the start, second of the day, ids (int64[n]), amount (float64[n])."""

    day: Ints
    second: Ints
    customer: Ints
    terminal: Ints
    amount: Floats

    @classmethod
    def join(cls, days: Iterable[_Purchases]) -> _Purchases:
        """Days one after another: each is sorted, so the whole is."""
        held = list(days)
        return cls(*(np.concatenate([getattr(day, field.name) for day in held]) for field in fields(cls)))


def _each_day(
    process: FraudProcess, customers: _Customers, reach: _Reach, on_day: Callable[[int], None] | None
) -> Iterator[_Purchases]:
    for day in range(process.days):
        yield _purchases_of(day, _stream(process, "purchases", day), customers, reach)
        if on_day:
            on_day(day)


def _purchases_of(day: int, random: np.random.Generator, customers: _Customers, reach: _Reach) -> _Purchases:
    """One day's transactions of all customers, sorted by second; within a second by customer."""
    wanted = random.poisson(customers.daily_rate)
    customer = np.repeat(np.arange(len(wanted)), np.where(reach.count > 0, wanted, 0))
    second, inside = _times(random, len(customer))
    customer, second = customer[inside], second[inside]
    amount = _amounts(random, customers.mean_amount[customer], customers.std_amount[customer])
    terminal = reach.terminal[reach.first[customer] + random.integers(0, reach.count[customer])]
    order = np.argsort(second, kind="stable")
    return _Purchases(np.full(len(order), day), second[order], customer[order], terminal[order], amount[order])


def _times(random: np.random.Generator, count: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Whole seconds of the day, and which of them lie inside the day (the others are dropped, not drawn again)."""
    second = random.normal(MIDDAY_SECONDS, SPREAD_SECONDS, count).astype(np.int64)
    return second, (second > 0) & (second < DAY_SECONDS)


def _amounts(random: np.random.Generator, mean: Floats, std: Floats) -> Floats:
    """One amount for each given mean, in whole cents; what Normal makes negative is drawn again, uniformly."""
    amount = random.normal(mean, std)
    negative = amount < 0
    amount[negative] = random.uniform(0, 2 * mean[negative])
    return np.round(amount, 2)


@dataclass(frozen=True)
class _Frauds:
    """What frauds make of the purchases: float64[n] amounts, and int64[n] scenario, 0 where genuine."""

    amount: Floats
    scenario: Ints

    @classmethod
    def draw(cls, process: FraudProcess, purchases: _Purchases) -> _Frauds:
        """Scenarios in the book's order: a later one overwrites the label; 1 sees amounts before 3 raises them."""
        scenario = np.where(purchases.amount > LARGE_AMOUNT, 1, 0)
        scenario[_at_compromised_terminal(process, purchases)] = 2
        amount = purchases.amount.copy()
        for rows in _by_compromised_customers(process, purchases):
            amount[rows] = np.round(amount[rows] * TIMES, 2)
            scenario[rows] = 3
        return cls(amount, scenario)


def _at_compromised_terminal(process: FraudProcess, purchases: _Purchases) -> npt.NDArray[np.bool_]:
    """bool[n]: made at a terminal on a day on which it is compromised."""
    compromised = np.zeros((process.terminals, process.days), dtype=np.bool_)
    for day in range(process.days):
        victims = _victims(_stream(process, "compromised terminals", day), process.terminals, TERMINALS_A_DAY)
        compromised[victims, day : day + TERMINAL_DAYS] = True
    return compromised[purchases.terminal, purchases.day]


def _by_compromised_customers(process: FraudProcess, purchases: _Purchases) -> Iterator[Ints]:
    """For each day the fraudulent rows of the customers compromised on it: of all theirs, one in three, rounded down.

    A customer compromised again before the time is over may have a transaction drawn twice, and raised twice.
    """
    for day in range(process.days):
        start, stop = np.searchsorted(purchases.day, [day, day + CUSTOMER_DAYS])
        victims = _victims(_stream(process, "compromised customers", day), process.customers, CUSTOMERS_A_DAY)
        rows = start + np.flatnonzero(np.isin(purchases.customer[start:stop], victims))
        yield _stream(process, "raised amounts", day).choice(rows, len(rows) // ONE_IN, replace=False)


def _victims(random: np.random.Generator, total: int, count: int) -> Ints:
    """So many distinct ids below `total`; all of them when there are too few."""
    return random.choice(total, min(count, total), replace=False)


def _transactions_table(process: FraudProcess, purchases: _Purchases, frauds: _Frauds) -> pa.Table:
    seconds = purchases.day * DAY_SECONDS + purchases.second
    return _table(
        TRANSACTIONS,
        TRANSACTION_ID=np.arange(len(seconds)),
        TX_DATETIME=np.datetime64(process.start, "us") + seconds.astype("timedelta64[s]"),
        CUSTOMER_ID=purchases.customer,
        TERMINAL_ID=purchases.terminal,
        TX_AMOUNT=frauds.amount,
        TX_TIME_SECONDS=seconds,
        TX_TIME_DAYS=purchases.day,
        TX_FRAUD=np.sign(frauds.scenario),
        TX_FRAUD_SCENARIO=frauds.scenario,
    )


def _customers_table(process: FraudProcess, customers: _Customers) -> pa.Table:
    return _table(
        CUSTOMERS,
        CUSTOMER_ID=np.arange(process.customers),
        x_customer_id=customers.places.x,
        y_customer_id=customers.places.y,
        mean_amount=customers.mean_amount,
        std_amount=customers.std_amount,
        mean_nb_tx_per_day=customers.daily_rate,
        PROFILE_TIME=np.full(process.customers, np.datetime64(process.start, "us")),
    )


def _terminals_table(terminals: _Places) -> pa.Table:
    return _table(
        TERMINALS, TERMINAL_ID=np.arange(len(terminals.x)), x_terminal_id=terminals.x, y_terminal_id=terminals.y
    )


def _table(schema: pa.Schema, **columns: np.ndarray) -> pa.Table:
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
