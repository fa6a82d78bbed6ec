"""The published study: its split in time, its metrics, its figures, and the alarm for figures that are too good."""

from __future__ import annotations

import datetime as dt
import os
from itertools import product
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.errors import IsochronError
from models.errors import LeakSuspected, MetricUndefined, ScoreOutOfTolerance, StudyError
from models.metrics import auc_roc, average_precision, card_precision_at_k
from models.study import (
    BOOK_INPUTS,
    BOOK_SPLIT,
    PUBLISHED,
    TOLERANCE,
    Scores,
    StudySplit,
    check_scores,
    fit_and_score,
    split,
)

START = dt.date(2018, 7, 25)


def table(*rows: tuple[int, str, int]) -> pd.DataFrame:
    """Transactions at noon from (day since START, card, fraud)."""
    days, cards, frauds = zip(*rows, strict=True)
    times = pd.Timestamp(START) + pd.to_timedelta(days, unit="D") + pd.Timedelta(hours=12)
    return pd.DataFrame({"TX_DATETIME": times, "customer_id": cards, "TX_FRAUD": frauds})


class TestSplit:
    # Train 2 days, wait 2, test 3. A fraud on day f is known on days after f + 2.
    #
    #   day    -1 | 0   1 | 2   3 | 4   5   6 | 7
    #             | train | delay |   test    |
    #   a         |   F   |       | x   x   x |      fraud in train: never in the test
    #   b         |       | F     | .   x   x |      fraud on day 2 is known from day 5 on
    #   c         |       |     F | .   .   x |      fraud on day 3 is known from day 6 on
    #   d         |       |       | F   .   . |      fraud on day 4 would be known from day 7 on
    #   e       F |       |       | .   .   . |      a fraud before the training is not held against it
    SPLIT = StudySplit(START, train_days=2, delay_days=2, test_days=3)
    FRAUDS = (("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", -1))
    KEPT = frozenset({("b", 4), ("c", 4), ("c", 5), *product("de", (4, 5, 6))})

    def timeline(self) -> pd.DataFrame:
        return table(*((day, card, int((card, day) in self.FRAUDS)) for day in range(-1, 8) for card in "abcde"))

    def test_rows_are_those_of_the_timeline(self) -> None:
        train, test = split(self.timeline(), self.SPLIT)
        assert pairs(train) == set(product("abcde", (0, 1)))
        assert pairs(test) == self.KEPT
        assert (len(train), len(test)) == (10, 9)

    def test_columns_and_order_are_kept(self) -> None:
        shuffled = self.timeline().assign(amount=range(45)).sample(frac=1, random_state=4)
        train, test = split(shuffled, self.SPLIT)
        for part in (train, test):
            assert part.equals(shuffled.loc[part.index])
            assert part.index.tolist() == [row for row in shuffled.index if row in set(part.index)]
        assert pairs(test) == self.KEPT

    def test_times_with_a_zone_are_taken_by_their_day_in_utc(self) -> None:
        rows = self.timeline()
        auckland = rows["TX_DATETIME"].dt.tz_localize("UTC").dt.tz_convert("Pacific/Auckland")
        _, test = split(rows.assign(TX_DATETIME=auckland), self.SPLIT)
        assert pairs(test, utc=True) == self.KEPT

    def test_a_day_runs_from_its_midnight_to_before_the_next(self) -> None:
        edges = ["2018-07-24 23:59:59", "2018-07-25", "2018-07-26 23:59:59", "2018-07-27"]
        edges += ["2018-07-28 23:59:59", "2018-07-29", "2018-07-31 23:59:59", "2018-08-01"]
        rows = pd.DataFrame({"TX_DATETIME": pd.to_datetime(edges, format="mixed"), "customer_id": 1, "TX_FRAUD": 0})
        train, test = split(rows, self.SPLIT)
        assert (train.index.tolist(), test.index.tolist()) == ([1, 2], [5, 6])

    @given(
        st.lists(st.tuples(st.integers(-2, 9), st.sampled_from("abcd"), st.integers(0, 1)), max_size=40),
        st.integers(1, 3),
        st.integers(0, 3),
        st.integers(1, 3),
    )
    def test_equals_the_books_day_by_day_loop(
        self, rows: list[tuple[int, str, int]], train_days: int, delay_days: int, test_days: int
    ) -> None:
        first_test_day = train_days + delay_days
        # A row that keeps train and test from being empty.
        rows = [*rows, (0, "z", 0), (first_test_day, "z", 0)]
        _, test = split(table(*rows), StudySplit(START, train_days, delay_days, test_days))
        known = {card for day, card, fraud in rows if fraud and 0 <= day < train_days}
        expected = []
        for d in range(test_days):
            known |= {card for day, card, fraud in rows if fraud and day == train_days + d - 1}
            expected += [i for i, (day, card, _) in enumerate(rows) if day == first_test_day + d and card not in known]
        assert test.index.tolist() == sorted(expected)

    def test_a_missing_column_and_days_without_rows_are_named(self) -> None:
        with pytest.raises(
            StudyError, match="the split needs the columns customer_id; there are: TX_DATETIME, TX_FRAUD"
        ):
            split(self.timeline().drop(columns="customer_id"), self.SPLIT)
        with pytest.raises(
            StudyError, match=r"tests from 2018-07-29 to before 2018-08-01; .* 10 rows to train and 0 to"
        ):
            split(self.timeline().iloc[:20], self.SPLIT)
        with pytest.raises(StudyError, match=r"0 rows to train and 0 to test. It is empty"):
            split(self.timeline().iloc[:0], self.SPLIT)

    @pytest.mark.parametrize("days", [{"train_days": 0}, {"delay_days": -1}, {"test_days": 0}])
    def test_a_split_without_days_is_refused(self, days: dict[str, int]) -> None:
        with pytest.raises(StudyError, match="a study needs a day or more to train and to test"):
            StudySplit(START, **days)

    def test_the_book_tests_from_8_to_14_august(self) -> None:
        assert (BOOK_SPLIT.test_start, BOOK_SPLIT.test_end) == (dt.date(2018, 8, 8), dt.date(2018, 8, 15))


def pairs(rows: pd.DataFrame, utc: bool = False) -> set[tuple[str, int]]:
    times = rows["TX_DATETIME"].dt.tz_convert("UTC").dt.tz_localize(None) if utc else rows["TX_DATETIME"]
    return set(zip(rows["customer_id"], (times - pd.Timestamp(START)).dt.days, strict=True))


def slow_card_precision(rows: list[tuple[int, int, int, int]], k: int) -> float:
    """The definition, one card at a time, from (day, customer, score, label)."""
    blocked: list[int] = []
    shares = []
    for today in sorted({day for day, *_ in rows}):
        cards: dict[int, tuple[int, int]] = {}
        for day, customer, score, label in rows:
            if day == today and customer not in blocked:
                highest, compromised = cards.get(customer, (score, 0))
                cards[customer] = (max(highest, score), max(compromised, label))
        ranked = sorted(cards, key=lambda customer: (-cards[customer][0], customer))
        found = [customer for customer in ranked[:k] if cards[customer][1]]
        blocked += found
        shares.append(len(found) / k)
    return sum(shares) / len(shares)


transaction_rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=40
)


class TestCardPrecision:
    @given(transaction_rows, st.integers(1, 7))
    def test_equals_the_slow_obvious_loop(self, rows: list[tuple[int, int, int, int]], k: int) -> None:
        assert card_precision_at_k(*zip(*rows, strict=True), k=k) == pytest.approx(slow_card_precision(rows, k))

    @given(transaction_rows, st.randoms(use_true_random=False))
    def test_shuffled_rows_change_nothing(self, rows: list[tuple[int, int, int, int]], random: object) -> None:
        shuffled = list(rows)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        assert card_precision_at_k(*zip(*rows, strict=True), k=2) == card_precision_at_k(
            *zip(*shuffled, strict=True), k=2
        )

    def test_a_found_card_leaves_the_later_days_and_a_missed_one_stays(self) -> None:
        # Two days, three cards, k = 2. Day 0: a (fraud, found) and b; c (fraud) is third, and missed.
        # Day 1: a is blocked, so c (fraud) and b are looked at, though a has the highest score.
        rows = [("0", "a", 0.9, 1), ("0", "b", 0.8, 0), ("0", "c", 0.1, 1)]
        rows += [("1", "a", 0.9, 1), ("1", "b", 0.2, 0), ("1", "c", 0.1, 1)]
        assert card_precision_at_k(*zip(*rows, strict=True), k=2) == (1 / 2 + 1 / 2) / 2

    def test_a_card_is_as_suspicious_as_its_worst_transaction_and_compromised_by_any(self) -> None:
        rows = [(0, "a", 0.9, 0), (0, "a", 0.1, 1), (0, "b", 0.5, 0)]
        assert card_precision_at_k(*zip(*rows, strict=True), k=1) == 1

    def test_a_day_with_fewer_cards_than_k_is_still_divided_by_k(self) -> None:
        assert card_precision_at_k([0], [7], [0.3], [1], k=100) == 0.01

    def test_of_equally_suspicious_cards_the_first_by_customer_are_looked_at(self) -> None:
        customers = np.arange(300)[::-1]
        first_ten = (customers % 3 == 2) & (customers < 30)
        assert card_precision_at_k([0] * 300, customers, customers % 3, first_ten, k=10) == 1

    def test_what_has_no_value_is_refused(self) -> None:
        with pytest.raises(MetricUndefined, match="got k=0"):
            card_precision_at_k([0], [1], [0.5], [1], k=0)
        with pytest.raises(MetricUndefined, match="0 days, 0 customers, 0 labels"):
            card_precision_at_k([], [], [], [])
        with pytest.raises(MetricUndefined, match="2 days, 1 customers, 1 labels"):
            card_precision_at_k([0, 1], [1], [0.5], [1])


scored = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=30)


class TestRanking:
    @given(scored)
    def test_auc_is_the_share_of_pairs_in_order_with_ties_half(self, rows: list[tuple[int, int]]) -> None:
        frauds, genuine = ([score for score, label in rows if label == kind] for kind in (1, 0))
        if not frauds or not genuine:
            with pytest.raises(MetricUndefined, match=r"all .* labels are the same"):
                auc_roc(*zip(*rows, strict=True))
            return
        wins = [1 if f > g else 0.5 if f == g else 0 for f in frauds for g in genuine]
        assert auc_roc(*zip(*rows, strict=True)) == pytest.approx(sum(wins) / len(wins))

    @given(scored)
    def test_average_precision_is_the_mean_over_frauds_of_the_precision_at_their_score(
        self, rows: list[tuple[int, int]]
    ) -> None:
        frauds = [score for score, label in rows if label]
        if not frauds:
            with pytest.raises(MetricUndefined, match="average precision needs a fraud"):
                average_precision(*zip(*rows, strict=True))
            return
        caught = [[label for score, label in rows if score >= fraud] for fraud in frauds]
        expected = sum(sum(labels) / len(labels) for labels in caught) / len(frauds)
        assert average_precision(*zip(*rows, strict=True)) == pytest.approx(expected)

    @pytest.mark.parametrize("metric", [auc_roc, average_precision])
    def test_scores_and_labels_that_are_none_are_refused(self, metric: object) -> None:
        assert callable(metric)
        with pytest.raises(MetricUndefined, match="1 of 2 scores are not numbers"):
            metric([0.1, float("nan")], [0, 1])
        with pytest.raises(MetricUndefined, match="labels are 0 or 1; 1 of 2 are not"):
            metric([0.1, 0.2], [0, 2])
        with pytest.raises(MetricUndefined, match="one score and one label"):
            metric([0.1, 0.2], [0])


class TestCheckScores:
    PUBLISHED = Scores(0.871, 0.606, 0.291)

    @pytest.mark.parametrize("side", [-1, 0, 1])
    def test_the_tolerance_itself_is_within_it_on_both_sides(self, side: int) -> None:
        measured = Scores(0.871 + side * 0.005, 0.606 + side * 0.01, 0.291 + side * 0.005)
        check_scores("model", measured, self.PUBLISHED)

    def test_a_figure_too_good_is_a_leak_and_says_which_and_by_how_much(self) -> None:
        with pytest.raises(LeakSuspected) as alarm:
            check_scores("logistic_regression", Scores(0.8712, 0.842, 0.291), self.PUBLISHED)
        assert alarm.value.excess == {"average_precision": pytest.approx(0.236)}
        assert str(alarm.value) == (
            "logistic_regression: average_precision is 0.2360 above the published study. A figure too good means that "
            "a feature knows the answer. Look first at the label delay (a fraud is known 7 days after the transaction, "
            "not at it), then at windows that reach past the transaction, then at known cards left in the test. "
            "Measured: auc_roc 0.8712 (published 0.871, tolerance 0.005); average_precision 0.8420 (published 0.606, "
            "tolerance 0.010); card_precision_100 0.2910 (published 0.291, tolerance 0.005)."
        )

    @pytest.mark.parametrize("figure", ["auc_roc", "average_precision", "card_precision_100"])
    def test_each_figure_alone_raises_just_outside_the_tolerance(self, figure: str) -> None:
        value, room = getattr(self.PUBLISHED, figure), getattr(TOLERANCE, figure)
        with pytest.raises(LeakSuspected, match=f"model: {figure} is"):
            check_scores("model", Scores(**{**vars(self.PUBLISHED), figure: value + room + 1e-4}), self.PUBLISHED)
        with pytest.raises(ScoreOutOfTolerance, match=f"model: {figure} is .* below the published study"):
            check_scores("model", Scores(**{**vars(self.PUBLISHED), figure: value - room - 1e-4}), self.PUBLISHED)

    def test_above_and_below_at_once_is_a_leak(self) -> None:
        with pytest.raises(LeakSuspected, match=r"auc_roc is 0.0290 above"):
            check_scores("model", Scores(0.9, 0.5, 0.291), self.PUBLISHED)

    def test_both_alarms_are_errors_for_people(self) -> None:
        assert issubclass(LeakSuspected, IsochronError)
        assert issubclass(ScoreOutOfTolerance, IsochronError)


def drawn(seed: int, rows: int = 3_000) -> pd.DataFrame:
    """Transactions of 50 cards over 21 days: `signal` is higher for frauds by two deviations, `noise` is not."""
    random = np.random.default_rng(seed)
    days, cards = random.integers(0, 21, rows), random.integers(0, 50, rows)
    fraud = (random.random(rows) < 0.02).astype(int)
    drawn = table(*zip(days.tolist(), cards.tolist(), fraud.tolist(), strict=True))
    return drawn.assign(signal=random.normal(2 * fraud, 1), noise=random.normal(0, 1, rows))


class TestFitAndScore:
    @pytest.fixture
    def parts(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return split(drawn(seed=1), BOOK_SPLIT)

    @pytest.mark.parametrize("model", list(PUBLISHED))
    def test_an_input_that_is_the_answer_scores_perfectly(
        self, parts: tuple[pd.DataFrame, pd.DataFrame], model: str
    ) -> None:
        train, test = (part.assign(answer=part["TX_FRAUD"]) for part in parts)
        scores = fit_and_score(model, train, test, ["answer", "noise"])
        assert (scores.auc_roc, scores.average_precision) == (1, pytest.approx(1))
        day = test["TX_DATETIME"].dt.date
        assert scores.card_precision_100 == card_precision_at_k(
            day, test["customer_id"], test["answer"], test["answer"]
        )
        assert scores.card_precision_100 > 0

    @pytest.mark.parametrize("model", list(PUBLISHED))
    def test_a_signal_of_two_deviations_is_found_and_noise_is_not(
        self, parts: tuple[pd.DataFrame, pd.DataFrame], model: str
    ) -> None:
        # Two normal laws two deviations apart: the area is Phi(2 / sqrt(2)) = 0.921, less for a forest of few frauds.
        assert 0.75 < fit_and_score(model, *parts, ["signal"]).auc_roc < 0.98
        assert 0.3 < fit_and_score(model, *parts, ["noise"]).auc_roc < 0.7

    @pytest.mark.parametrize("model", list(PUBLISHED))
    def test_same_rows_give_the_same_figures(self, parts: tuple[pd.DataFrame, pd.DataFrame], model: str) -> None:
        assert fit_and_score(model, *parts, ["signal", "noise"]) == fit_and_score(model, *parts, ["signal", "noise"])

    def test_the_unit_of_an_input_does_not_change_the_regression(
        self, parts: tuple[pd.DataFrame, pd.DataFrame]
    ) -> None:
        in_millions = tuple(part.assign(signal=part["signal"] * 1e6 + 5) for part in parts)
        inputs = ["signal", "noise"]
        assert vars(fit_and_score("logistic_regression", *in_millions, inputs)) == pytest.approx(
            vars(fit_and_score("logistic_regression", *parts, inputs))
        )

    def test_the_given_rows_are_left_as_they_are(self, parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        before = [part.copy(deep=True) for part in parts]
        fit_and_score("logistic_regression", *parts, ["signal", "noise"])
        assert all(part.equals(copy) for part, copy in zip(parts, before, strict=True))

    def test_what_cannot_be_fitted_is_named(self, parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
        train, test = parts
        with pytest.raises(StudyError, match="no model 'forest'; it has: logistic_regression, random_forest"):
            fit_and_score("forest", train, test, ["signal"])
        with pytest.raises(StudyError, match="the model needs the columns amount; there are: TX_DATETIME"):
            fit_and_score("logistic_regression", train, test, ["signal", "amount"])
        holes = train.assign(noise=train["noise"].where(train["noise"] > -2))
        empty = int(holes["noise"].isna().sum())
        assert empty > 0
        with pytest.raises(StudyError, match=rf"inputs with nulls among [\d,]+ rows: noise \({empty}\)"):
            fit_and_score("random_forest", holes, test, ["signal", "noise"])


def test_the_book_has_the_amount_and_14_features_in_its_order() -> None:
    windows = [
        f"{entity}_{what}_{days}DAY_WINDOW"
        for entity, kinds in (("CUSTOMER_ID", ("NB_TX", "AVG_AMOUNT")), ("TERMINAL_ID", ("NB_TX", "RISK")))
        for days in (1, 7, 30)
        for what in kinds
    ]
    assert ("TX_AMOUNT", "TX_DURING_WEEKEND", "TX_DURING_NIGHT", *windows) == BOOK_INPUTS


def over(entity: str, days: int, newest: str) -> str:
    """An SQL window of whole seconds: `days` days that end `newest` before the transaction, the end included."""
    reach = f"INTERVAL '{days}' DAY + {newest} - INTERVAL '1' MICROSECOND"
    return f"OVER (PARTITION BY {entity} ORDER BY TX_DATETIME RANGE BETWEEN {reach} PRECEDING AND {newest} PRECEDING)"


def book_features(file: Path, label_delay: str) -> pd.DataFrame:
    """The book's inputs by plain SQL windows, rows in the order of TRANSACTION_ID."""
    columns = []
    for days in (1, 7, 30):
        customer, terminal = over("CUSTOMER_ID", days, "INTERVAL '0' DAY"), over("TERMINAL_ID", days, label_delay)
        columns += [
            f"count(*) {customer} AS CUSTOMER_ID_NB_TX_{days}DAY_WINDOW",
            f"avg(TX_AMOUNT) {customer} AS CUSTOMER_ID_AVG_AMOUNT_{days}DAY_WINDOW",
            f"count(*) {terminal} AS TERMINAL_ID_NB_TX_{days}DAY_WINDOW",
            f"coalesce(avg(TX_FRAUD) {terminal}, 0) AS TERMINAL_ID_RISK_{days}DAY_WINDOW",
        ]
    query = f"""
        SELECT CUSTOMER_ID AS customer_id, TX_DATETIME, TX_AMOUNT, TX_FRAUD,
               CAST(isodow(TX_DATETIME) >= 6 AS INTEGER) AS TX_DURING_WEEKEND,
               CAST(hour(TX_DATETIME) <= 6 AS INTEGER) AS TX_DURING_NIGHT, {", ".join(columns)}
        FROM read_parquet(?) ORDER BY TRANSACTION_ID
    """
    with duckdb.connect() as connection:
        return connection.execute(query, [str(file)]).df()


@pytest.fixture(scope="module")
def published_file() -> Path:
    folder = os.environ.get("ISOCHRON_DATA")
    if not folder:
        pytest.skip("set ISOCHRON_DATA to the folder that holds fraud/transactions.parquet")
    return Path(folder) / "fraud" / "transactions.parquet"


@pytest.mark.published
class TestThePublishedStudy:
    def test_the_books_features_give_its_sizes_and_its_figures(self, published_file: Path) -> None:
        train, test = split(book_features(published_file, "INTERVAL '7' DAY"), BOOK_SPLIT)
        assert (len(train), train["TX_FRAUD"].sum()) == (67_240, 598)
        assert (len(test), test["TX_FRAUD"].sum()) == (58_264, 385)
        for model, published in PUBLISHED.items():
            check_scores(model, fit_and_score(model, train, test, BOOK_INPUTS), published)

    def test_without_the_label_delay_the_leak_is_called_out(self, published_file: Path) -> None:
        # Labels known at once, but not a transaction's own: the mildest form of the leak.
        train, test = split(book_features(published_file, "INTERVAL '1' MICROSECOND"), BOOK_SPLIT)
        leaking = fit_and_score("logistic_regression", train, test, BOOK_INPUTS)
        assert leaking.average_precision == pytest.approx(0.842, abs=0.005)
        with pytest.raises(LeakSuspected, match=r"average_precision is 0.23.* above .* Look first at the label delay"):
            check_scores("logistic_regression", leaking, PUBLISHED["logistic_regression"])
