"""An online answer as Feast's SDK hands it out: as a dict at once, as protobuf for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import (
    BoolList,
    BytesList,
    DoubleList,
    FloatList,
    Int32List,
    Int64List,
    StringList,
)
from feast.type_map import NULL_TIMESTAMP_INT_VALUE, python_values_to_proto_values
from google.protobuf.timestamp_pb2 import Timestamp

from feature_store.definitions.types import ValueType
from feature_store.retrieval.online import OnlineFeatures, Place
from feature_store.stores.online.blocks import Block
from feature_store.stores.online.status import Status
from feature_store.timestamps import BEGINNING, SECOND

_Vector = GetOnlineFeaturesResponse.FeatureVector

#: Feast's numbers: to look one up in its enum takes longer than to write it.
_STATUSES = {status: FieldStatus.Value(status) for status in Status}
_PRESENT, _NULL = _STATUSES[Status.PRESENT], _STATUSES[Status.NULL_VALUE]

#: By type the name in Feast's value, its list message, and what a list holds for a null: protobuf has none there.
_NAMES: dict[ValueType, tuple[str, Callable[..., Any], Any]] = {
    ValueType.BOOL: ("bool", BoolList, False),
    ValueType.INT32: ("int32", Int32List, 0),
    ValueType.INT64: ("int64", Int64List, 0),
    ValueType.FLOAT32: ("float", FloatList, 0.0),
    ValueType.FLOAT64: ("double", DoubleList, 0.0),
    ValueType.STRING: ("string", StringList, ""),
    ValueType.BYTES: ("bytes", BytesList, b""),
    ValueType.TIMESTAMP: ("unix_timestamp", Int64List, int(NULL_TIMESTAMP_INT_VALUE)),
}
#: How values are sent that lie otherwise in the store.
_SENT: dict[ValueType, Callable[[Any], Any]] = {ValueType.BOOL: bool, ValueType.TIMESTAMP: lambda time: time // SECOND}


def _sender(value_type: ValueType) -> Callable[[Any, Sequence[Any]], None]:
    """What adds stored values (times are microseconds, None is null) of a type to a vector of Feast's."""
    name, message, missing = _NAMES[value_type.element]
    sent = _SENT.get(value_type.element)
    scalar, listed = f"{name}_val", f"{name}_list_val"

    def add_scalars(vector: Any, values: Sequence[Any]) -> None:
        add = vector.values.add
        for value in values:
            if value is None:
                add()
            else:
                setattr(add(), scalar, value if sent is None else sent(value))

    def add_lists(vector: Any, values: Sequence[Any]) -> None:
        add = vector.values.add
        for value in values:
            if value is None:
                add()
            else:
                add(**{listed: message(val=[missing if v is None else sent(v) if sent else v for v in value])})

    return add_lists if value_type.is_list else add_scalars


_ADD = {value_type: _sender(value_type) for value_type in ValueType}


class IsochronOnlineResponse(OnlineResponse):
    """An answer that builds Feast's protobuf only for those who ask for it.

    `entities` are the entity columns to show, in their order: those that the answer has, and others that were given.
    `versions` are the views' names and versions for the metadata.
    """

    def __init__(
        self, answer: OnlineFeatures, entities: Mapping[str, Sequence[Any]], versions: Mapping[str, int] | None = None
    ) -> None:
        self._answer, self._entities, self._versions = answer, entities, versions or {}
        self._proto: GetOnlineFeaturesResponse | None = None

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, Any]:
        """Entity columns, then the features in the request's order; with timestamps, `<name>__ts` in seconds beside
        each.
        """
        values = {**self._entities, **self._answer.to_dict()}
        if not include_event_timestamps:
            return values
        times = _Times(self._answer)
        response: dict[str, Any] = {}
        for name, column in values.items():
            response[name] = column
            response[name + TIMESTAMP_POSTFIX] = times.seconds(name)
        return response

    @property
    def proto(self) -> GetOnlineFeaturesResponse:
        """The same as Feast's protobuf message, with statuses."""
        if self._proto is None:
            builder = _Builder(self._answer)
            for name, given in self._entities.items():
                if name not in self._answer.places:
                    builder.add_entity(name, given)
            for name, place in self._answer.places.items():
                builder.add_feature(name, place)
            for name, version in self._versions.items():
                builder.response.metadata.feature_view_metadata.add(name=name, version=version)
            self._proto = builder.response
        return self._proto


class _Builder:
    """Feast's message, filled column by column."""

    def __init__(self, answer: OnlineFeatures) -> None:
        self.response = GetOnlineFeaturesResponse()
        self._answer, self._times = answer, _Times(answer)
        self._lists: dict[int, list[list[Any]]] = {}

    def add_entity(self, name: str, given: Sequence[Any]) -> None:
        """An entity column, as it was read; one that nothing was read by, as it was given."""
        vector = self._vector(name)
        if (key := self._answer.key_columns.get(name)) is not None:
            _ADD[key.type](vector, key.values)
        else:
            vector.values.extend(python_values_to_proto_values(list(given)))
        self._add_rest(vector, name, [_PRESENT] * len(given))

    def add_feature(self, name: str, place: Place) -> None:
        if place.part is None:
            assert place.key is not None
            self.add_entity(name, place.key.values)
            return
        block, whole, vector = place.part.block, place.part.statuses, self._vector(name)
        values = self._values_of(block)[place.feature]
        _ADD[block.types[place.feature]](vector, values)
        statuses = [_NULL if value is None else _PRESENT for value in values]
        if whole is not None:
            statuses = [_STATUSES[row] if row else one for row, one in zip(whole, statuses, strict=True)]
        self._add_rest(vector, name, statuses)

    def _values_of(self, block: Block) -> list[list[Any]]:
        if id(block) not in self._lists:
            self._lists[id(block)] = block.lists()
        return self._lists[id(block)]

    def _vector(self, name: str) -> Any:
        self.response.metadata.feature_names.val.append(name)
        return self.response.results.add()

    def _add_rest(self, vector: Any, name: str, statuses: Sequence[int]) -> None:
        vector.statuses.extend(statuses)
        vector.MergeFromString(self._times.serialized(name))


class _Times:
    """The event times of an answer's columns, made once for all columns that share them."""

    def __init__(self, answer: OnlineFeatures) -> None:
        self._answer = answer
        self._rows = len(answer.as_of)
        self._seconds: dict[int, list[int]] = {}
        self._serialized: dict[int, bytes] = {}

    def seconds(self, name: str) -> list[int]:
        """Whole seconds, 0 where there is no time."""
        times = self._of(name)
        if id(times) not in self._seconds:
            self._seconds[id(times)] = [seconds for seconds, _ in self._split(times)]
        return list(self._seconds[id(times)])

    def serialized(self, name: str) -> bytes:
        """A vector of timestamps alone, as bytes: reading them costs less than making each again for every column."""
        times = self._of(name)
        if id(times) not in self._serialized:
            stamps = [Timestamp(seconds=seconds, nanos=nanos) for seconds, nanos in self._split(times)]
            self._serialized[id(times)] = _Vector(event_timestamps=stamps).SerializeToString()
        return self._serialized[id(times)]

    def _of(self, name: str) -> np.ndarray | None:
        place = self._answer.places.get(name)
        return place.part.event_times if place is not None and place.part is not None else None

    def _split(self, times: np.ndarray | None) -> list[tuple[int, int]]:
        """Seconds and nanoseconds of each time, as protobuf has them; zeros where there is none."""
        if times is None:
            return [(0, 0)] * self._rows
        return [(0, 0) if t == BEGINNING else (t // SECOND, t % SECOND * 1_000) for t in times.tolist()]
