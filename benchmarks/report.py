"""What a benchmark says: rows for people and for `benchmarks/results/<target>.json`, each with goal and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT
from feature_store import __version__
from feature_store.files import replacing

_PACKAGES = (
    *("duckdb", "polars", "pyarrow", "numpy", "numba", "feast", "ibis-framework"),
    *("redis", "hiredis", "uvicorn", "uvloop", "httptools", "gunicorn"),
)
#: Columns of a table that is not printed on a terminal.
_FILE_WIDTH = 160


@dataclass
class Row:
    """One figure. `to_peer` and `to_limit` are Isochron's figure divided by the other's: below one is better than it,
    but for what is done in a second.

    `goal` is a text, `met` None where it could not be decided or there is none. `runs` holds the figure of each round
    by side; the three figures are their medians.
    """

    name: str
    isochron: float | None
    peer: float | None
    limit: float | None
    unit: str
    to_peer: float | None = None
    to_limit: float | None = None
    goal: str | None = None
    met: bool | None = None
    rounds: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    runs: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """At most `times` the figure of the limit, of the peer, or of another row's Isochron, or of one unit (so `times`
    units). With `kind` "at least" not less than that, and with "faster" at most the figure divided by `times`.
    """

    times: float
    of: str | None = None
    kind: Literal["at most", "at least", "faster"] = "at most"

    def text(self, unit: str) -> str:
        if self.kind == "faster":
            return f"{self.of} >= {self.times:g} x"
        sign = "<=" if self.kind == "at most" else ">="
        return f"{sign} {self.times:g} x {self.of}" if self.of else f"{sign} {self.times:g} {unit}"

    def met(self, row: Row, others: Mapping[str, Row]) -> bool | None:
        if self.of in ("limit", "peer"):
            other = row.limit if self.of == "limit" else row.peer
        elif self.of:
            other = others[self.of].isochron if self.of in others else None
        else:
            other = 1.0
        if row.isochron is None or other is None:
            return None
        if self.kind == "at least":
            return row.isochron >= self.times * other
        return row.isochron <= (other / self.times if self.kind == "faster" else self.times * other)


def judge(rows: Iterable[Row], goals: Mapping[str, tuple[Goal, ...]]) -> None:
    """Fills in each row's goal and whether it is met; a row with several goals meets them all or not."""
    by_name = {row.name: row for row in rows}
    for name, row in by_name.items():
        if wanted := goals.get(name, ()):
            row.goal = " and ".join(goal.text(row.unit) for goal in wanted)
            answers = [goal.met(row, by_name) for goal in wanted]
            row.met = False if False in answers else None if None in answers else True


def write(rows: list[Row], path: Path) -> None:
    """Writes the rows; those of the file that this run did not measure stay as they are, versions and all."""
    made = {row.name: asdict(row) for row in rows}
    before = {row["name"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(list((before | made).values()), indent=1) + "\n")


def show(rows: list[Row], title: str) -> None:
    """Prints the rows as a table, then the notes. A goal that is missed says so."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    table = Table(title=title, title_justify="left")
    for column in ("", "isochron", "limit", "peer", "unit", "to limit", "to peer", "goal", "met"):
        table.add_column(column, justify="right" if column in ("isochron", "limit", "peer") else "left", no_wrap=True)
    for row in rows:
        figures = (_figure(value) for value in (row.isochron, row.limit, row.peer))
        ratios = ("" if ratio is None else f"{ratio:.2f} x" for ratio in (row.to_limit, row.to_peer))
        table.add_row(row.name, *figures, row.unit, *ratios, row.goal or "", _met(row))
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if missed := [row.name for row in rows if row.met is False]:
        console.print(f"[bold red]goals missed: {', '.join(missed)}[/]")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _met(row: Row) -> str:
    if not row.goal:
        return ""
    return {True: "[green]yes[/]", False: "[bold red]MISSED[/]", None: "[yellow]not decided[/]"}[row.met]


def versions() -> dict[str, str]:
    """Of Python, the packages that take part and are installed, and Isochron's commit or, without git, version."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"isochron": described.stdout.strip() or __version__}


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GB, and operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gb": round(memory, 1), "os": _system()}


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        name = platform.system()
    return f"{name}, {platform.release()}"
