"""What can go wrong with a model: its study, its figures. Each error takes facts and says what to do next.

A model artifact that cannot be used is a `feature_store.errors.ModelError`.
"""

from __future__ import annotations

from collections.abc import Mapping

from feature_store.errors import IsochronError


class StudyError(IsochronError):
    """The table given to a study cannot be used: columns or days are missing, or it is asked for an unknown model."""


class MetricUndefined(IsochronError):
    """A figure that has no value on the given rows; never replaced by 0 or 1."""


class LeakSuspected(IsochronError):
    """A model scores better than the published study: a leak until proven otherwise.

    `excess` is, by figure, how far above the published value it is.
    """

    def __init__(self, model: str, excess: Mapping[str, float], comparison: str) -> None:
        self.model, self.excess = model, dict(excess)
        super().__init__(
            f"{model}: {_amounts(excess, 'above')} the published study. A figure too good means that a feature knows "
            "the answer. Look first at the label delay (a fraud is known 7 days after the transaction, not at it), "
            f"then at windows that reach past the transaction, then at known cards left in the test. {comparison}"
        )


class ScoreOutOfTolerance(IsochronError):
    """A model scores worse than the published study. `shortfall` is, by figure, how far below it is."""

    def __init__(self, model: str, shortfall: Mapping[str, float], comparison: str) -> None:
        self.model, self.shortfall = model, dict(shortfall)
        super().__init__(
            f"{model}: {_amounts(shortfall, 'below')} the published study. Compare the features with the published "
            f"ones row by row (windows, the current transaction included, 0 where a window is empty), then the sizes "
            f"of train and test. {comparison}"
        )


def _amounts(by_figure: Mapping[str, float], direction: str) -> str:
    return ", ".join(f"{figure} is {amount:.4f} {direction}" for figure, amount in by_figure.items())
