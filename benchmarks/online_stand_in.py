"""In Isochron's place: the code by hand once more, so that the bench itself can be tested, and what a side looks like.

python -m benchmarks.online --isochron benchmarks.online_stand_in:StandIn --scale 0.001 --seconds 0.01 --no-peer
"""

from __future__ import annotations

from benchmarks import bare_asgi, online_json
from benchmarks.online_data import Truth, View
from benchmarks.online_limits import PackedRows
from benchmarks.online_packed_log import PackedLog
from benchmarks.online_sides import Command, Place, Read


class StandInLog(PackedLog):
    """Its keys are not those of the packed log that it runs against: memory is measured."""

    LETTER = b"s"


class StandIn(PackedRows):
    """Implements Isochron's side."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        log = StandInLog(place)
        self._folder = place.folder
        self.sdk_reader = self.reader
        self.fill_windows, self.window_reader, self.window_keys = log.fill_windows, log.window_reader, log.window_keys

    def server(self, view: View, port: int) -> Command:
        """The bare app: it knows one answer, the first that is asked for."""
        self._folder.mkdir(parents=True, exist_ok=True)
        answer = self._folder / "answer.json"
        answer.write_bytes(online_json.answer(Truth(view.rows()), view.requests(1)[0]))
        return bare_asgi.command(answer, port)


class WrongStandIn(StandIn):
    """Forgets that a value was null."""

    def reader(self, view: View) -> Read:
        read = super().reader(view)
        return lambda keys: {name: [value or 0.0 for value in column] for name, column in read(keys).items()}
