"""Requests for features: Feast's JSON body, checked, and what of it a read needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from feature_store.definitions.types import ValueType
from feature_store.errors import RequestError
from feature_store.retrieval.online import Prepared
from feature_store.timestamps import MINUTE, duration_text, parse_time
from serving.errors import NotJson
from serving.json_columns import bytes_of

Scalar = bool | int | float | str | None
#: A value of an entity column: a join key, or a request-time value of an on-demand view.
Value = Scalar | list[Scalar]
Name = Annotated[str, msgspec.Meta(max_length=500)]


class FeaturesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What Feast's server takes, and `as_of`.

    `entities` holds join keys and request-time values as columns; those that the features do not need are ignored.
    `feature_service` names a service, or `features` lists `view:feature` references; a service goes before a list.
    `as_of`, ours, is the time to read at, ISO 8601 text (UTC where it has no offset): one for all rows, or a list of
    one a row; now where it is absent.
    """

    entities: dict[Name, list[Value]]
    feature_service: Name | None = None
    # Not read with the rest (see `references`): a server is asked for the same ones again and again.
    features: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"[]"))
    full_feature_names: bool = False
    include_feature_view_version_metadata: bool = False
    as_of: Annotated[str, msgspec.Meta(max_length=100)] | list[str] | None = None

    @property
    def asked(self) -> str | bytes:
        """The service's name, or the list of references as JSON."""
        return self.feature_service or bytes(self.features)

    @property
    def rows(self) -> int:
        """How many entity rows the longest column has."""
        return max(map(len, self.entities.values()), default=0)


@dataclass(frozen=True)
class Limits:
    """What a request may ask at most: bytes of its `body`, `entities` in one read, and how far (microseconds) `ahead`
    of the server's clock a time to read at may lie.
    """

    body: int = 16 * 1024 * 1024
    entities: int = 10_000
    ahead: int = MINUTE


_decoder = msgspec.json.Decoder(FeaturesRequest)
_references = msgspec.json.Decoder(list[Name])

_PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`")
_FIELDS = ", ".join(FeaturesRequest.__struct_fields__)


def decode(body: bytes, limits: Limits) -> FeaturesRequest:
    """A request from the bytes of its body.

    Raises NotJson; RequestError for a field that is missing, unknown or of the wrong type, and for a request of more
    rows than the limit.
    """
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as cause:
        raise _refusal(str(cause)) from cause
    except (msgspec.DecodeError, UnicodeDecodeError) as cause:
        raise NotJson(str(cause).rstrip(".")) from cause
    except RecursionError as cause:
        raise NotJson("it is nested too deep") from cause
    if request.rows > limits.entities:
        raise RequestError("entities", f"has {request.rows:,} rows; one request may ask for {limits.entities:,}")
    return request


def references(features: bytes) -> list[str]:
    """The references in a request's list. Raises RequestError where it is none, or empty."""
    try:
        found = _references.decode(features)
    except msgspec.ValidationError as cause:
        problem = _PLACE.sub("", str(cause))
        raise RequestError("features", f"is refused: {problem[:1].lower()}{problem[1:]}") from cause
    if not found:
        raise RequestError("features", "is empty; name a feature_service, or features as view:feature")
    return found


def _refusal(problem: str) -> RequestError:
    """msgspec's message, which never repeats a value, as an error that names the field."""
    if found := _UNKNOWN.match(problem):
        return RequestError(found[1][:200], f"is no field of a request; there are: {_FIELDS}")
    if found := _MISSING.match(problem):
        return RequestError(found[1], "is missing")
    place = _PLACE.search(problem)
    path = place[1] if place else ""
    text = problem[: place.start()] if place else problem
    return RequestError(re.split(r"[.\[]", path)[0] or "body", f"is refused: {text[:1].lower()}{text[1:]}")


def times_of(request: FeaturesRequest, now: int, limits: Limits) -> int | list[int]:
    """The time to read at in microseconds, or one a row. Raises RequestError for what is no time, or in the future."""
    given = request.as_of
    if given is None:
        return now
    times = [_time(given)] if isinstance(given, str) else [_time(text) for text in given]
    if any(time > now + limits.ahead for time in times):
        raise RequestError("as_of", f"is more than {duration_text(limits.ahead)} ahead of the server's clock")
    return times[0] if isinstance(given, str) else times


def _time(text: str) -> int:
    try:
        return parse_time(text)
    except (ValueError, OverflowError) as cause:
        raise RequestError("as_of", "is no time; write it as ISO 8601 text such as 2018-08-01T12:00:00Z") from cause


def bytes_columns(prepared: Prepared) -> tuple[str, ...]:
    """The entity columns of a request that are bytes: JSON carries them as base64 text."""
    types = {**prepared.keys, **prepared.request_fields}
    return tuple(name for name, value_type in types.items() if value_type.element is ValueType.BYTES)


def with_bytes(entities: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """Entity columns with those that are bytes read as such. Raises RequestError."""
    read = {name: _bytes(name, entities[name]) for name in names if name in entities}
    return {**entities, **read}


def _bytes(name: str, values: Sequence[Any]) -> list[Any]:
    return [
        [bytes_of(name, row, x) for x in value] if isinstance(value, list) else bytes_of(name, row, value)
        for row, value in enumerate(values)
    ]
