"""Redis' errors as ours: which may go away by themselves, and what the others mean."""

from __future__ import annotations

import asyncio

from redis import exceptions

from feature_store.errors import StoreDenied, StoreError, StoreFull, StoreUnavailable

#: What may be gone when the same is tried again: a lost connection, a server that starts or was demoted.
PASSING = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    OSError,
    asyncio.TimeoutError,
)

#: What does not go away by trying again, though redis-py derives it from a lost connection.
FINAL = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)


def refusal(where: str, error: Exception, timeout: float) -> StoreError:
    """The error of ours that says what one of Redis means. Neither text holds a secret."""
    if isinstance(error, FINAL) or _is_denial(error):
        return StoreDenied(where, _text(error))
    if isinstance(error, exceptions.OutOfMemoryError) or "OOM" in str(error):
        return StoreFull(where, "Redis' maxmemory is reached")
    if isinstance(error, exceptions.TimeoutError | asyncio.TimeoutError):
        return StoreUnavailable(where, f"did not answer within {timeout:g} s", "see whether Redis is up and not paused")
    if isinstance(error, exceptions.BusyLoadingError):
        return StoreUnavailable(where, "is still loading its data", "try again shortly")
    if isinstance(error, PASSING):
        return StoreUnavailable(where, f"cannot be reached ({_text(error)})", "see whether Redis is up")
    return StoreError(f"the online store at {where} refused a request: {_text(error)}.")


def _is_denial(error: Exception) -> bool:
    return str(error).startswith(("NOAUTH", "WRONGPASS", "NOPERM"))


def _text(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
