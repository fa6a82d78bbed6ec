"""The error map: what an error is to a client, as an HTTP status and a JSON body.

A body is {"error": type, "message": text for a person, "retryable": bool}, and the facts a program can act on: the
`field` of a request, the `view`, the `expected` offset. A value that a client sent is never sent back with it.
"""

from __future__ import annotations

from typing import Any

from feature_store.errors import (
    BootstrapSuperseded,
    DefinitionError,
    IsochronError,
    ModelError,
    NotExactOnline,
    PositionGap,
    RequestError,
    StoreDenied,
    StoreError,
    StoreNotReady,
    UnknownName,
)
from feature_store.retrieval.on_demand import OnDemandError
from serving.decision_log import DecisionNotLogged


class NotJson(IsochronError):
    """A request's body is no JSON text. (JSON has no NaN and no Infinity.)"""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the body is not JSON: {problem}.")


class WrongMediaType(IsochronError):
    """A request's body is not declared as JSON, which a page of another site cannot do without being asked first."""

    def __init__(self) -> None:
        super().__init__("the body must be JSON; send the header content-type: application/json.")


class BodyTooLarge(IsochronError):
    """A request's body is longer than a route takes. `most` in bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        super().__init__(f"the body is longer than {most:,} bytes; send less at once.")


class FunctionFailed(IsochronError):
    """An on-demand view's function raised an error on the values that a request carries, or gave what is no value of
    its features' types.
    """

    def __init__(self, error: OnDemandError) -> None:
        self.view = error.view
        super().__init__(f"{error} If the request's values are right, the function is to be mended.")


#: An error's text goes to the client up to this many characters: it may repeat what a request named.
_LONGEST_MESSAGE = 4_000

#: An error's status is that of its own type or the nearest base; an error of ours that is not here is our fault.
STATUS: dict[type, int] = {
    NotJson: 400,
    UnknownName: 404,
    NotExactOnline: 409,
    PositionGap: 409,
    BootstrapSuperseded: 409,
    BodyTooLarge: 413,
    WrongMediaType: 415,
    RequestError: 422,
    DefinitionError: 422,
    FunctionFailed: 422,
    StoreNotReady: 503,
    StoreError: 503,
    StoreDenied: 500,
    ModelError: 503,
    DecisionNotLogged: 503,
    IsochronError: 500,
}

#: Which attributes of an error its body carries beside the text.
_FACTS: dict[type, tuple[str, ...]] = {
    RequestError: ("field",),
    UnknownName: ("kind",),
    StoreNotReady: ("view",),
    NotExactOnline: ("view",),
    PositionGap: ("view", "partition", "expected", "offered"),
    OnDemandError: ("view",),
    FunctionFailed: ("view",),
    DefinitionError: ("view",),
    BootstrapSuperseded: ("view",),
}


def status_of(error: IsochronError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def body_of(error: IsochronError) -> dict[str, Any]:
    """The JSON body of an error."""
    facts = next((_FACTS[base] for base in type(error).__mro__ if base in _FACTS), ())
    return {
        "error": type(error).__name__,
        **{name: getattr(error, name) for name in facts},
        "message": str(error)[:_LONGEST_MESSAGE],
        "retryable": error.retryable,
    }
