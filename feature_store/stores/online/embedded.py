"""The embedded online store: LMDB, a memory-mapped file that many processes read while one writes.

Every read happens in one snapshot and all writes given at once in one transaction, so that a reader sees an append, a
compaction or a switch of generations whole or not at all, also after a crash.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from feature_store.errors import ConfigError, StoreError
from feature_store.stores.online.backend import APPEND, DELETE, NEWER, TRIM, Change, Write
from feature_store.stores.online.keys import TAG_LENGTH
from feature_store.stores.online.rows import newer

#: Address space that is reserved, not disk that is used: the file grows with what it holds.
MAP_SIZE = 1 << 38

#: Keys deleted in one transaction.
_CHUNK = 50_000

_open: dict[tuple[str, int], lmdb.Environment] = {}
_lock = threading.Lock()


def _close_inherited() -> None:
    """In a forked child: LMDB files must not be used across a fork, and not be opened beside the inherited ones."""
    for environment in _open.values():
        environment.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)


class EmbeddedBackend:
    """The store file at a path; one process opens it once, however many objects name it."""

    together = True
    one_place = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key: tuple[str, int] | None = None

    def exists(self) -> bool:
        return (self.path / "data.mdb").exists()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys, in one snapshot."""
        if not self._is_open() and not self.exists():
            return [None] * len(keys)
        with self._refusing(), self._environment().begin() as transaction:
            get = transaction.get
            return [get(key) for key in keys]

    async def get_async(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The same: a look at mapped memory waits for nothing."""
        return self.get(keys)

    def apply(self, writes: Iterable[Write], once: bool = False) -> list[list[int] | None]:
        """Applies all writes, or none where a guard of any does not hold; then the others' results are None too."""
        every = list(writes)
        if not every:
            return []
        with self._refusing(), self._environment().begin(write=True) as transaction:
            if not all(_holds(transaction, write) for write in every):
                transaction.abort()
                return [None] * len(every)
            return [[_change(transaction, change) for change in write.changes] for write in every]

    def scan(self, *tails: bytes) -> Iterator[bytes]:
        """The keys whose tails start with any of these bytes, as they were when the scan began."""
        if not self.exists():
            return
        with self._refusing(), self._environment().begin() as transaction:
            cursor = transaction.cursor()
            # Ranges for each tag in use: the first key behind those of one names the next.
            more = cursor.first()
            while more:
                tag = cursor.key()[:TAG_LENGTH]
                for tail in tails:
                    within = cursor.set_range(tag + tail)
                    while within and cursor.key().startswith(tag + tail):
                        yield cursor.key()
                        within = cursor.next()
                more = cursor.set_range(_after(tag))

    def delete(self, keys: Iterable[bytes]) -> None:
        """Deletes keys."""
        remaining = iter(keys)
        while some := list(itertools.islice(remaining, _CHUNK)):
            with self._refusing(), self._environment().begin(write=True) as transaction:
                for key in some:
                    transaction.delete(key)

    def close(self) -> None:
        """Closes the file in this process."""
        with _lock:
            environment = _open.pop((os.path.realpath(self.path), os.getpid()), None)
        if environment is not None:
            environment.close()

    def _is_open(self) -> bool:
        return self._key is not None and self._key in _open and self._key[1] == os.getpid()

    def _environment(self) -> lmdb.Environment:
        # LMDB forbids opening one file twice in a process, and using it across a fork.
        if self._is_open():
            return _open[self._key]  # type: ignore[index]
        key = (os.path.realpath(self.path), os.getpid())
        with _lock:
            if key not in _open:
                _open[key] = self._open()
            self._key = key
            return _open[key]

    def _open(self) -> lmdb.Environment:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            environment = lmdb.open(str(self.path), map_size=MAP_SIZE, readahead=False, max_readers=512)
            environment.reader_check()  # a reader that was killed would keep every page it saw from being reused
            return environment
        except (OSError, lmdb.Error) as error:
            raise ConfigError(f"the online store at {self.path} cannot be opened: {error}") from error

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreError(f"the online store at {self.path} is full ({MAP_SIZE >> 30} GiB).") from error
        except lmdb.Error as error:
            raise StoreError(f"the online store at {self.path} failed: {error}; check its disk.") from error


def _after(tag: bytes) -> bytes:
    """What sorts behind every key of a tag."""
    return tag[:-1] + bytes([tag[-1] + 1])


def _holds(transaction: lmdb.Transaction, write: Write) -> bool:
    return all(transaction.get(key) == value for key, value in write.equal) and all(
        _held(transaction, key).startswith(start) for key, start in write.prefix
    )


def _held(transaction: lmdb.Transaction, key: bytes) -> bytes:
    return bytes(transaction.get(key) or b"")


def _change(transaction: lmdb.Transaction, change: Change) -> int:
    what, key, operand = change
    if what == DELETE:
        transaction.delete(key)
        return 0
    if what == NEWER:
        decision = newer(_held(transaction, key) or None, operand)
        if decision == 1:
            transaction.put(key, operand)
        return decision
    if what == TRIM:
        (length,) = struct.unpack_from("<I", operand)
        operand = operand[4:] + _held(transaction, key)[length:]
    if what == APPEND:
        operand = _held(transaction, key) + operand
    if operand:
        transaction.put(key, operand)
    else:
        transaction.delete(key)
    return len(operand) if what == APPEND else 0
