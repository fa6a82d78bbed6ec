"""One measured call: a fresh process, everything set up and warm, then a single run under the watch."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.values import digest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Call:
    """What a fresh process runs: `factory` ("module:function") is called with `set_up` and returns a function; that
    one is run with `warm_up`, then measured with `arguments`. Imports, set-up and warm-up are not in the time.

    `address_space` caps the process in bytes: it fails above it, and the machine stays usable.
    """

    factory: str
    arguments: Mapping[str, Any]
    warm_up: Mapping[str, Any]
    set_up: Mapping[str, Any] = field(default_factory=dict)
    address_space: int | None = None


@dataclass(frozen=True)
class Measured:
    """Wall and CPU (user and system, children included) of one call in seconds; the peak of resident memory of its
    whole process in bytes; the digest of the values it returned.
    """

    wall: float
    cpu: float
    memory: int
    values: dict[str, Any]


class CallFailed(Exception):
    """A call that gave no answer: it raised, was killed, or took too long."""


def measure(call: Call, folder: Path, timeout: float) -> Measured:
    """Runs a call in a fresh process that spills into `folder`. Raises CallFailed with the reason."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(call)), str(answer)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command, cwd=scratch, env=environment, timeout=timeout, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CallFailed(f"no answer within {timeout:g} s") from error
        if done.returncode < 0:
            raise CallFailed(f"killed by {signal.Signals(-done.returncode).name}")
        if done.returncode:
            raise CallFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return Measured(**json.loads(answer.read_text()))


def measure_here(call: Call) -> Measured:
    """Runs a call in this process: its memory is then that of everything before it too."""
    module, function = call.factory.split(":")
    run = getattr(import_module(module), function)(**call.set_up)
    run(**call.warm_up)
    gc.collect()
    cpu, start = _cpu_seconds(), time.perf_counter()
    result = run(**call.arguments)
    wall, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    return Measured(wall, cpu, _peak_memory(), digest(result))


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_memory() -> int:
    """Bytes, of this process or of its largest finished child.

    On Linux ru_maxrss of a process starts at what its parent held when it was started; VmHWM does not.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    status = Path("/proc/self/status")
    if not status.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, children)
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return max(int(peak) * 1024, children)


def main(request: str, answer: str) -> None:
    """What the fresh process does."""
    call = Call(**json.loads(request))
    if call.address_space:
        resource.setrlimit(resource.RLIMIT_AS, (call.address_space, call.address_space))
    Path(answer).write_text(json.dumps(asdict(measure_here(call))))


if __name__ == "__main__":
    main(*sys.argv[1:])
