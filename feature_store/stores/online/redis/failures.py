"""Why a request to Redis has no answer: which reasons may go away by themselves, and what each is as an error of ours.

No text of these holds a secret: they say what a socket or Redis said, and neither repeats passwords.
"""

from __future__ import annotations

import os
import re
import ssl

from feature_store.errors import StoreDenied, StoreError, StoreFull, StoreUnavailable


class Failure(Exception):
    """A request has no answer that it can use, and trying again does not help. Its text is for a person."""


class Untrusted(Failure):
    """The server is not who it should be, or says so of us: the TLS handshake failed."""


class Refused(Failure):
    """Redis answered with an error; `code` is its first word."""

    def __init__(self, text: str) -> None:
        self.code = _code(text)
        super().__init__(text)


class Passing(Failure):
    """What may be gone when the same is tried again."""


class Unreached(Passing):
    """There is no connection: nothing was sent."""


class Crowded(Unreached):
    """All connections that there may be are in use."""


class Lost(Passing):
    """The connection ended before the answer came: what was sent may have been done or not."""


class Overdue(Passing):
    """The time is used up: what was sent may have been done, may still be done, or not."""


class NotNow(Passing):
    """Redis answered that it does not do it now; nothing was done. `code` is the first word of what it said."""

    def __init__(self, text: str) -> None:
        self.code = _code(text)
        super().__init__(text)


class Redo(NotNow):
    """Redis answered that it needs to be asked otherwise: another node (MOVED; ASK while keys are on their way), or
    with the script sent ahead (NOSCRIPT).
    """


#: Answers of a server that starts, was demoted, lost its replicas or is busy, and of a Cluster that changes.
_NOT_NOW = {
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "NOREPLICAS",
    "BUSY",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "IDONTKNOW",
}
_REDO = {"MOVED", "ASK", "NOSCRIPT"}
#: Those after which another node may have taken the place of the one that answered so.
_DOUBTFUL = {"LOADING", "DEMOTED", "READONLY", "MASTERDOWN", "CLUSTERDOWN"}
_TOO_MANY = "ERR max number of clients"
_DENIED = {"NOAUTH", "WRONGPASS", "NOPERM"}
_DENIED_TEXTS = (
    "ERR AUTH ",
    "ERR invalid password",
    "ERR Client sent AUTH",
    "ERR The user executing the script can't",
)
#: Before Redis 7 an error inside a script came as one of the script, with its own code behind a hyphen.
_IN_SCRIPT = re.compile(r"^ERR Error running script .*?-(OOM|READONLY|NOREPLICAS|NOPERM|MISCONF)\b")


def failure_of(text: str) -> Refused | NotNow:
    """The failure that an error answer of Redis is."""
    code = _code(text)
    if code in _REDO:
        return Redo(text)
    return NotNow(text) if code in _NOT_NOW or text.startswith(_TOO_MANY) else Refused(text)


def said(error: OSError) -> str:
    """What an error of a socket says, the same however it was waited for."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return (error.strerror or str(error) or type(error).__name__).rstrip(".")


def worse(one: Failure | None, other: Failure | None) -> Failure | None:
    """Of two failures the one that decides what is done: what does not pass, else what takes time to pass."""
    return one if other is None or (one is not None and _weight(one) >= _weight(other)) else other


def _weight(failure: Failure) -> int:
    return 0 if isinstance(failure, Redo) else 1 if isinstance(failure, Passing) else 2


def casts_doubt(failure: Failure) -> bool:
    """Whether another node may have taken the place of the one that failed so."""
    if isinstance(failure, NotNow):
        return failure.code in _DOUBTFUL
    return isinstance(failure, Passing) and not isinstance(failure, Crowded)


def refusal(where: str, failure: Failure, timeout: float) -> StoreError:
    """The error of ours that says what a failure means; `timeout` is how many seconds it was tried."""
    if isinstance(failure, Overdue):
        return StoreUnavailable(where, f"did not answer within {timeout:g} s", "see whether Redis is up and not paused")
    if isinstance(failure, NotNow):
        return _unavailable(where, failure)
    if isinstance(failure, Passing):
        return StoreUnavailable(where, f"cannot be reached ({_text(failure)})", "see whether Redis is up")
    if isinstance(failure, Untrusted):
        next_step = "see the ssl options in connection_string, and what the server speaks"
        return StoreUnavailable(where, f"cannot be spoken to securely ({_text(failure)})", next_step)
    if isinstance(failure, Refused) and (failure.code in _DENIED or str(failure).startswith(_DENIED_TEXTS)):
        return StoreDenied(where, _text(failure))
    if isinstance(failure, Refused) and failure.code == "OOM":
        return StoreFull(where, "Redis' maxmemory is reached")
    return StoreError(f"the online store at {where} refused a request: {_text(failure)}.")


def _unavailable(where: str, failure: NotNow) -> StoreUnavailable:
    if failure.code == "LOADING":
        return StoreUnavailable(where, "is still loading its data", "try again shortly")
    if failure.code == "READONLY":
        next_step = "name its master in connection_string, or its Sentinels with redis_type: redis_sentinel"
        return StoreUnavailable(where, "is a replica, which takes no writes", next_step)
    return StoreUnavailable(where, f"cannot answer now ({_text(failure)})", "see the state of Redis")


def _code(text: str) -> str:
    inside = _IN_SCRIPT.match(text)
    return inside[1] if inside else text.split(" ", 1)[0]


def _text(failure: Failure) -> str:
    return str(failure).rstrip(".") or type(failure).__name__
