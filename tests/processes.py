"""Runs the installed commands as a person does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(folder: Path, program: str, *arguments: str, seed: str | None = None) -> subprocess.CompletedProcess[str]:
    """A finished process: `program` (of this environment) in `folder`; `seed` is its PYTHONHASHSEED."""
    environment = {**os.environ, **({"PYTHONHASHSEED": seed} if seed else {})}
    return subprocess.run(
        [str(BIN / program), *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )


def output_of(folder: Path, program: str, *arguments: str) -> str:
    """What a process printed that must end well."""
    done = run(folder, program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
