"""Where the programs are that wheels do not bring: on the PATH, or unpacked by `infra/install-system-libraries`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Where `infra/install-system-libraries` unpacks what it may not install.
UNPACKED = Path(__file__).resolve().parents[2] / ".venv" / "system"
_PACKAGES = {
    "redis-server": {"apt-get": "redis-server", "dnf": "redis", "apk": "redis", "brew": "redis"},
    "openssl": {"apt-get": "openssl", "dnf": "openssl", "apk": "openssl", "brew": "openssl"},
}
_VERBS = {"apt-get": "install", "dnf": "install", "apk": "add", "brew": "install"}


class ProgramMissing(Exception):
    """A program that is not on this machine; the text says how to get it."""

    def __init__(self, program: str) -> None:
        self.program = program
        ways = [f"{tool} {_VERBS[tool]} {package}" for tool, package in _PACKAGES[program].items()]
        super().__init__(
            f"{program} is not on this machine. `infra/install-system-libraries` brings it where there is apt-get; "
            f"elsewhere install it: {', '.join(ways[:-1])}, or {ways[-1]}."
        )


@dataclass(frozen=True)
class Program:
    """A program's path, and the environment it runs in."""

    path: str
    environment: Mapping[str, str]


def find(program: str, unpacked: Path = UNPACKED) -> Program:
    """The `program` of the system, else the unpacked one. Raises ProgramMissing."""
    if path := shutil.which(program):
        return Program(path, os.environ)
    path = unpacked / "usr" / "bin" / program
    if not path.exists():
        raise ProgramMissing(program)
    # The unpacked libraries are known to no linker's cache.
    folders = [str(folder) for folder in (*unpacked.glob("usr/lib/*-linux-*"), *unpacked.glob("lib/*-linux-*"))]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    libraries = os.pathsep.join([*folders, *([inherited] if inherited else [])])
    return Program(str(path), {**os.environ, "LD_LIBRARY_PATH": libraries})
