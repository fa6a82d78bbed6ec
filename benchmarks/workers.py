"""A fresh process, pinned to a core, that keeps one object and calls its methods when told.

Contenders live in one each: no one's imports, heap or garbage collector slow another one down, and they take turns.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Any

from benchmarks.cores import pin
from benchmarks.measure import ROOT

_LINES = 12


class WorkerFailed(Exception):
    """A worker that ended instead of answering; the text is the end of what it wrote."""


class Worker:
    """A context manager: inside it the process lives. `factory` ("module:function") makes the object, there, from the
    arguments, all of which are pickled.
    """

    def __init__(self, core: int | None, factory: str, *arguments: Any) -> None:
        self._name = factory
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (close closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", "" if core is None else str(core)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._send((factory, arguments))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns. Raises WorkerFailed with the end of the traceback if it raises."""
        self._send((method, arguments))
        try:
            return pickle.load(self._process.stdout)
        except EOFError as error:
            self._process.wait()
            raise WorkerFailed(f"{self._name}: {self._last_words()}") from error

    def close(self) -> None:
        """Ends the process: its end of the pipe closes, and it leaves its loop."""
        with suppress(BrokenPipeError):  # what a process that failed did not take
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            self._process.wait()
            raise WorkerFailed(f"{self._name}: {self._last_words()}") from error

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-_LINES:]) or f"ended with {self._process.returncode}"


def main(core: str) -> None:
    """What the process does: an error ends it, and its traceback is the answer."""
    if core:
        pin(os.getpid(), int(core))
    # Answers have a pipe of their own: what libraries print must not come between them.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    factory, arguments = pickle.load(sys.stdin.buffer)
    module, function = factory.split(":")
    made = getattr(import_module(module), function)(*arguments)
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(made, method)(*arguments), answers)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
