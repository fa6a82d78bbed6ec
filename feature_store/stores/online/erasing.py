"""Erasing an entity from the online store: its values go, and the fences of its buckets rise.

The erasure was written down before. A raised fence changes a bucket's record, which every writer's writes are guarded
by: whoever is under way with rows of before writes nothing, reads again, and then knows of the erasure. So nothing is
written back, in the generation that readers use nor in one that is being filled beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from feature_store.definitions.erasure import Erasure, values_in
from feature_store.errors import NotErasedOnline
from feature_store.stores.online.backend import DELETE, SET, Change, Write, settle
from feature_store.stores.online.keys import BUCKETS, Keyspace, bucket_of, entity_key, entity_values
from feature_store.stores.online.records import Bucket
from feature_store.stores.online.view import OnlineView

#: Entities of a bucket that go in one write: the store is busy with nothing else meanwhile.
_TAKEN = 200


def erase(online: OnlineView, erasure: Erasure, only: Keyspace | None = None) -> int:
    """Takes away what a view holds of the records at or below an erasure; of how many entities there was something.

    In every generation that readers use or may come to use, or in `only` that one. A view with further join keys loses
    every entity with these values. Raises NotErasedOnline, when all else is done, where keys cannot be read back or
    events of after the erasure cannot be told apart; StoreError.
    """
    view = online.generations.view
    values = values_in(erasure.keys, view.keys)
    if values is None:
        return 0
    under_way = _Erasing(online, erasure.erased_at, only)
    if len(values) == len(view.keys):
        under_way.take([entity_key([_stored(values[key.name]) for key in view.keys])])
    else:
        # Before the entities are looked for: what is under way to buckets that hold none yet must be noticed too.
        under_way.fence(range(BUCKETS))
        wanted = {i: _stored(values[key.name]) for i, key in enumerate(view.keys) if key.name in values}
        under_way.take(under_way.found(wanted))
    if under_way.unreadable:
        raise NotErasedOnline(
            view.name,
            f"{len(under_way.unreadable)} of its keys cannot be read back (too long, or of an earlier definition), so "
            "that nobody knows whose they are",
            f"fill it anew: isochron bootstrap {view.name}",
        )
    for error in under_way.left.values():
        raise error
    return len(under_way.taken)


def _stored(value: bool | int | str | bytes) -> int | str | bytes:
    return int(value) if isinstance(value, bool) else value


@dataclass
class _Erasing:
    """One erasure under way in one view."""

    online: OnlineView
    until: int
    only: Keyspace | None
    unreadable: set[bytes] = field(default_factory=set)
    taken: set[bytes] = field(default_factory=set)
    #: Entities that were left as they are, with the reason.
    left: dict[bytes, NotErasedOnline] = field(default_factory=dict)

    def found(self, values: dict[int, int | str | bytes]) -> Iterator[bytes]:
        """The entities with these key values, by the place of each among the view's join keys."""
        width, seen = len(self.online.generations.view.keys), set()
        for space, _ in self._spaces():
            for key in self.online.backend.scan(*map(space.tail, self.online.kinds)):
                entity = space.entity_in(key)
                held = entity_values(entity)
                if held is None or len(held) != width:
                    self.unreadable.add(entity)
                elif entity not in seen and all(held[place] == value for place, value in values.items()):
                    seen.add(entity)
                    yield entity

    def take(self, entities: Iterator[bytes] | Sequence[bytes]) -> None:
        """Takes these entities' values away, and raises the fences of their buckets: some of a bucket in one write."""
        by_bucket: dict[int, list[bytes]] = {}
        for entity in entities:
            by_bucket.setdefault(bucket_of(entity), []).append(entity)
        self._write(
            [(b, every[low : low + _TAKEN]) for b, every in by_bucket.items() for low in range(0, len(every), _TAKEN)]
        )

    def fence(self, buckets: Sequence[int]) -> None:
        """Raises the fences of buckets."""
        self._write([(bucket, []) for bucket in buckets])

    def _spaces(self) -> list[tuple[Keyspace, bool]]:
        """The generations to look at, and whether their values are of this view's definition."""
        if self.only is not None:
            return [(self.only, True)]
        generations = self.online.generations
        return [(generations.space(number), same) for number, same in generations.alive()]

    def _write(self, shares: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        """Of each bucket some entities."""
        spaces: dict[int, list[tuple[Keyspace, bool]]] = {}

        def keys(share: int) -> list[bytes]:
            spaces[share] = self._spaces()
            return [key for space, _ in spaces[share] for key in self._keys(space, *shares[share])]

        def write(share: int, found: Sequence[bytes | None]) -> Write | None:
            bucket, entities = shares[share]
            equal: list[tuple[bytes, bytes | None]] = []
            changes: list[Change] = []
            stored = iter(found)
            for space, same in spaces[share]:
                record = next(stored)
                equal.append((space.bucket(bucket), record))
                if record is not None:
                    held = Bucket.decode(record)
                    changes.append((SET, space.bucket(bucket), replace(held, fence=held.fence + 1).encode()))
                for entity in entities:
                    values = [next(stored) for _ in self.online.kinds]
                    names = [space.entity(kind, entity) for kind in self.online.kinds]
                    equal += zip(names, values, strict=True)
                    changes += self._changes(entity, names, values, same)
            return Write(equal, changes) if equal else None

        what = f"erase an entity from view '{self.online.generations.view.name}'"
        # One share of a bucket after another: each raises its fence, which guards all of them.
        for turn in _turns([bucket for bucket, _ in shares]):
            settle(self.online.backend, turn, keys, write, what)

    def _keys(self, space: Keyspace, bucket: int, entities: Sequence[bytes]) -> list[bytes]:
        return [space.bucket(bucket), *(space.entity(kind, e) for e in entities for kind in self.online.kinds)]

    def _changes(
        self, entity: bytes, names: Sequence[bytes], values: Sequence[bytes | None], same: bool
    ) -> Iterator[Change]:
        if any(value is not None for value in values):
            self.taken.add(entity)
            try:
                kept = self.online.kept(values, self.until) if same else [None] * len(values)
            except NotErasedOnline as error:
                self.left[entity] = error
                return
            self.left.pop(entity, None)
            for name, value, rest in zip(names, values, kept, strict=True):
                if rest is not None:
                    yield (SET, name, rest)
                elif value is not None:
                    yield (DELETE, name, b"")


def _turns(buckets: Sequence[int]) -> list[list[int]]:
    """The places of some buckets, so that none comes twice in a turn."""
    turns: list[list[int]] = []
    count: dict[int, int] = {}
    for place, bucket in enumerate(buckets):
        turn = count[bucket] = count.get(bucket, -1) + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(place)
    return turns
