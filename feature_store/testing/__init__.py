"""What a team's own tests of features need: the contract's equality of two tables of features.

Logs of awkward events and views over them are in `feature_store.testing.event_logs` and `feature_store.testing.views`
(both need Hypothesis), a clock moved by hand in `feature_store.clock`.
"""

from __future__ import annotations

from feature_store.testing.comparison import Mismatch, assert_features_equal, mismatches

__all__ = ["Mismatch", "assert_features_equal", "mismatches"]
