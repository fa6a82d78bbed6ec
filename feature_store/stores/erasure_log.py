"""The erasure log: every erasure, a JSON object a line, in a file beside the registry that is only ever added to.

It is part of what every value is made of, as the registry is: keep it and back it up with that. A line is written
whole, under a lock, and synced to the disk before the erasure goes on. A writer that is killed in the middle leaves a
last line without its end, an erasure that nobody was told of.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from feature_store.definitions.erasure import NO_ERASURES, Erasure, Erasures
from feature_store.errors import ErasureLogError


class ErasureLog:
    """The erasures of one project in the log at a path, which projects share that share a registry file. There need be
    no file before the first erasure.
    """

    def __init__(self, path: Path, project: str) -> None:
        self.path, self.project = path, project
        # The file's mark when it was last read, and what it held.
        self._read: tuple[tuple[int, int, int] | None, Erasures] = (None, NO_ERASURES)

    def load(self) -> Erasures:
        """All of them; the same object as before while the file is the same.

        Raises ErasureLogError where the file cannot be read, or a line is no erasure: what is not known to be erased
        would be answered.
        """
        mark, known = self._read
        found = self._mark()
        if found != mark:
            known = NO_ERASURES if found is None else self._parsed()
            self._read = (found, known)
        return known

    def append(self, erasure: Erasure) -> None:
        """Adds an erasure: when this returns it is on the disk, and everybody who loads from now on has it.

        Raises ErasureLogError where that cannot be done; then nothing is erased.
        """
        line = msgspec.json.encode(erasure) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                os.ftruncate(file, _whole_lines(file))
                _write(file, line)
                os.fsync(file)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise ErasureLogError(self.path, f"cannot be written ({error.strerror}); nothing was erased") from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            # Opened, not only looked at: a network file system asks its server then, instead of what it remembers.
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ErasureLogError(self.path, f"cannot be read ({error.strerror})") from error
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _parsed(self) -> Erasures:
        try:
            *lines, _ = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise ErasureLogError(self.path, f"cannot be read ({error.strerror})") from error
        every = [self._erasure(number, line) for number, line in enumerate(lines, 1)]
        return Erasures(tuple(erasure for erasure in every if erasure.project == self.project))

    def _erasure(self, number: int, line: bytes) -> Erasure:
        try:
            return msgspec.json.decode(line, type=Erasure)
        except msgspec.MsgspecError as error:
            problem = f"line {number} is no erasure ({error}); the file was changed, or its disk failed: restore it"
            raise ErasureLogError(self.path, problem) from error


def _whole_lines(file: int) -> int:
    """How many bytes of a file end with a line's end: what follows them was cut off while it was written."""
    return os.pread(file, os.fstat(file).st_size, 0).rfind(b"\n") + 1


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]


def _sync_folder(folder: Path) -> None:
    """The file's name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
