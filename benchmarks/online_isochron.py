"""Isochron's side of the online bench."""

from __future__ import annotations

#: "module:Class" of what implements `benchmarks.online_sides.IsochronSide`; None while it is not written.
SIDE: str | None = None
