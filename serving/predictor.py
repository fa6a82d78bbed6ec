"""The fraud predictor: from a transaction to a decision, in the steps setup, decode, read, predict, encode."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.clock import Clock
from feature_store.definitions.types import ValueType
from feature_store.errors import ModelError, RequestError
from feature_store.layer import FeatureLayer
from feature_store.retrieval import on_demand
from feature_store.retrieval.online import OnlineFeatures, Prepared
from feature_store.timestamps import MINUTE, duration_text, micros
from models.booster import FraudModel
from serving.decision_log import Decision
from serving.schemas import ScoreRequest

SERVICE = "fraud_v1"

#: How far ahead of the server's clock a transaction may be dated. Clocks of other machines are seconds off; beyond
#: that, events that happen before its time are still missing from the features.
MAX_AHEAD = MINUTE

_ONE_FLOAT = (ValueType.BOOL, ValueType.INT32, ValueType.INT64, ValueType.FLOAT32, ValueType.FLOAT64)


@dataclass(frozen=True)
class Asked:
    """A transaction as the feature layer reads it: one entity row, and the time (microseconds) to read it at."""

    entities: dict[str, Sequence[Any]]
    as_of: int


@dataclass(frozen=True)
class Predictor:
    """Scores transactions with one model on one feature service. Made by `setup`.

    `new_id` names decisions, `code_commit` is written into them; `max_ahead` is in microseconds; `views_by_key` holds
    the views keyed by each key column, by the names that the service gives them.
    """

    handle: Prepared
    model: FraudModel
    clock: Clock
    new_id: Callable[[], str]
    code_commit: str
    max_ahead: int
    views_by_key: dict[str, tuple[str, ...]]

    @classmethod
    def setup(
        cls,
        layer: FeatureLayer,
        model: FraudModel,
        clock: Clock,
        new_id: Callable[[], str],
        code_commit: str,
        max_ahead: int = MAX_AHEAD,
    ) -> Predictor:
        """A predictor with everything resolved and checked; the online store need not be filled yet.

        Raises ModelError when the model was trained on other definitions or features than the service has, or the
        service asks for what a transaction does not carry; UnknownName when there is no such service; OnDemandError
        when a function of it cannot be loaded.
        """
        handle = layer.prepare(SERVICE)
        _check_model(model, handle)
        _check_inputs(handle)
        for view in handle.request.on_demand:
            on_demand.load(view)
        return cls(handle, model, clock, new_id, code_commit, max_ahead, _views_by_key(handle))

    def score(self, request: ScoreRequest) -> Decision:
        """The decision on a transaction, with all that it was made from; not yet logged.

        Raises RequestError for a time in the future, StoreNotReady, and NotExactOnline for a time that only history
        could answer.
        """
        asked = self.decode(request)
        features = self.read(asked)
        return self.encode(request, asked, features, self.predict(features))

    def decode(self, request: ScoreRequest) -> Asked:
        """The entity row of a transaction, as of its own time: the server's clock only bounds that."""
        as_of = micros(request.event_time)
        if as_of > self.clock.now() + self.max_ahead:
            raise RequestError(
                "event_time", f"is more than {duration_text(self.max_ahead)} ahead of the server's clock; send it then"
            )
        return Asked(_entities(request.customer_id, request.terminal_id, request.amount, request.event_time), as_of)

    def read(self, asked: Asked) -> OnlineFeatures:
        """The service's features, one row, from the online store."""
        return self.handle.read(asked.entities, asked.as_of)

    def predict(self, features: OnlineFeatures) -> float:
        """The probability of fraud that the model gives to the one row."""
        return float(self.model.predict(features.to_numpy(self.model.feature_names))[0])

    def encode(self, request: ScoreRequest, asked: Asked, features: OnlineFeatures, score: float) -> Decision:
        """The decision with every feature of the service, whether or not the model uses it."""
        unknown = {view: rows[0] for view, rows in features.unknown.items()}
        return Decision(
            decision_id=self.new_id(),
            request=request.model_dump(),
            service=SERVICE,
            as_of=asked.as_of,
            features={name: column[0].as_py() for name, column in features.columns.items()},
            statuses={name: statuses[0].value for name, statuses in features.statuses.items()},
            unknown=unknown,
            positions={view: positions[0] for view, positions in features.positions.items()},
            cuts={view: (generation.number, generation.cut) for view, generation in features.generations.items()},
            fingerprint=self.handle.fingerprint,
            model_version=self.model.version,
            score=score,
            warnings=tuple(_warning(key) for key in self.unknown_keys(unknown)),
            logged_at=self.clock.now(),
            code_commit=self.code_commit,
        )

    def unknown_keys(self, unknown: Mapping[str, bool]) -> list[str]:
        """The key columns whose entity no view keyed by them has ever seen; `unknown` by view, as in a Decision."""
        return [key for key, views in self.views_by_key.items() if all(unknown[view] for view in views)]


def _entities(customer: int, terminal: int, amount: float, time: dt.datetime) -> dict[str, Sequence[Any]]:
    return {"customer_id": [customer], "terminal_id": [terminal], "TX_AMOUNT": [amount], "TX_DATETIME": [time]}


def _warning(key: str) -> str:
    return f"{key} is unknown: no view holds anything of it, so it was scored on empty windows"


def _check_model(model: FraudModel, handle: Prepared) -> None:
    if model.fingerprint != handle.fingerprint:
        raise ModelError(
            f"model {model.version} was trained on features with fingerprint {model.fingerprint[:16]}, but service "
            f"'{SERVICE}' now has {handle.fingerprint[:16]}. Train it again on the applied definitions."
        )
    types = {
        name: handle.request.type_of(ref) for name, ref in zip(handle.feature_names, handle.request.refs, strict=True)
    }
    if missing := [name for name in model.feature_names if name not in types]:
        raise ModelError(f"model {model.version} needs features that '{SERVICE}' lacks: {', '.join(missing)}.")
    if other := [name for name in model.feature_names if types[name] not in _ONE_FLOAT]:
        raise ModelError(f"model {model.version} needs numbers, but these are none: {', '.join(other)}.")


def _check_inputs(handle: Prepared) -> None:
    carried = set(_entities(0, 0, 0.0, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)))
    if missing := sorted({*handle.keys, *handle.request_fields} - carried):
        raise ModelError(f"service '{SERVICE}' asks for {', '.join(missing)}, which no scoring request carries.")


def _views_by_key(handle: Prepared) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for view, refs in handle.request.by_view():
        for key in view.keys:
            found.setdefault(refs[0].key_column(key.name), []).append(refs[0].shown_as)
    return {key: tuple(views) for key, views in found.items()}
