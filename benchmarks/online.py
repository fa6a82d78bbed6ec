"""`make bench TARGET=online`: reads, writes, windows and HTTP from Redis, beside Feast's own store and code by hand.

Every case checks values first, then everybody takes turns: each in a process of its own, pinned to its core. What it
does not show: a network, several workers, other types than doubles, on-demand views, several views in one request.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.http_load import LoadFailed
from benchmarks.http_servers import ServerFailed
from benchmarks.measure import ROOT
from benchmarks.online_bench import Bench, Options
from benchmarks.online_cases import Case, CaseFailed, Outcome, cases
from benchmarks.online_isochron import SIDE
from benchmarks.report import Row
from benchmarks.workers import WorkerFailed

RESULTS = ROOT / "benchmarks" / "results" / "online.json"
_SIDES = ("isochron", "peer", "limit")
#: Runs at full length only become the repository's figures.
_ROUNDS, _SECONDS = 7, 1.0


def rows_of(case: Case, outcome: Outcome, facts: dict[str, Any]) -> list[Row]:
    """The rows of a case: one a quantity, with the medians of the rounds. `facts` are versions and machine."""
    rows = []
    for quantity, unit in case.units.items():
        runs = {name: [_rounded(turn[quantity]) for turn in turns] for name, turns in outcome.runs.items()}
        figures = {side: _rounded(median(runs[side])) if side in runs else None for side in _SIDES}
        row = Row(f"{case.name} {quantity}", **figures, unit=unit, note=_note(case, outcome), **facts)
        row.runs = {side: runs[side] for side in _SIDES if side in runs}
        row.rounds = max(len(turns) for turns in runs.values())
        if row.isochron is not None:
            row.to_peer = _rounded(row.isochron / row.peer) if row.peer else None
            row.to_limit = _rounded(row.isochron / row.limit) if row.limit else None
        rows.append(row)
    return rows


def _rounded(figure: float) -> float:
    return float(f"{figure:.4g}")


def _note(case: Case, outcome: Outcome) -> str:
    """What was noted, and the figures of those who are neither Isochron nor peer nor limit."""
    told = list(outcome.notes)
    for name, turns in outcome.runs.items():
        if name not in _SIDES:
            figures = (f"{q} {median(t[q] for t in turns):.3g} {unit}" for q, unit in case.units.items())
            told.append(f"{name}: {', '.join(figures)}")
    return f"{case.name}: {'; '.join(told)}" if told else ""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = _ROUNDS,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length of a turn, roughly.")] = _SECONDS,
    scale: Annotated[float, typer.Option(min=0.0, help="Share of the full sizes; 0.01 for a quick look.")] = 1.0,
    only: Annotated[list[str] | None, typer.Option(help="Run this case. Repeatable.")] = None,
    peer: Annotated[bool, typer.Option(help="Run Feast's own store and server too.")] = True,
    isochron: Annotated[str, typer.Option(help="Isochron's side as module:Class; empty to leave it out.")] = SIDE or "",
    data: Annotated[Path, typer.Option(help="Folder of generated data and repositories.")] = ROOT
    / "benchmarks"
    / "data",
    results: Annotated[
        Path | None, typer.Option(help="Results file; benchmarks/results/online.json for a full run, else none.")
    ] = None,
) -> None:
    """Reads, writes, windows and HTTP from Redis against Feast and code written by hand.

    Ends with 0 also where a goal is missed, with 1 where values differ or a side fails.

    For example: python -m benchmarks.online --only read_100 --only http_100 --scale 0.1 --rounds 3
    """
    chosen = _chosen(cases(), only)
    options = Options((data / "online" / f"scale-{scale:g}").resolve(), isochron or None, peer, rounds, scale, seconds)
    full = scale == 1.0 and rounds >= _ROUNDS and seconds >= _SECONDS and peer and bool(isochron)
    path = results or (RESULTS if full else None)
    goals = {f"{case.name} {quantity}": wanted for case in chosen for quantity, wanted in case.goals.items()}
    rows: list[Row] = []
    failed: list[str] = []
    with ExitStack() as stack:
        bench = Bench(options, stack, typer.echo)
        facts = {"versions": report.versions() | {"redis-server": bench.redis.version}, "machine": report.machine()}
        for case in chosen:
            typer.echo(f"{case.name}")
            try:
                rows += rows_of(case, case.run(bench), facts)
            except (CaseFailed, WorkerFailed, ServerFailed, LoadFailed) as error:
                failed.append(f"{case.name}: {error}")
                typer.echo(failed[-1])
            report.judge(rows, goals)
            if path:  # after each case: a long run that is stopped keeps what it has
                report.write(rows, path)
        cores = bench.cores.told()
    report.show(rows, f"online at scale {scale:g}, {rounds} rounds, {facts['machine']['cpu']}; {cores}")
    if failed:
        raise SystemExit("\n".join(failed))


def _chosen(known: list[Case], only: list[str] | None) -> list[Case]:
    if unknown := sorted(set(only or ()) - {case.name for case in known}):
        raise typer.BadParameter(f"no case '{unknown[0]}'; there are: {', '.join(case.name for case in known)}")
    return [case for case in known if not only or case.name in only]


if __name__ == "__main__":
    typer.run(main)
