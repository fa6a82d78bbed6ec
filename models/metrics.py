"""How well scores find frauds: over transactions, and over the cards that a team can check in a day."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from models.errors import MetricUndefined


def auc_roc(score: npt.ArrayLike, label: npt.ArrayLike) -> float:
    """The probability that a random fraud scores above a random genuine transaction, ties counting half.

    `score` is float[n], higher is more suspicious; `label` is 0 or 1, [n]. Raises MetricUndefined when the lengths
    differ, a value is not a number, a label is neither 0 nor 1, or only one of the two occurs.
    """
    scores, labels = _scored(score, label)
    if labels.all() or not labels.any():
        raise MetricUndefined(
            f"AUC ROC needs frauds and genuine transactions; all {len(labels):,} labels are the same."
        )
    return float(roc_auc_score(labels, scores))


def average_precision(score: npt.ArrayLike, label: npt.ArrayLike) -> float:
    """The precision at each fraud in the order of falling score, averaged over the frauds (no interpolation).

    Arguments and errors are those of `auc_roc`, but genuine transactions may be absent.
    """
    scores, labels = _scored(score, label)
    if not labels.any():
        raise MetricUndefined(f"average precision needs a fraud; there is none among {len(labels):,} labels.")
    return float(average_precision_score(labels, scores))


def card_precision_at_k(
    day: npt.ArrayLike, customer: npt.ArrayLike, score: npt.ArrayLike, label: npt.ArrayLike, k: int = 100
) -> float:
    """The share of the k most suspicious cards of a day that are compromised, averaged over the days; in [0, 1].

    Arrays are [n], a row per transaction; `day` is anything that sorts. A card's score on a day is its highest, and
    it is compromised that day if one of its transactions is. A compromised card among the k is found: it is blocked,
    and leaves the later days. As in the book, a day with fewer than k cards is still divided by k. Equal scores are
    taken in the order of `customer`, so that the order of rows does not matter.

    Raises MetricUndefined as `auc_roc` does (one kind of label is fine), when there are no rows, or when k < 1.
    """
    scores, labels = _scored(score, label)
    days, customers = np.asarray(day), np.asarray(customer)
    if k < 1 or not len(labels) == len(days) == len(customers) or not len(labels):
        raise MetricUndefined(
            f"card precision needs k of 1 or more and arrays of one length above 0; got k={k}, {len(days):,} days, "
            f"{len(customers):,} customers, {len(labels):,} labels."
        )
    cards = _cards_by_day(days, customers, scores, labels)
    blocked: set[object] = set()
    shares = []
    for _, today in cards.groupby("day", sort=True):
        found = _found(today[~today["customer"].isin(blocked)], k)
        blocked.update(found)
        shares.append(len(found) / k)
    return float(np.mean(shares))


def _cards_by_day(
    day: npt.NDArray, customer: npt.NDArray, score: npt.NDArray[np.float64], label: npt.NDArray[np.bool_]
) -> pd.DataFrame:
    """One row per card and day, by customer within a day: its highest score, and whether it is compromised."""
    rows = pd.DataFrame({"day": day, "customer": customer, "score": score, "label": label})
    return rows.groupby(["day", "customer"], sort=True, as_index=False).max()


def _found(cards: pd.DataFrame, k: int) -> list[object]:
    """The compromised ones among the k cards with the highest scores of one day."""
    suspicious = cards.sort_values("score", ascending=False, kind="stable").head(k)
    return list(suspicious.loc[suspicious["label"], "customer"])


def _scored(score: npt.ArrayLike, label: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Scores as float64[n] and labels as bool[n], or MetricUndefined."""
    scores, labels = np.asarray(score, dtype=np.float64), np.asarray(label)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise MetricUndefined(f"each transaction needs one score and one label; got {scores.shape} and {labels.shape}.")
    if np.isnan(scores).any():
        raise MetricUndefined(f"{np.isnan(scores).sum():,} of {len(scores):,} scores are not numbers.")
    if not np.isin(labels, (0, 1)).all():
        raise MetricUndefined(f"labels are 0 or 1; {(~np.isin(labels, (0, 1))).sum():,} of {len(labels):,} are not.")
    return scores, labels.astype(np.bool_)
