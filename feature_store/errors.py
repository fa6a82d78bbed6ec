"""Every error a person can meet: it takes facts and builds the text (what failed, where, what to do next).

`retryable` says whether the same call may succeed later without anything being changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class IsochronError(Exception):
    """Base of all errors raised on purpose. Its text is one message for a person."""

    retryable = False


class ConfigError(IsochronError):
    """The repository's configuration cannot be used as it is."""


class DefinitionError(IsochronError):
    """A declared view, service or source breaks the contract; refused before anything is stored.

    `view` and `subject` (an aggregation, a feature, a source) name the place, `fix` the way out.
    """

    def __init__(self, view: str, subject: str, problem: str, fix: str) -> None:
        self.view, self.subject, self.problem, self.fix = view, subject, problem, fix
        where = f"view '{view}'" + (f", {subject}" if subject else "")
        super().__init__(f"{where}: {problem}. Fix: {fix}.")


class DefinitionRefused(IsochronError):
    """An apply was refused; the registry is as it was. Its text is the reason."""


class UnknownName(IsochronError):
    """A service, view, feature or source that is not among the applied definitions."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"no {kind} is named '{name}'; there are: {', '.join(sorted(known)) or 'none'}.")


class SourceError(IsochronError):
    """A source file is missing, unreadable, or lacks what its definition names."""


class SpineError(IsochronError):
    """The rows that ask for features (the spine, Feast's entity_df) cannot be used as they are."""


class ColumnError(IsochronError):
    """A column's values do not read as the type their definition declares."""


class RequestError(IsochronError):
    """A request's keys or request-time values are missing, of the wrong type, or out of range.

    `field` names the offending one.
    """

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(f"'{field}' {problem}.")


class StoreNotReady(IsochronError):
    """The online store holds nothing for a view, or lost a part: an error, never zeros."""

    retryable = True

    def __init__(self, view: str, reason: str) -> None:
        self.view, self.reason = view, reason
        super().__init__(
            f"online store not ready for view '{view}': {reason}. Fill it with `isochron bootstrap {view}`."
        )


class NotExactOnline(IsochronError):
    """An online read at a time that the stored state can no longer answer exactly."""

    def __init__(self, view: str, as_of: int, exact_from: int) -> None:
        from feature_store.timestamps import iso

        self.view, self.as_of, self.exact_from = view, as_of, exact_from
        super().__init__(
            f"view '{view}' cannot be read online as of {iso(as_of)}: the store is exact from {iso(exact_from)} on. "
            "Ask history for that time (get_historical_features, or an online read with history allowed)."
        )


class PositionGap(IsochronError):
    """Events would be skipped: the log position offered is beyond the next one expected."""

    def __init__(self, view: str, partition: int, expected: int, offered: int) -> None:
        self.view, self.partition, self.expected, self.offered = view, partition, expected, offered
        super().__init__(
            f"view '{view}', partition {partition}: offset {offered} was offered but {expected} is next; "
            f"send the events from offset {expected} on."
        )


class StoreError(IsochronError):
    """The online store did not answer, or refused a read or a write."""

    retryable = True


class StoreUnavailable(StoreError):
    """The online store could not be reached in time, or is not able to answer now; `where` names it.

    A write whose answer was lost may have been applied or not.
    """

    def __init__(self, where: str, problem: str, next_step: str) -> None:
        self.where = where
        super().__init__(f"the online store at {where} {problem}; {next_step}.")


class StoreDenied(StoreError):
    """The online store does not accept the user or password, or does not let the user do what is needed."""

    retryable = False

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        super().__init__(
            f"the online store at {where} denies access ({problem}); check username and password in connection_string, "
            "and what the user may do."
        )


class StoreFull(StoreError):
    """The online store has no room: it took nothing, or of a write in several parts not all of them."""

    def __init__(self, where: str, limit: str) -> None:
        self.where = where
        super().__init__(
            f"the online store at {where} is full ({limit}); not all of this write was taken. Give it room, and write "
            "it again: rows of a plain view, and events with their offset, count once."
        )


class StoreContended(StoreError):
    """A write was given up after many rounds, in each of which another writer was let through."""

    def __init__(self, what: str) -> None:
        super().__init__(f"could not {what}: other writers came first each time; try again when there are fewer.")


class NotFolded(StoreError):
    """Pushed rows are in the log, but not in all online views that fold it."""

    retryable = False

    def __init__(self, views: list[str], cause: Exception) -> None:
        self.views = views
        names = " ".join(views)
        super().__init__(
            f"the rows are written to the log, but the online store failed ({str(cause).rstrip('.')}). Do not push "
            f"them again: fill the views from the log, with `isochron bootstrap {names}`."
        )


class BootstrapSuperseded(IsochronError):
    """A bootstrap ended after a later one of the same view had begun: the later one's result stands."""

    def __init__(self, view: str) -> None:
        self.view = view
        super().__init__(f"another bootstrap of view '{view}' began after this one; this one's result was dropped.")


class CorruptState(IsochronError):
    """Bytes in the online store that this version cannot read; never guessed at."""


class ErasureLogError(IsochronError):
    """The log of erasures cannot be read or written; without it nobody knows which records are left out."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"the erasure log {path}: {problem}.")


class NotErasedOnline(IsochronError):
    """What the online store holds of an erased entity in a view cannot be taken away as it lies."""

    def __init__(self, view: str, problem: str, fix: str) -> None:
        self.view, self.problem, self.fix = view, problem, fix
        super().__init__(f"view '{view}': {problem}; {fix}.")


class ErasureIncomplete(IsochronError):
    """An entity is erased from history, and from what is written from now on, but the online store still holds it in
    some views. `problems` says why, by view.
    """

    def __init__(self, problems: Mapping[str, IsochronError]) -> None:
        self.problems = {view: str(error) for view, error in problems.items()}
        self.retryable = all(error.retryable for error in problems.values())
        super().__init__(
            "the erasure is written down and every engine leaves the entity out, but the online store may still hold "
            f"it. {' '.join(self.problems.values())} Erasing again does no harm."
        )


class ModelError(IsochronError):
    """A model artifact is missing, incomplete, or belongs to other features than it is asked to score."""


class ValuesDiffer(IsochronError):
    """A comparison of feature values found mismatches."""


class NotCarried(IsochronError, NotImplementedError):
    """A part of Feast's interface that has no counterpart here, said by name."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"{what} is not carried by Isochron; {instead}.")


class TrainingSetError(IsochronError):
    """A training set cannot be written where it is asked, or its manifest no longer gives the same bytes."""


class MemoryLimitReached(IsochronError):
    """A retrieval needs more memory than the engine was given, after all that can be spilled was spilled."""

    def __init__(self, view: str, limit: str) -> None:
        self.view, self.limit = view, limit
        super().__init__(
            f"view '{view}' needs more memory than the limit of {limit}, though sorts spill to disk. Raise "
            "memory_limit under offline_store in feature_store.yaml, or ask for fewer rows or features at a time."
        )


class OutputError(IsochronError):
    """A result cannot be written where it was asked for."""
