"""The generations of one view: how the next one is filled beside the one that readers use, and takes its place.

A generation is begun by a *claim*, a number of its own: whoever began earlier sees at the end that it was overtaken.
From its beginning on every writer writes into both, for the bucket records of the old one name the new one. Readers
change over when one record does, and never see a half-filled view.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from feature_store.definitions.view import StoredView
from feature_store.errors import BootstrapSuperseded, CorruptState
from feature_store.stores.online.backend import DELETE, SET, Backend, Change, Write, settle
from feature_store.stores.online.keys import BUCKETS, Keyspace, claim_key, generation_key, views_key
from feature_store.stores.online.records import Bucket, Generation, merged, read_bucket, read_generation
from feature_store.timestamps import BEGINNING, END

_CLAIM = struct.Struct("<I")


@dataclass(frozen=True)
class Generations:
    """The generations of a view in a store."""

    backend: Backend
    project: str
    view: StoredView

    @property
    def _record(self) -> bytes:
        return generation_key(self.project, self.view.name)

    @property
    def _claim(self) -> bytes:
        return claim_key(self.project, self.view.name)

    def space(self, number: int) -> Keyspace:
        return Keyspace(self.project, self.view.name, number)

    def exists(self) -> bool:
        """Whether the store was ever filled for the view, or for another definition of it."""
        return self.backend.get([self._record])[0] is not None

    def current(self) -> Generation:
        """The generation that readers use. Raises StoreNotReady when there is none for this definition."""
        return read_generation(self.backend.get([self._record])[0], self.view)

    def claimed(self) -> int:
        """The number of the generation that was last begun, 0 if none was."""
        return _claimed(self.backend.get([self._claim])[0])

    def alive(self) -> list[tuple[int, bool]]:
        """The numbers of the generations that readers use or may come to use, and which are of this definition."""
        record, claim = self.backend.get([self._record, self._claim])
        current = Generation.decode(record) if record else None
        first = current.number if current else 1
        last = max(first if current else 0, _claimed(claim))
        return [(n, current is None or n > first or self._is_ours(current)) for n in range(first, last + 1)]

    def check(self) -> None:
        """Raises StoreNotReady unless every record that reads of this view need is there."""
        space = self.space(self.current().number)
        for bucket, record in enumerate(self.backend.get(space.buckets)):
            read_bucket(record, self.view, bucket)

    def open_empty(self) -> None:
        """Lets readers use an empty generation where they have none. Of several who come at once one opens it."""
        while not self.exists():
            name_view(self.backend, self.project, self.view.name, held=True)
            space = self.space(self._claim_next())
            opened = Bucket(BEGINNING).encode()
            self.backend.apply([Write([], [(SET, key, opened)]) for key in space.buckets])
            if not self._switch(space, BEGINNING, first=True):
                self.delete(lambda number, mine=space.generation: number == mine)  # type: ignore[misc]

    def begin(self) -> Keyspace:
        """Begins a generation. From here on writers write into it too, so that a log read afterwards misses none.

        Raises BootstrapSuperseded where another one was begun meanwhile.
        """
        name_view(self.backend, self.project, self.view.name, held=True)
        space = self.space(self._claim_next())
        before = self._before()
        if before and before.number > space.generation:
            raise BootstrapSuperseded(self.view.name)
        old = self.space(before.number) if before else None
        positions = before.partitions if before else {}

        def link(bucket: int, records: Sequence[bytes | None]) -> Write:
            new = space.bucket(bucket)
            if old is None or records[0] is None or before is None or not self._is_ours(before):
                filling = Bucket(END, partitions=positions)
                return Write([], [(SET, new, filling.encode())])
            held = Bucket.decode(records[0])
            if held.successor > space.generation:
                raise BootstrapSuperseded(self.view.name)
            filling = Bucket(END, held.fence, merged(held.partitions, positions))
            linked = replace(held, successor=space.generation)
            changes: list[Change] = [(SET, old.bucket(bucket), linked.encode()), (SET, new, filling.encode())]
            return Write([(old.bucket(bucket), records[0])], changes)

        settle(
            self.backend,
            range(BUCKETS),
            lambda bucket: [old.bucket(bucket)] if old else [],
            link,
            f"begin a generation of view '{self.view.name}'",
        )
        return space

    def _is_ours(self, generation: Generation) -> bool:
        return generation.fingerprint == self.view.fingerprint

    def _before(self) -> Generation | None:
        """The generation that readers use, of whatever definition; None where there is none that can be read."""
        with contextlib.suppress(CorruptState):
            record = self.backend.get([self._record])[0]
            return Generation.decode(record) if record else None
        return None

    def _claim_next(self) -> int:
        """A number above every one that any key in the store carries."""
        number = 0

        def claim(_: None, records: Sequence[bytes | None]) -> Write:
            nonlocal number
            # A claim that is gone may have left keys behind: then they are looked at, one by one.
            held = [_claimed(records[0])] if records[0] else [*self._numbers(), 0]
            if records[1]:
                with contextlib.suppress(CorruptState):
                    held.append(Generation.decode(records[1]).number)
            number = max(held) + 1
            return Write([(self._claim, records[0])], [(SET, self._claim, _CLAIM.pack(number))])

        settle(self.backend, [None], lambda _: [self._claim, self._record], claim, "claim a generation")
        return number

    def _numbers(self) -> Iterator[int]:
        space = self.space(0)
        return map(space.number_in, self.backend.scan(*space.every_generation()))

    def publish(self, space: Keyspace, exact_from: int, cut: int) -> None:
        """Lets readers change over to a generation that is filled now, and deletes all others.

        Reads are exact from `exact_from` on; the log was folded up to the event time `cut`. Raises BootstrapSuperseded
        where another generation was begun meanwhile; then this one is deleted.
        """
        if not (self._open_buckets(space, exact_from) and self._switch(space, cut)):
            self.delete(lambda number: number == space.generation)
            raise BootstrapSuperseded(self.view.name)
        if space.generation > 1:
            # Not those above: they were begun meanwhile.
            self.delete(lambda number: number < space.generation)

    def _open_buckets(self, space: Keyspace, exact_from: int) -> bool:
        """Says from when on reads are exact; False where whoever came later has deleted this generation already."""
        gone = False

        def opened(bucket: int, records: Sequence[bytes | None]) -> Write | None:
            nonlocal gone
            key = space.bucket(bucket)
            if records[0] is None and self.claimed() != space.generation:
                gone = True
                return None
            record = replace(read_bucket(records[0], self.view, bucket), exact_from=exact_from)
            return Write([(key, records[0])], [(SET, key, record.encode())])

        what = f"publish a generation of view '{self.view.name}'"
        settle(self.backend, range(BUCKETS), lambda bucket: [space.bucket(bucket)], opened, what)
        return not gone

    def _switch(self, space: Keyspace, cut: int, first: bool = False) -> bool:
        """Lets readers change over to a generation; False where another was begun since, or with `first` where there is
        one that they use.
        """
        overtaken = False
        left: list[int] = []

        def switch(_: None, records: Sequence[bytes | None]) -> Write | None:
            nonlocal overtaken
            overtaken = _claimed(records[0]) != space.generation or (first and records[1] is not None)
            if overtaken:
                return None
            positions = {}
            if records[1]:
                with contextlib.suppress(CorruptState):
                    former = Generation.decode(records[1])
                    positions, left[:] = former.partitions, [former.number]
            made = Generation(space.generation, self.view.fingerprint, cut, positions)
            return Write([(self._claim, records[0]), (self._record, records[1])], [(SET, self._record, made.encode())])

        settle(self.backend, [None], lambda _: [self._claim, self._record], switch, "publish a generation")
        for number in [] if overtaken else left:
            # Before its values: a reader that is still there must find that it is gone, and not that entities are.
            self.backend.delete(iter(self.space(number).buckets))
        return not overtaken

    def delete(self, which: Callable[[int], bool]) -> None:
        """Deletes the values of those generations whose number `which` says yes to."""
        delete_generations(self.backend, self.space(0), which)


def names_of(record: bytes | None) -> set[str]:
    """The names in a project's record of its views."""
    return set(msgspec.msgpack.decode(record, type=list[str])) if record else set()


def name_view(backend: Backend, project: str, view: str, held: bool) -> None:
    """Notes in the project's record that the store holds a view, or holds it no more."""
    key = views_key(project)

    def note(_: None, records: Sequence[bytes | None]) -> Write | None:
        names = names_of(records[0])
        if (view in names) == held:
            return None
        made = msgspec.msgpack.encode(sorted(names ^ {view}))
        return Write([(key, records[0])], [(SET, key, made)])

    settle(backend, [None], lambda _: [key], note, f"note view '{view}'")


def forget(backend: Backend, project: str, view: str) -> None:
    """Deletes a view by its name, in all its generations."""
    record, claim = generation_key(project, view), claim_key(project, view)
    held = backend.get([record])[0]
    backend.apply([Write([], [(DELETE, record, b""), (DELETE, claim, b"")])])
    with contextlib.suppress(CorruptState):
        if held:
            # Before its values, as when readers change over.
            backend.delete(iter(Keyspace(project, view, Generation.decode(held).number).buckets))
    delete_generations(backend, Keyspace(project, view, 0), lambda number: True)
    name_view(backend, project, view, held=False)


def delete_generations(backend: Backend, space: Keyspace, which: Callable[[int], bool]) -> None:
    """Deletes the values of those generations of a view whose number `which` says yes to."""
    keys = backend.scan(*space.every_generation())
    backend.delete(key for key in keys if which(space.number_in(key)))


def _claimed(record: bytes | None) -> int:
    return _CLAIM.unpack(record)[0] if record else 0
