"""Answers of Feast's SDK and of its server, cell by cell, and when two values are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feast import FeatureStore
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.type_map import NULL_TIMESTAMP_INT_VALUE, feast_value_type_to_python_type

from feature_store.timestamps import SECOND


@dataclass(frozen=True)
class Cell:
    """One value of an answer: what `to_dict` says, what the message says, its status, its event time (0: none)."""

    value: Any
    sent: Any
    status: str
    time: int


Answer = dict[str, list[Cell]]


@dataclass(frozen=True)
class Ask:
    """One request: a service's name or references, and the entity rows as columns."""

    features: str | list[str]
    entities: Mapping[str, Sequence[Any]]
    full_names: bool

    @property
    def rows(self) -> int:
        return len(next(iter(self.entities.values())))

    def body(self) -> dict[str, Any]:
        """The same for Feast's server."""
        wanted = {"feature_service" if isinstance(self.features, str) else "features": self.features}
        return {**wanted, "entities": dict(self.entities), "full_feature_names": self.full_names}

    def features_of(self, store: FeatureStore) -> Any:
        """What the SDK takes."""
        return store.get_feature_service(self.features) if isinstance(self.features, str) else self.features

    def response(self, store: FeatureStore) -> OnlineResponse:
        return store.get_online_features(self.features_of(store), dict(self.entities), self.full_names)


def answer_of(response: OnlineResponse) -> Answer:
    """Every cell of a response, by column."""
    values, proto = response.to_dict(include_event_timestamps=True), response.proto
    names = list(proto.metadata.feature_names.val)
    assert list(values) == [name for n in names for name in (n, f"{n}__ts")]
    answer: Answer = {}
    for name, vector in zip(names, proto.results, strict=True):
        times = [stamp.seconds * SECOND + stamp.nanos // 1_000 for stamp in vector.event_timestamps]
        assert values[f"{name}__ts"] == [time // SECOND for time in times]
        sent = [feast_value_type_to_python_type(value) for value in vector.values]
        statuses = [FieldStatus.Name(status) for status in vector.statuses]
        columns = zip(values[name], sent, statuses, times, strict=True)
        answer[name] = [Cell(*cell) for cell in columns]
    return answer


def json_answer(text: str) -> dict[str, list[tuple[Any, str, str]]]:
    """Values, statuses and times of a server's answer, by column; what Feast writes for a null time is null."""
    content = json.loads(text)
    return {
        name: [
            (None if type(value) is int and value == NULL_TIMESTAMP_INT_VALUE else value, status, time)
            for value, status, time in zip(
                result["values"], result["statuses"], result["event_timestamps"], strict=True
            )
        ]
        for name, result in zip(content["metadata"]["feature_names"], content["results"], strict=True)
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values are of one type and equal; NaN is NaN, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)
