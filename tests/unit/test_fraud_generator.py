"""The generated transactions against the process' description, and the reading of published ones."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from datasets import fraud_generator
from datasets.fraud_generator import FraudData, FraudProcess, generate
from datasets.fraud_published import CUSTOMERS, TERMINALS, TRANSACTIONS, load_customers, load_published
from feature_store.errors import SourceError

SMALL = FraudProcess(customers=60, terminals=80, days=20, radius=30, seed=5)


@pytest.fixture(scope="module")
def book() -> FraudData:
    """The book's size, for statistics: about 600,000 transactions."""
    return generate(FraudProcess())


@pytest.fixture(scope="module")
def transactions(book: FraudData) -> pd.DataFrame:
    """The book-sized transactions with their customers' profiles beside them."""
    profiles = book.customers.to_pandas().set_index("CUSTOMER_ID")
    return book.transactions.to_pandas().join(profiles, on="CUSTOMER_ID")


def ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def all_bytes(data: FraudData) -> bytes:
    return ipc(data.transactions) + ipc(data.customers) + ipc(data.terminals)


class TestShape:
    def test_tables_have_the_published_columns_and_types(self, book: FraudData) -> None:
        assert book.transactions.schema.equals(TRANSACTIONS)
        assert book.customers.schema.equals(CUSTOMERS)
        assert book.terminals.schema.equals(TERMINALS)
        assert (book.customers.num_rows, book.terminals.num_rows) == (5_000, 10_000)

    def test_rows_are_sorted_by_time_and_numbered(self, transactions: pd.DataFrame) -> None:
        assert transactions["TX_DATETIME"].is_monotonic_increasing
        assert (transactions["TRANSACTION_ID"] == np.arange(len(transactions))).all()

    def test_the_three_time_columns_agree(self, transactions: pd.DataFrame) -> None:
        since_start = transactions["TX_DATETIME"] - pd.Timestamp("2018-04-01")
        assert (since_start == pd.to_timedelta(transactions["TX_TIME_SECONDS"], unit="s")).all()
        assert (since_start.dt.days == transactions["TX_TIME_DAYS"]).all()
        assert set(transactions["TX_TIME_DAYS"]) == set(range(62))

    def test_profiles_are_known_from_the_first_midnight(self) -> None:
        data = generate(FraudProcess(customers=3, terminals=3, days=1, start=dt.date(2020, 2, 29)))
        assert data.customers["PROFILE_TIME"].cast(pa.string()).to_pylist() == ["2020-02-29 00:00:00.000000"] * 3


class TestSeed:
    def test_same_seed_gives_same_bytes_and_another_does_not(self) -> None:
        assert all_bytes(generate(SMALL)) == all_bytes(generate(SMALL))
        other = FraudProcess(**{**vars(SMALL), "seed": 6})
        assert all_bytes(generate(SMALL)) != all_bytes(generate(other))

    def test_bytes_do_not_depend_on_the_hash_seed(self) -> None:
        code = (
            "import hashlib; from datasets.fraud_generator import FraudProcess, generate; "
            "t = generate(FraudProcess(customers=60, terminals=80, days=20, radius=30, seed=5)).transactions; "
            "print(hashlib.sha256(b''.join(c.chunk(0).buffers()[1] for c in t.columns)).hexdigest())"
        )
        digests = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                cwd=Path(fraud_generator.__file__).parents[1],
                check=True,
                capture_output=True,
            ).stdout
            for hash_seed in ("1", "2")
        }
        assert len(digests) == 1

    def test_a_longer_process_repeats_a_shorter_one_up_to_its_last_13_days(self) -> None:
        short, long = (generate(FraudProcess(**{**vars(SMALL), "days": days})).transactions for days in (20, 30))
        settled = short.filter(pc.less(short["TX_TIME_DAYS"], 20 - 13))
        assert settled.num_rows > 500
        assert long.slice(0, settled.num_rows).equals(settled)
        # Labels and amounts of the last 13 days may differ, but not who bought where and when.
        fixed = ["TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID"]
        assert long.select(fixed).slice(0, short.num_rows).equals(short.select(fixed))

    def test_more_terminals_do_not_change_the_customers(self) -> None:
        more = FraudProcess(**{**vars(SMALL), "terminals": 81})
        assert generate(more).customers.equals(generate(SMALL).customers)

    def test_each_day_is_told_once_in_order(self) -> None:
        told: list[int] = []
        generate(SMALL, on_day=told.append)
        assert told == list(range(20))


class TestCustomers:
    def test_profiles_are_uniform_in_their_ranges(self, book: FraudData) -> None:
        profiles = book.customers.to_pandas()
        ranges = {
            "x_customer_id": (0, 100),
            "y_customer_id": (0, 100),
            "mean_amount": (5, 100),
            "mean_nb_tx_per_day": (0, 4),
        }
        for name, (low, high) in ranges.items():
            unit = (profiles[name].sort_values().to_numpy() - low) / (high - low)
            # Kolmogorov-Smirnov: with 5,000 draws a uniform one stays below 0.03 in all but one case of 4,000.
            assert np.abs(unit - (np.arange(5_000) + 0.5) / 5_000).max() < 0.03, name
        assert (profiles["std_amount"] == profiles["mean_amount"] / 2).all()

    def test_daily_transactions_follow_a_poisson_law_less_those_outside_the_day(
        self, book: FraudData, transactions: pd.DataFrame
    ) -> None:
        # Normal(43200, 20000) is inside the day in 96.92 of 100 cases; thinned Poisson is Poisson with mean = variance.
        rate = book.customers["mean_nb_tx_per_day"].to_numpy() * 0.9692
        counts = np.zeros((5_000, 62))
        np.add.at(counts, (transactions["CUSTOMER_ID"], transactions["TX_TIME_DAYS"]), 1)
        assert counts.mean() == pytest.approx(rate.mean(), rel=0.01)
        busy = rate > 3
        assert counts[busy].mean() == pytest.approx(rate[busy].mean(), rel=0.01)
        assert (counts[busy].var(axis=1, ddof=1) / rate[busy]).mean() == pytest.approx(1, abs=0.02)


class TestTransactions:
    def test_times_are_normal_around_midday_inside_the_day(self, transactions: pd.DataFrame) -> None:
        second = transactions["TX_TIME_SECONDS"] % 86_400
        assert second.min() > 0
        # A normal law cut at 2.16 deviations on either side keeps its mean and 0.9043 of its deviation.
        assert second.mean() == pytest.approx(43_200, abs=150)
        assert second.std() == pytest.approx(18_087, rel=0.01)

    def test_amounts_are_normal_in_cents_and_negative_ones_are_drawn_again(self, transactions: pd.DataFrame) -> None:
        assert (transactions["TX_AMOUNT"] == transactions["TX_AMOUNT"].round(2)).all()
        assert (transactions["TX_AMOUNT"] >= 0).all()
        usual = transactions[transactions["TX_FRAUD_SCENARIO"] != 3]
        in_means = usual["TX_AMOUNT"] / usual["mean_amount"]
        # E|Normal part above 0| = 0.97725 + 0.02700 means, and the 2.275 % below 0 are uniform with mean 1.
        assert in_means.mean() == pytest.approx(0.97725 + 0.02700 + 0.02275, abs=0.004)
        assert (in_means < 1).mean() == pytest.approx(0.5 - 0.02275 / 2, abs=0.004)

    def test_terminals_are_those_nearer_than_the_radius_each_as_likely(self) -> None:
        data = generate(FraudProcess(customers=20, terminals=40, days=700, radius=25, seed=2))
        near = distances(data) < 25
        used = np.zeros(near.shape)
        np.add.at(used, (data.transactions["CUSTOMER_ID"].to_numpy(), data.transactions["TERMINAL_ID"].to_numpy()), 1)
        assert not used[~near].any()
        assert (near.any(axis=1) == (used.sum(axis=1) > 0)).all()
        expected = (used.sum(axis=1, keepdims=True) / near.sum(axis=1, keepdims=True).clip(1)).repeat(40, axis=1)
        busy = near & (expected > 20)
        chi_square = ((used[busy] - expected[busy]) ** 2 / expected[busy]).sum()
        freedom = busy.sum() - busy.any(axis=1).sum()
        assert busy.sum() > 50
        assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)

    def test_customers_without_a_terminal_make_no_transactions(self) -> None:
        data = generate(FraudProcess(customers=50, terminals=20, days=10, radius=6, seed=1))
        lonely = np.flatnonzero(~(distances(data) < 6).any(axis=1))
        assert 0 < len(lonely) < 50
        assert not set(lonely) & set(data.transactions["CUSTOMER_ID"].to_pylist())

    def test_no_customer_near_any_terminal_is_an_empty_table(self) -> None:
        data = generate(FraudProcess(customers=5, terminals=1, days=3, radius=1e-6))
        assert data.transactions.num_rows == 0
        assert data.transactions.schema.equals(TRANSACTIONS)

    def test_blocks_of_customers_do_not_change_the_outcome(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = all_bytes(generate(SMALL))
        monkeypatch.setattr(fraud_generator, "_PAIRS_AT_ONCE", 7 * SMALL.terminals)
        assert all_bytes(generate(SMALL)) == whole
        monkeypatch.setattr(fraud_generator, "_PAIRS_AT_ONCE", 1)
        assert all_bytes(generate(SMALL)) == whole

    def test_reachability_of_the_book_stays_below_100_megabytes(self) -> None:
        tracemalloc.start()
        try:
            generate(FraudProcess(days=1))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100e6


def distances(data: FraudData) -> np.ndarray:
    """float64[customers, terminals], one square root at a time."""
    customers, terminals = data.customers.to_pylist(), data.terminals.to_pylist()
    return np.array(
        [
            [
                np.hypot(c["x_customer_id"] - t["x_terminal_id"], c["y_customer_id"] - t["y_terminal_id"])
                for t in terminals
            ]
            for c in customers
        ]
    )


class TestFrauds:
    def test_label_and_scenario_agree(self, transactions: pd.DataFrame) -> None:
        assert set(transactions["TX_FRAUD_SCENARIO"]) == {0, 1, 2, 3}
        assert ((transactions["TX_FRAUD_SCENARIO"] > 0) == (transactions["TX_FRAUD"] == 1)).all()
        assert set(transactions["TX_FRAUD"]) == {0, 1}

    def test_share_of_frauds_is_the_books(self, transactions: pd.DataFrame) -> None:
        assert transactions["TX_FRAUD"].mean() == pytest.approx(0.008, abs=0.002)

    def test_scenario_1_is_exactly_the_amounts_above_220_that_no_later_scenario_took(
        self, transactions: pd.DataFrame
    ) -> None:
        left = transactions[transactions["TX_FRAUD_SCENARIO"] < 2]
        assert ((left["TX_AMOUNT"] > 220) == (left["TX_FRAUD"] == 1)).all()
        assert left["TX_FRAUD"].sum() > 100

    def test_scenario_2_takes_two_terminals_a_day_for_28_days_wholly(self) -> None:
        # 19 transactions a day at each terminal: what was compromised when can be read off the labels.
        data = generate(FraudProcess(customers=2_000, terminals=200, days=70, radius=200, seed=3))
        rows = data.transactions.to_pandas()
        rows = rows[rows["TX_FRAUD_SCENARIO"] != 3]
        share = rows.assign(hit=rows["TX_FRAUD_SCENARIO"] == 2).pivot_table(
            index="TERMINAL_ID", columns="TX_TIME_DAYS", values="hit", aggfunc="mean"
        )
        assert share.shape == (200, 70)
        assert share.isin([0, 1]).all(axis=None)
        compromised = share.to_numpy() == 1
        assert compromised[:, 0].sum() == 2
        assert compromised[:, 1].sum() in (2, 3, 4)
        starts = compromised & ~np.pad(compromised, ((0, 0), (1, 0)))[:, :-1]
        assert starts.sum(axis=0).max() == 2
        finished = [length for length, last in runs(compromised) if last < 69]
        # Shorter than 28 is never; longer is a terminal compromised again before it was clean.
        assert min(finished) == 28
        assert np.mean([length == 28 for length in finished]) > 0.5

    def test_scenario_3_takes_a_third_rounded_down_and_makes_it_five_times_as_much(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Three customers, one day: all of them are compromised, and only once.
        process = FraudProcess(customers=3, terminals=5_000, days=1, radius=200, seed=1)
        raised = generate(process).transactions.to_pandas()
        monkeypatch.setattr(fraud_generator, "TIMES", 1.0)
        before = generate(process).transactions.to_pandas()
        hit = raised["TX_FRAUD_SCENARIO"] == 3
        assert hit.sum() == len(raised) // 3 > 0
        assert (raised["TX_AMOUNT"][~hit] == before["TX_AMOUNT"][~hit]).all()
        assert raised["TX_AMOUNT"][hit].tolist() == (before["TX_AMOUNT"][hit] * 5).round(2).tolist()

    def test_scenario_3_lasts_14_days_from_the_day_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # All customers are compromised every day, and all they do is doubled: each amount counts the days it is hit.
        process = FraudProcess(customers=3, terminals=5_000, days=20, radius=200, seed=1)
        monkeypatch.setattr(fraud_generator, "ONE_IN", 1)
        monkeypatch.setattr(fraud_generator, "TIMES", 2.0)
        doubled = generate(process).transactions.to_pandas()
        monkeypatch.setattr(fraud_generator, "TIMES", 1.0)
        before = generate(process).transactions.to_pandas()
        times_hit = np.log2(doubled["TX_AMOUNT"] / before["TX_AMOUNT"])
        assert times_hit.to_numpy() == pytest.approx(np.minimum(doubled["TX_TIME_DAYS"] + 1, 14).to_numpy())
        assert set(doubled["TX_TIME_DAYS"]) >= {0, 13, 14, 19}

    def test_scenario_1_looks_at_amounts_before_scenario_3_raises_them(self, transactions: pd.DataFrame) -> None:
        raised = transactions[transactions["TX_FRAUD_SCENARIO"] == 3]
        assert (raised["TX_AMOUNT"] <= 220).any()
        assert (raised["TX_AMOUNT"] > 220).any()

    def test_later_scenarios_overwrite_earlier_ones(self) -> None:
        # Two terminals and three customers: everything is compromised from the first day on.
        rows = generate(FraudProcess(customers=3, terminals=2, days=30, radius=200, seed=1)).transactions
        scenarios = set(rows["TX_FRAUD_SCENARIO"].to_pylist())
        assert scenarios == {2, 3}


def runs(compromised: np.ndarray) -> list[tuple[int, int]]:
    """(length, last day) of every unbroken row of compromised days."""
    found = []
    for terminal in compromised:
        length = 0
        for day, hit in enumerate([*terminal, False]):
            if not hit and length:
                found.append((length, day - 1))
            length = length + 1 if hit else 0
    return found


@pytest.mark.parametrize(
    ("argument", "value"), [("customers", 0), ("terminals", -1), ("days", 0), ("radius", 0.0), ("seed", -1)]
)
def test_a_process_that_cannot_be_drawn_is_refused(argument: str, value: int) -> None:
    with pytest.raises(SourceError, match=f"needs (a )?{argument}"):
        FraudProcess(**{argument: value})


class TestLoadPublished:
    @pytest.fixture
    def data(self) -> FraudData:
        return generate(SMALL)

    def test_what_was_generated_and_written_is_read_back_from_file_and_folder(
        self, data: FraudData, tmp_path: Path
    ) -> None:
        pq.write_table(data.transactions, tmp_path / "transactions.parquet")
        assert load_published(tmp_path / "transactions.parquet").equals(data.transactions)
        assert load_published(str(tmp_path)).equals(data.transactions)

    def test_identifiers_as_text_and_times_in_a_zone_become_the_published_types(
        self, data: FraudData, tmp_path: Path
    ) -> None:
        rows = data.transactions
        zoned = rows["TX_DATETIME"].cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us", "Europe/Brussels"))
        written = (
            rows.set_column(2, "CUSTOMER_ID", rows["CUSTOMER_ID"].cast(pa.string()))
            .set_column(3, "TERMINAL_ID", rows["TERMINAL_ID"].cast(pa.int32()))
            .set_column(1, "TX_DATETIME", zoned)
        )
        pq.write_table(written, tmp_path / "any_name.parquet")
        assert load_published(tmp_path / "any_name.parquet").equals(rows)

    def test_columns_that_are_not_published_are_left_out_and_optional_ones_may_be_absent(
        self, data: FraudData, tmp_path: Path
    ) -> None:
        written = data.transactions.drop_columns(["TX_FRAUD_SCENARIO"]).append_column(
            "note", pa.nulls(data.transactions.num_rows)
        )
        pq.write_table(written, tmp_path / "t.parquet")
        assert load_published(tmp_path / "t.parquet").column_names == TRANSACTIONS.names[:-1]

    def test_a_missing_column_is_named_with_those_there_are(self, data: FraudData, tmp_path: Path) -> None:
        file = tmp_path / "t.parquet"
        pq.write_table(data.transactions.select(["TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TX_AMOUNT"]), file)
        with pytest.raises(SourceError) as refused:
            load_published(file)
        assert str(refused.value) == (
            f"'{file}' lacks TERMINAL_ID, TX_FRAUD; its columns are: TRANSACTION_ID, TX_DATETIME, CUSTOMER_ID, "
            "TX_AMOUNT. Rename the columns to the published names (TRANSACTION_ID, TX_DATETIME, CUSTOMER_ID, "
            "TERMINAL_ID, TX_AMOUNT, TX_FRAUD), or give another file."
        )

    @pytest.mark.parametrize(
        ("column", "kind", "problem"),
        [
            ("TX_DATETIME", pa.int64(), "has type int64, which cannot be read as timestamp\\[us\\]. Write the column"),
            ("TX_AMOUNT", pa.string(), "has type string, which cannot be read as double"),
            ("CUSTOMER_ID", pa.float64(), "has type double, which cannot be read as int64"),
        ],
    )
    def test_a_type_that_means_something_else_is_refused(
        self, data: FraudData, tmp_path: Path, column: str, kind: pa.DataType, problem: str
    ) -> None:
        rows = data.transactions
        pq.write_table(
            rows.set_column(rows.column_names.index(column), column, rows[column].cast(kind)), tmp_path / "t.parquet"
        )
        with pytest.raises(SourceError, match=f"column {column} of .*t.parquet' {problem}"):
            load_published(tmp_path / "t.parquet")

    def test_text_that_is_no_number_is_refused(self, data: FraudData, tmp_path: Path) -> None:
        cards = pa.array([f"card-{row}" for row in range(data.transactions.num_rows)])
        pq.write_table(data.transactions.set_column(2, "CUSTOMER_ID", cards), tmp_path / "t.parquet")
        with pytest.raises(SourceError, match=r"CUSTOMER_ID .* cannot be read as int64 without loss: .*card-"):
            load_published(tmp_path / "t.parquet")

    def test_nulls_are_counted_and_refused(self, data: FraudData, tmp_path: Path) -> None:
        label = pa.array([None, None, *data.transactions["TX_FRAUD"].to_pylist()[2:]], pa.int64())
        pq.write_table(data.transactions.set_column(7, "TX_FRAUD", label), tmp_path / "t.parquet")
        with pytest.raises(SourceError, match=r"nulls in TX_FRAUD \(2 of [\d,]+ rows\)"):
            load_published(tmp_path / "t.parquet")

    def test_a_missing_file_is_named_also_in_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"no transactions at '.*nowhere.parquet': there is no such file"):
            load_published(tmp_path / "nowhere.parquet")
        with pytest.raises(SourceError, match=r"no transactions at '.*/transactions.parquet'"):
            load_published(tmp_path)

    def test_a_file_that_is_no_parquet_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "t.parquet").write_text("TRANSACTION_ID,TX_DATETIME\n")
        with pytest.raises(SourceError, match="cannot be read as parquet") as refused:
            load_published(tmp_path / "t.parquet")
        assert refused.value.__cause__ is not None

    def test_customers_get_the_time_from_which_they_are_known(self, data: FraudData, tmp_path: Path) -> None:
        pq.write_table(data.customers.drop_columns(["PROFILE_TIME"]), tmp_path / "customers.parquet")
        midnight = dt.datetime(2018, 4, 1, tzinfo=dt.UTC)
        east = dt.datetime(2018, 4, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=2)))
        for profile_time in (midnight, midnight.replace(tzinfo=None), east):
            assert load_customers(tmp_path, profile_time).equals(data.customers)
        assert load_customers(tmp_path / "transactions.parquet", midnight).equals(data.customers)

    def test_no_customers_file_is_none_and_a_broken_one_is_an_error(self, tmp_path: Path) -> None:
        midnight = dt.datetime(2018, 4, 1, tzinfo=dt.UTC)
        assert load_customers(tmp_path, midnight) is None
        pq.write_table(pa.table({"CUSTOMER_ID": [1]}), tmp_path / "customers.parquet")
        with pytest.raises(SourceError, match="lacks x_customer_id, y_customer_id, mean_amount"):
            load_customers(tmp_path, midnight)


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    folder = os.environ.get("ISOCHRON_DATA")
    if not folder:
        pytest.skip("set ISOCHRON_DATA to the folder that holds fraud/transactions.parquet")
    return load_published(Path(folder) / "fraud").to_pandas()


@pytest.mark.published
class TestAgainstThePublishedTransactions:
    def test_the_published_file_is_read_whole(self, published: pd.DataFrame) -> None:
        assert len(published) == 1_303_778
        assert published["TX_FRAUD_SCENARIO"].value_counts().to_dict() == {0: 1_293_119, 1: 725, 2: 6_532, 3: 3_402}

    def test_the_generated_process_is_like_the_published_one(
        self, published: pd.DataFrame, transactions: pd.DataFrame
    ) -> None:
        same_days = published[published["TX_TIME_DAYS"] < 62]
        assert len(transactions) == pytest.approx(len(same_days), rel=0.03)
        for scenario in (1, 2, 3):
            theirs, ours = ((rows["TX_FRAUD_SCENARIO"] == scenario).mean() for rows in (same_days, transactions))
            assert ours == pytest.approx(theirs, rel=0.3), scenario
        levels = [0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
        theirs, ours = (rows["TX_AMOUNT"].quantile(levels).to_numpy() for rows in (same_days, transactions))
        assert ours == pytest.approx(theirs, rel=0.05)
        theirs, ours = (
            (rows["TX_TIME_SECONDS"] % 86_400).quantile(levels).to_numpy() for rows in (same_days, transactions)
        )
        assert ours == pytest.approx(theirs, rel=0.02)
