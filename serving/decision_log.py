"""The decision log: every decision with what is needed to replay it, a JSON object a line, appended and never changed.

A line is written whole, by one write, before the answer goes out: a decision that somebody acted on is in the log also
after the process was killed (not after a loss of power: lines are not synced to the disk one by one). A process killed
in the middle of a write leaves a last line without its end, a decision that was never answered.

Values are held so that each comes back as it was: null, booleans, integers, text, lists and finite floats as JSON (a
float's shortest text that reads as the same float), a time as {"time": ISO 8601}, NaN and the infinities as
{"float": name}, bytes as {"bytes": base64}.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import fcntl
import logging
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import orjson

from feature_store.errors import IsochronError
from feature_store.timestamps import iso, micros, moment, parse_time

logger = logging.getLogger(__name__)


class DecisionLogError(IsochronError):
    """The decision log cannot be opened or read, or is open in another process."""


class DecisionNotLogged(DecisionLogError):
    """A decision could not be written, so it must not be answered."""

    retryable = True


class CorruptDecision(DecisionLogError):
    """A line of the decision log, other than a torn last one, is no decision. `line` counts from 1."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        self.path, self.line = path, line
        super().__init__(
            f"{path}, line {line} is no decision: {problem}. The file was changed or its disk failed; restore it."
        )


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision and everything it was made from.

    `request` as it was validated, `event_time` aware; `as_of` and `logged_at` in microseconds since the epoch, UTC:
    when the features were read at, and when the decision was made. `features` and `statuses` hold every feature of the
    service by name; `unknown` says by view whether the store had nothing of the entity; `positions` by view the log
    positions its values cover, (epoch, next offset) by partition, and `cuts` the generation they were folded in and
    the event time up to which its bootstrap had read the log. `fingerprint` is that of the features' definitions.
    """

    decision_id: str
    request: dict[str, Any]
    service: str
    as_of: int
    features: dict[str, Any]
    statuses: dict[str, str]
    unknown: dict[str, bool]
    positions: dict[str, dict[int, tuple[int, int]]]
    cuts: dict[str, tuple[int, int]]
    fingerprint: str
    model_version: str
    score: float
    warnings: tuple[str, ...]
    logged_at: int
    code_commit: str


def encode_decision(decision: Decision) -> bytes:
    """A decision as the bytes of its line, without the line's end."""
    held = msgspec.structs.asdict(decision)
    held |= {name: encode_value(held[name]) for name in ("request", "features")}
    held |= {name: iso(held[name]) for name in ("as_of", "logged_at")}
    return orjson.dumps(held, option=orjson.OPT_NON_STR_KEYS)


def decode_decision(line: bytes) -> Decision:
    """The decision that a line holds; raises ValueError that says why it holds none."""
    held = orjson.loads(line)
    if not isinstance(held, dict):
        raise ValueError("it is no JSON object")
    try:
        held |= {name: decode_value(held[name]) for name in ("request", "features")}
        held |= {name: parse_time(held[name]) for name in ("as_of", "logged_at")}
        return msgspec.convert(held, Decision, str_keys=True)
    except KeyError as cause:
        raise ValueError(f"it lacks {cause}") from cause
    except (TypeError, AttributeError, binascii.Error, msgspec.ValidationError) as cause:
        raise ValueError(str(cause)) from cause


def encode_value(value: Any) -> Any:
    """A value as JSON can hold it; see the module's text for how."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dt.datetime):
        return {"time": iso(micros(value))}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [encode_value(element) for element in value]
    if isinstance(value, dict):
        return {name: encode_value(held) for name, held in value.items()}
    return value


def decode_value(held: Any) -> Any:
    """The value that `encode_value` was given."""
    if isinstance(held, list):
        return [decode_value(element) for element in held]
    if not isinstance(held, dict):
        return held
    if len(held) == 1:
        ((kind, text),) = held.items()
        if kind == "float":
            return float(text)
        if kind == "time":
            return moment(parse_time(text))
        if kind == "bytes":
            return base64.b64decode(text, validate=True)
    return {name: decode_value(element) for name, element in held.items()}


@dataclass
class DecisionLog:
    """A log file that one process appends to, from any of its threads, between `open` and `close` or in a `with`."""

    path: Path
    _handle: int | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def open(self) -> None:
        """Opens the file, making it where it is not there, and takes it for this process.

        A torn last line is moved to a file beside it, named `.torn`. Raises DecisionLogError when the file cannot be
        opened or is open for writing elsewhere.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = _for_owner(str(self.path), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        except OSError as cause:
            raise DecisionLogError(f"the decision log {self.path} cannot be opened: {cause.strerror}.") from cause
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _set_torn_line_aside(self.path, handle)
        except BlockingIOError as cause:
            os.close(handle)
            raise DecisionLogError(
                f"the decision log {self.path} is being written by another process; give each server its own."
            ) from cause
        except OSError as cause:
            os.close(handle)
            raise DecisionLogError(f"the decision log {self.path} cannot be mended: {cause.strerror}.") from cause
        self._handle = handle

    def append(self, decision: Decision) -> None:
        """Writes a decision's line, whole, before it returns.

        Raises DecisionNotLogged when it cannot be written; nothing of it is left in the file then.
        """
        line = encode_decision(decision) + b"\n"
        with self._lock:
            if self._handle is None:
                raise DecisionNotLogged(f"the decision log {self.path} is not open; open it first.")
            try:
                _write_whole(self._handle, line)
            except OSError as cause:
                raise DecisionNotLogged(
                    f"decision {decision.decision_id} could not be written to {self.path}: {cause.strerror}. "
                    "It was not answered; free the disk and ask again."
                ) from cause

    def close(self) -> None:
        """Closes the file; closing it again does nothing."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None

    def __enter__(self) -> DecisionLog:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_decisions(path: Path) -> Iterator[Decision]:
    """The decisions in a log, in the order they were made; the file may be written meanwhile.

    A last line without its end was torn by a crash, or is being written: it is left out, and a warning is logged.
    Raises CorruptDecision at any other line that is no decision, DecisionLogError when the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    logger.warning("%s ends in a torn line of %d bytes, an unanswered decision", path, len(line))
                    return
                yield _decision_in(path, number, line)
    except OSError as cause:
        raise DecisionLogError(f"the decision log {path} cannot be read: {cause.strerror}.") from cause


def _decision_in(path: Path, number: int, line: bytes) -> Decision:
    try:
        return decode_decision(line)
    except ValueError as cause:
        raise CorruptDecision(path, number, str(cause)) from cause


def _write_whole(handle: int, line: bytes) -> None:
    """Appends the bytes, or leaves the file as it was: a part of a line would spoil the next one."""
    before = os.fstat(handle).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(handle, line[written:])
    except OSError:
        os.ftruncate(handle, before)
        raise


def _set_torn_line_aside(path: Path, handle: int) -> None:
    size = os.fstat(handle).st_size
    end = _end_of_last_line(handle, size)
    if end == size:
        return
    torn = os.pread(handle, size - end, end)
    aside = path.with_name(path.name + ".torn")
    with open(aside, "ab", opener=_for_owner) as kept:
        kept.write(torn + b"\n")
    os.ftruncate(handle, end)
    logger.warning("%s ended in a torn line of %d bytes, an unanswered decision; moved to %s", path, len(torn), aside)


def _for_owner(name: str, flags: int) -> int:
    """Opens a file that only its owner can read: it holds what customers spend."""
    return os.open(name, flags, 0o600)


def _end_of_last_line(handle: int, size: int, block: int = 65_536) -> int:
    """Where the last whole line ends: after the last line feed, or at the file's start."""
    while size > 0:
        start = max(0, size - block)
        found = os.pread(handle, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0
