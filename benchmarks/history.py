"""`make bench TARGET=history`: point-in-time joins and windowed backfills, from files on disk to an Arrow table.

Every case runs Isochron, the best versions written by hand (`limits.py`) and Feast's own store where it can do the
task. All read the same files, out of a warm page cache; all values are compared. What it does not show: a cold disk,
more machines, on-demand views, several views in one request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.contest import Contender, Side, Standing, compete
from benchmarks.data import FEATURES, Recipe, read_through
from benchmarks.measure import ROOT, Call, measure, measure_here
from benchmarks.report import Goal, Row
from benchmarks.repos import make_repo
from benchmarks.values import differences

RESULTS = ROOT / "benchmarks" / "results" / "history.json"
WINDOWED = tuple(
    f"{kind}_amount_{seconds}s"
    for kind in ("count", "sum", "mean", "max")
    for seconds in (3_600, 86_400, 604_800, 2_592_000)
)
#: Figures of a case: the measured quantity, its unit, and how many of the measured make one.
QUANTITIES = {"wall": ("s", 1.0), "cpu": ("s", 1.0), "memory": ("GB", 1e9)}
#: How far sums of floats may lie apart, as docs/values.md allows.
TOLERANCE = 1e-9
#: Feast's default store runs up to this scale only: beyond, it dies of its memory.
_FILE_STORE_SCALE = 0.1
#: The 100 million rows may take this many times the timeout.
_LARGE_PATIENCE = 10.0
_NO_WINDOWS = "peer: none, Feast has no engine that backfills a window"


class CaseFailed(Exception):
    """A case without a figure: Isochron gave no answer, or a wrong one."""


@dataclass(frozen=True)
class Case:
    """One comparison over `data` (a folder with `rows.parquet`) and a file of training rows beside it.

    `goals` are by quantity; `repo` is the kind of repository Isochron runs in; `limits` names those that run (all
    unless told), within `address_space` bytes.
    """

    name: str
    data: str
    rows: Recipe
    training: Recipe
    goals: dict[str, tuple[Goal, ...]]
    ttl_days: int | None = None
    repo: str = "isochron"
    large: bool = False
    limits: tuple[str, ...] | None = None
    address_space: int | None = None

    @property
    def windowed(self) -> bool:
        return self.rows.kind == "events"

    @property
    def has_peer(self) -> bool:
        """Whether Feast's own store can do the task, and outlives it."""
        return not self.windowed and not self.large

    @property
    def view(self) -> str:
        """The windowed view has its data's name; a plain one may stand over another's file."""
        return self.data if self.windowed else self.name


def cases(scale: float) -> list[Case]:
    """All of them, at a share of their full size."""

    def rows(kind: str, number: int, entities: int, **options: Any) -> Recipe:
        return Recipe(kind, max(1, round(number * scale)), max(10, round(entities * scale)), **options)

    def training(number: int, entities: int, **options: Any) -> Recipe:
        return rows("training", number, entities, seed=number, **options)

    wall = (Goal(1.2, "limit"),)
    join = {"wall": wall, "memory": (Goal(2.0),)}
    ordered = rows("features", 10_000_000, 100_000, in_time_order=True)
    events = rows("events", 10_000_000, 100_000, in_time_order=True)
    large, capped = {"large": True, "repo": "isochron_4gb"}, {"memory": (Goal(8.0),)}
    return [
        Case("join", "join", ordered, training(1_000_000, 100_000), join),
        Case("join_ttl", "join", ordered, training(1_000_000, 100_000), join, ttl_days=10),
        Case(
            "join_unordered",
            "join_unordered",
            rows("features", 10_000_000, 100_000),
            training(1_000_000, 100_000),
            join,
        ),
        Case(
            "join_hot",
            "join_hot",
            rows("features", 1_000_000, 1_000, in_time_order=True),
            training(100_000, 1_000),
            {"wall": wall},
        ),
        Case("backfill", "backfill", events, training(200_000, 100_000), {"wall": wall}),
        Case("backfill_2m", "backfill", events, training(2_000_000, 100_000), {"wall": (Goal(4.0, "backfill wall"),)}),
        Case(
            "backfill_hot",
            "backfill_hot",
            rows("events", 10_000_000, 100_000, in_time_order=True, hot=0.3),
            training(200_000, 100_000, hot=0.3),
            {"wall": (*wall, Goal(4.0, "backfill wall"))},
        ),
        Case(
            "join_large",
            "join_large",
            rows("features", 100_000_000, 100_000, in_time_order=True),
            training(1_000_000, 100_000),
            capped,
            limits=("as-of join in Polars", "merge by hand"),
            address_space=20_000_000_000,
            **large,
        ),
        Case(
            "backfill_large",
            "backfill_large",
            rows("events", 100_000_000, 100_000, in_time_order=True),
            training(200_000, 100_000),
            capped,
            limits=("merge scan by hand",),
            address_space=20_000_000_000,
            **large,
        ),
    ]


_JOINS = {"as-of join in Polars": "join_polars", "as-of join in DuckDB": "join_duckdb", "merge by hand": "join_merge"}
_WINDOWS = {"range join in DuckDB": "windows_duckdb", "merge scan by hand": "windows_merge"}
_TINY = {
    "join_tiny": (Recipe("features", 1_000, 10, in_time_order=True), Recipe("training", 100, 10)),
    "backfill_tiny": (Recipe("events", 1_000, 10, in_time_order=True), Recipe("training", 100, 10)),
}


@dataclass(frozen=True)
class Workplace:
    """Where a run keeps its data and repositories."""

    folder: Path
    repos: dict[str, Path]

    def contenders(self, case: Case) -> list[Contender]:
        """Everybody who runs a case, Isochron first. No peer stands where Feast cannot do the task."""
        found = [self._retrieval("isochron", "isochron", case, case.repo, "benchmarks.isochron:history")]
        for name, function in (_WINDOWS if case.windowed else _JOINS).items():
            if case.limits is None or name in case.limits:
                found.append(self._by_hand(name, function, case))
        if not case.has_peer:
            return found
        for side, kind in (("peer", "feast_duckdb"), ("aside", "feast_file")):
            if kind in self.repos:
                found.append(self._retrieval(side, kind, case, kind, "benchmarks.peers:feast_history"))
        return found

    def _retrieval(self, side: Side, name: str, case: Case, repo: str, factory: str) -> Contender:
        features = WINDOWED if case.windowed else FEATURES
        tiny = "backfill_tiny" if case.windowed else "join_tiny"
        asked = {"spine": str(self.training(case)), "features": [f"{case.view}:{name}" for name in features]}
        warm_up = {"spine": str(self.folder / tiny / "training.parquet"), "features": [f"{tiny}:{n}" for n in features]}
        return Contender(side, name, Call(factory, asked, warm_up, {"repo": str(self.repos[repo])}))

    def _by_hand(self, name: str, function: str, case: Case) -> Contender:
        tiny = self.folder / ("backfill_tiny" if case.windowed else "join_tiny")
        options: dict[str, Any] = {"in_time_order": case.rows.in_time_order}
        if not case.windowed:
            options |= {"features": list(FEATURES), "ttl_days": case.ttl_days}
        asked = {"rows": str(self.rows(case)), "spine": str(self.training(case)), **options}
        warm_up = {"rows": str(tiny / "rows.parquet"), "spine": str(tiny / "training.parquet"), **options}
        call = Call(f"benchmarks.limits:{function}", asked, warm_up, address_space=case.address_space)
        return Contender("limit", name, call)

    def rows(self, case: Case) -> Path:
        return self.folder / case.data / "rows.parquet"

    def training(self, case: Case) -> Path:
        return self.folder / case.data / f"training-{case.training.rows}.parquet"


def prepare(folder: Path, chosen: list[Case], kinds: list[str], say: Callable[[str], None]) -> Workplace:
    """Generates the files that are not there yet and applies the repositories."""
    for name, (rows, training) in _TINY.items():
        rows.write(folder / name / "rows.parquet")
        training.write(folder / name / "training.parquet")
    place = Workplace(folder, {kind: folder / kind for kind in kinds})
    for case in chosen:
        say(f"data: {case.data}")
        case.rows.write(place.rows(case))
        case.training.write(place.training(case))
    for kind in kinds:
        say(f"repository: {kind}")
        make_repo(folder, kind)
    return place


def rows_of(case: Case, standing: Standing, versions: dict[str, str], machine: dict[str, Any]) -> list[Row]:
    """The rows of a case: one a quantity, with the medians of the rounds."""
    sides = {side: standing.winner(side) for side in ("isochron", "peer", "limit")}
    note = _note(case, standing)
    rows = []
    for quantity, (unit, size) in QUANTITIES.items():
        figures = {s: _rounded(standing.figure(c, quantity) / size) if c else None for s, c in sides.items()}
        row = Row(f"{case.name} {quantity}", **figures, unit=unit, note=note, versions=versions, machine=machine)
        row.runs = {s: [_rounded(v / size) for v in standing.values(c, quantity)] for s, c in sides.items() if c}
        row.rounds = len(row.runs["isochron"])
        row.to_peer = _rounded(row.isochron / row.peer) if row.peer else None
        row.to_limit = _rounded(row.isochron / row.limit) if row.limit else None
        rows.append(row)
    return rows


def _rounded(figure: float) -> float:
    return float(f"{figure:.4g}")


def _note(case: Case, standing: Standing) -> str:
    """Who the limit and the peer were, how the others did, and why some did not come through."""
    best = {side: standing.winner(side) for side in ("limit", "peer")}
    told = [f"{side}: {contender.name}" for side, contender in best.items() if contender]
    for contender in standing.runs:
        if contender.side in ("limit", "aside") and contender not in (*best.values(), *standing.failed):
            wall, memory = standing.figure(contender, "wall"), standing.figure(contender, "memory")
            told.append(f"{contender.name}: {wall:.3g} s, {memory / 1e9:.2g} GB")
    told += [f"{contender.name} failed: {reason}" for contender, reason in standing.failed.items()]
    if case.windowed:
        told.append(_NO_WINDOWS)
    if not best["limit"]:
        told.append("values not compared: nobody else came through")
    ours = standing.runs[standing.winner("isochron")][0].values
    for contender, runs in standing.runs.items():
        if contender.side in ("peer", "aside") and runs:
            wrong = differences(ours, runs[0].values, TOLERANCE, in_order=False)
            told += [f"{contender.name}'s values differ: {wrong[0]}"] if wrong else []
    return f"{case.name}: {'; '.join(told)}"


def wrong_values(standing: Standing) -> list[str]:
    """Where a run of Isochron and one written by hand disagree; nobody may measure a wrong answer."""
    ours = next(runs for contender, runs in standing.runs.items() if contender.side == "isochron")
    by_hand = {c.name: runs for c, runs in standing.runs.items() if c.side == "limit"}
    return [
        f"isochron against {name}: {line}"
        for name, runs in by_hand.items()
        for theirs in runs
        for one in ours
        for line in differences(one.values, theirs.values, TOLERANCE)
    ]


def run(case: Case, place: Workplace, rounds: int, timeout: float | None) -> Standing:
    """All rounds of a case, each run in a fresh process; without a timeout in this one.

    Raises CaseFailed where Isochron gave no answer, or another one than the code written by hand.
    """
    read_through(place.rows(case))
    patience = (timeout or 0.0) * (_LARGE_PATIENCE if case.large else 1.0)
    measured = partial(measure, folder=place.folder, timeout=patience) if timeout else measure_here
    standing = compete(place.contenders(case), rounds, measured, lambda what: typer.echo(f"{case.name}, {what}"))
    if not standing.winner("isochron"):
        raise CaseFailed("; ".join(f"{c.name} failed: {why}" for c, why in standing.failed.items()))
    if wrong := wrong_values(standing):
        raise CaseFailed("\n".join(["values differ:", *wrong]))
    return standing


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each contender.")] = 3,
    scale: Annotated[float, typer.Option(min=0.0, help="Share of the full sizes; 0.01 for a quick look.")] = 1.0,
    only: Annotated[list[str] | None, typer.Option(help="Run this case. Repeatable.")] = None,
    peer: Annotated[bool, typer.Option(help="Run Feast's own store too.")] = True,
    large: Annotated[bool, typer.Option(help="Also the 100 million rows: 20 GB of disk, much time.")] = False,
    fresh: Annotated[bool, typer.Option(help="A fresh process for each run.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds after which a run in a fresh process has failed.")] = 300.0,
    data: Annotated[Path, typer.Option(help="Folder of the generated data.")] = ROOT / "benchmarks" / "data",
    results: Annotated[
        Path | None, typer.Option(help="Results file; benchmarks/results/history.json at scale 1, else none.")
    ] = None,
) -> None:
    """Point-in-time joins and windowed backfills against Feast and code written by hand.

    Ends with 0 also where a goal is missed, with 1 where values differ or Isochron fails.
    """
    chosen = _chosen(cases(scale), only, large)
    kinds = sorted({case.repo for case in chosen})
    if peer and any(case.has_peer for case in chosen):
        kinds += ["feast_duckdb", *(["feast_file"] if scale <= _FILE_STORE_SCALE else [])]
    place = prepare((data / f"scale-{scale:g}").resolve(), chosen, kinds, typer.echo)
    versions, machine = report.versions(), report.machine()
    path = results or (RESULTS if scale == 1.0 and fresh else None)
    goals = {f"{case.name} {quantity}": wanted for case in chosen for quantity, wanted in case.goals.items()}
    rows: list[Row] = []
    failed: list[str] = []
    for case in chosen:
        try:
            rows += rows_of(case, run(case, place, rounds, timeout if fresh else None), versions, machine)
        except CaseFailed as error:
            failed.append(f"{case.name}: {error}")
        report.judge(rows, goals)
        if path:  # after each case: a long run that is stopped keeps what it has
            report.write(rows, path)
    report.show(rows, f"history at scale {scale:g}, {rounds} rounds, {machine['cores']} cores of {machine['cpu']}")
    if failed:
        raise SystemExit("\n".join(failed))


def _chosen(known: list[Case], only: list[str] | None, large: bool) -> list[Case]:
    if unknown := sorted(set(only or ()) - {case.name for case in known}):
        raise typer.BadParameter(f"no case '{unknown[0]}'; there are: {', '.join(case.name for case in known)}")
    return [case for case in known if (case.name in only if only else large or not case.large)]


if __name__ == "__main__":
    typer.run(main)
