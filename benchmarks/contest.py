"""Isochron, code written by hand and the peer, turn by turn, so that all meet the same machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from benchmarks.measure import Call, CallFailed, Measured

Side = Literal["isochron", "limit", "peer", "aside"]


@dataclass(frozen=True, eq=False)
class Contender:
    """A call with the side it runs for. Of several limits the fastest of the first round goes on; who runs aside is
    measured once and only told of.
    """

    side: Side
    name: str
    call: Call


@dataclass
class Standing:
    """What the contenders of one case did: the measured runs of each, and why those that failed did."""

    runs: dict[Contender, list[Measured]] = field(default_factory=dict)
    failed: dict[Contender, str] = field(default_factory=dict)

    def winner(self, side: Side) -> Contender | None:
        """The fastest contender of a side, None where none came through."""
        alive = [c for c in self.runs if c.side == side and c not in self.failed]
        return min(alive, key=lambda c: (-len(self.runs[c]), self.figure(c, "wall")), default=None)

    def figure(self, contender: Contender, quantity: str) -> float:
        """The median over the rounds of `wall`, `cpu` (seconds) or `memory` (bytes)."""
        return median(self.values(contender, quantity))

    def values(self, contender: Contender, quantity: str) -> list[float]:
        return [getattr(run, quantity) for run in self.runs[contender]]


def compete(
    contenders: list[Contender], rounds: int, run: Callable[[Call], Measured], say: Callable[[str], None]
) -> Standing:
    """Runs every contender once a round, with `run`. Each round another one starts."""
    standing = Standing()
    left = contenders
    for number in range(rounds):
        first = number % len(left) if left else 0
        for contender in [*left[first:], *left[:first]]:
            say(f"round {number + 1}: {contender.side}, {contender.name}")
            try:
                standing.runs.setdefault(contender, []).append(run(contender.call))
            except CallFailed as error:
                standing.failed[contender] = str(error)
        left = [c for c in left if _goes_on(c, standing)]
    return standing


def _goes_on(contender: Contender, standing: Standing) -> bool:
    if contender in standing.failed or contender.side == "aside":
        return False
    return contender.side != "limit" or contender is standing.winner("limit")
