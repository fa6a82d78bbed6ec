"""The embedded online store: LMDB, a memory-mapped file that many processes read while one writes.

Every read happens in one snapshot and every write in one transaction, so that a reader sees an append, a compaction or
a switch of generations whole or not at all, also after a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from feature_store.errors import ConfigError, StoreError

#: Address space that is reserved, not disk that is used: the file grows with what it holds.
MAP_SIZE = 1 << 38

_open: dict[tuple[str, int], lmdb.Environment] = {}
_lock = threading.Lock()


def _close_inherited() -> None:
    """In a forked child: LMDB files must not be used across a fork, and not be opened beside the inherited ones."""
    for environment in _open.values():
        environment.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)


class Snapshot:
    """A consistent view of all keys."""

    def __init__(self, transaction: lmdb.Transaction) -> None:
        self._transaction = transaction

    def get(self, key: bytes) -> bytes | None:
        value = self._transaction.get(key)
        return None if value is None else bytes(value)

    def first_from(self, key: bytes) -> bytes | None:
        """The first key that is not before this one."""
        cursor = self._transaction.cursor()
        return bytes(cursor.key()) if cursor.set_range(key) else None

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The keys that start with a prefix, in order, with their values."""
        cursor = self._transaction.cursor()
        if cursor.set_range(prefix):
            for key, value in cursor:
                if bytes(key[: len(prefix)]) != prefix:
                    return
                yield bytes(key), bytes(value)


class Nothing(Snapshot):
    """The snapshot of a store that was never written."""

    def __init__(self) -> None:
        pass

    def get(self, key: bytes) -> bytes | None:
        return None

    def first_from(self, key: bytes) -> bytes | None:
        return None

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(())


class Transaction(Snapshot):
    """A snapshot that can be written to; all of it is kept or none."""

    def put(self, key: bytes, value: bytes) -> None:
        self._transaction.put(key, value)

    def delete(self, key: bytes) -> None:
        self._transaction.delete(key)

    def delete_prefix(self, prefix: bytes) -> int:
        """Deletes the keys that start with a prefix and says how many they were."""
        keys = [key for key, _ in self.scan(prefix)]
        for key in keys:
            self._transaction.delete(key)
        return len(keys)


class EmbeddedBackend:
    """The store file at a path; one process opens it once, however many objects name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return (self.path / "data.mdb").exists()

    def _environment(self) -> lmdb.Environment:
        # LMDB forbids opening one file twice in a process, and using it across a fork.
        key = (os.path.realpath(self.path), os.getpid())
        with _lock:
            if key not in _open:
                _open[key] = self._open()
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
    def reading(self) -> Iterator[Snapshot]:
        """A snapshot for the length of a block; that of an empty store where there is no file, which stays so."""
        if not self.exists():
            yield Nothing()
            return
        with self._refusing(), self._environment().begin() as transaction:
            yield Snapshot(transaction)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """A transaction for the length of a block: kept when the block ends well, dropped when it raises."""
        with self._refusing(), self._environment().begin(write=True) as transaction:
            yield Transaction(transaction)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreError(f"the online store at {self.path} is full ({MAP_SIZE >> 30} GiB).") from error
        except lmdb.Error as error:
            raise StoreError(f"the online store at {self.path} failed: {error}; check its disk.") from error

    def close(self) -> None:
        """Closes the file in this process."""
        with _lock:
            environment = _open.pop((os.path.realpath(self.path), os.getpid()), None)
        if environment is not None:
            environment.close()
