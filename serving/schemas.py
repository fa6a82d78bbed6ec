"""What clients send and get: strict models, in which a value of another type, shape or range is refused."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from feature_store.errors import RequestError
from feature_store.timestamps import moment, parse_time
from serving.errors import NotJson

#: Names in a request are repeated in messages: none is longer than this.
_LONGEST_NAME = 200


def _time(value: Any) -> dt.datetime:
    """An aware UTC datetime of ISO 8601 text; the text itself stays out of the message."""
    problem = PydanticCustomError("time", "Input should be ISO 8601 text such as 2018-08-01T12:00:00Z")
    if not isinstance(value, str):
        raise problem
    try:
        return moment(parse_time(value))
    except (ValueError, OverflowError) as cause:
        raise problem from cause


Id = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
Time = Annotated[dt.datetime, BeforeValidator(_time), WithJsonSchema({"type": "string", "format": "date-time"})]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ScoreRequest(_Strict):
    """A card transaction to be scored.

    `amount` in currency units, finite and not negative. `event_time` is ISO 8601 text, UTC where it has no offset:
    the features are read as of it. Ids are 64-bit integers; `transaction_id` comes back as it was sent.
    """

    transaction_id: Id | None = None
    customer_id: Id
    terminal_id: Id
    amount: float = Field(ge=0)
    event_time: Time


class ScoreResponse(_Strict):
    """A decision. `score` is the probability of fraud; `as_of` the time, ISO 8601, that its features were read at.

    `decision_id` names the decision in the log, `fingerprint` the features' definitions; `warnings` are texts.
    """

    transaction_id: int | None
    score: float = Field(ge=0, le=1)
    decision_id: str
    as_of: str
    model_version: str
    fingerprint: str
    warnings: list[str]


class PushRequest(_Strict):
    """Raw events of a push source, in the shape that Feast's server takes.

    `df` holds the source's columns as lists; a time is ISO 8601 text. `offset` is the log position of the first row in
    `partition`: rows that were applied before change nothing, a gap is refused. Without one the rows follow the last.
    Feast's `allow_registry_cache` and `transform_on_write` are taken for its clients and mean nothing here: the
    definitions are always the compiled ones, and no source is transformed.
    """

    push_source_name: Name
    df: dict[Name, list[Any]]
    to: str = "online"
    partition: int = Field(default=0, ge=0, le=2**32 - 1)
    offset: int | None = Field(default=None, ge=0, le=2**63 - 1)
    allow_registry_cache: bool = True
    transform_on_write: bool = True


class PushedView(_Strict):
    """What a push did to a windowed view: rows `applied`, rows `repeated` (applied before), the `next` offset, and rows
    of `erased` entities, left out.
    """

    applied: int
    repeated: int
    next: int
    erased: int


class WrittenView(_Strict):
    """Rows given to a plain view: how many entities they were of. Of each the newer event time stays."""

    entities: int


class PushResponse(_Strict):
    """What a push did, by view."""

    views: dict[str, PushedView | WrittenView]


class WriteRequest(_Strict):
    """Rows of a plain view, in the shape that Feast's remote client sends.

    `df` holds join keys, features and times as lists; a time is ISO 8601 text, or whole seconds since the epoch; bytes
    are base64 text. The time columns have the names in the view's source, or `event_timestamp` and `created`. The other
    two fields mean nothing here, as in a push.
    """

    feature_view_name: Name
    df: dict[Name, list[Any]]
    allow_registry_cache: bool = True
    transform_on_write: bool = True


class WriteResponse(_Strict):
    """What was written to a view: rows of so many `entities`."""

    view: str
    entities: int


Model = TypeVar("Model", bound=BaseModel)


def decode(model: type[Model], body: bytes) -> Model:
    """A request from the bytes of its body.

    Raises NotJson, or RequestError for the first field that is missing, unknown, or of the wrong type or range (its
    text names the others too).
    """
    try:
        return model.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as cause:
        raise NotJson(str(cause)) from cause
    except ValidationError as cause:
        # Without the input: it may be what must not be repeated, or what no JSON encoder takes.
        raise _refusal(cause.errors(include_input=False, include_context=False, include_url=False)) from cause


def _refusal(found: list[ErrorDetails]) -> RequestError:
    (field, problem), *others = [(_field(error), _problem(error)) for error in found]
    also = "".join(f"; '{name}': {text}" for name, text in others[:10])
    more = f"; and {len(others) - 10} more" if len(others) > 10 else ""
    return RequestError(field, f"is refused: {problem}{also}{more}")


def _field(error: ErrorDetails) -> str:
    return ".".join(str(part)[:_LONGEST_NAME] for part in error["loc"]) or "body"


def _problem(error: ErrorDetails) -> str:
    return error["msg"][:1].lower() + error["msg"][1:]
