"""What plain and windowed views have in common online: where their values lie, and how one read finds them.

A read is a *look-up*: the keys it needs, fetched in one round trip by whoever holds the line to the store, and what
their values mean. The generation's record and the bucket records are fetched with the values, so that a read notices a
switch of generations (and looks up again) and a store that lost a part of the view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from feature_store.definitions.erasure import LoadErasures, no_erasures
from feature_store.definitions.view import StoredView
from feature_store.errors import StoreNotReady
from feature_store.stores.online.backend import Backend
from feature_store.stores.online.blocks import Block
from feature_store.stores.online.generations import Generations
from feature_store.stores.online.keys import Keyspace, buckets_of, generation_key
from feature_store.stores.online.records import Bucket, Generation, Positions, read_generation
from feature_store.stores.online.status import Status


@dataclass(frozen=True, eq=False)
class ViewRead:
    """What the store holds of some entities in one view, as of a time each.

    `block` has the values, a row an entity; `statuses` why a row as a whole has none (None: look at each value; None
    for all: no row lacks them); `event_times` the event time of the row behind the values (BEGINNING: none; None for
    all: none has one). `exact_from` is the earliest time that each row can be asked for (None: any), `known` whether
    the store holds anything of the entity, `found` what was read beside the values.
    """

    block: Block
    known: np.ndarray
    found: Found
    exact_from: np.ndarray | None = None
    statuses: list[Status | None] | None = None
    event_times: np.ndarray | None = None

    @property
    def generation(self) -> Generation:
        return self.found.generation

    @property
    def values(self) -> dict[str, pa.Array]:
        """The values as Arrow arrays, by feature."""
        return {name: self.block.arrow(i) for i, name in enumerate(self.block.names)}

    @property
    def positions(self) -> list[Positions]:
        """Per row the log positions that its bucket has folded since the bootstrap of this generation."""
        return [Bucket.decode(record).partitions if record else {} for record in self.found.buckets]


class OnlineView(ABC):
    """One view in an online store."""

    #: The kinds of values that an entity has.
    kinds: tuple[bytes, ...]

    def __init__(self, backend: Backend, project: str, view: StoredView, erasures: LoadErasures = no_erasures) -> None:
        self.backend, self.project, self.erasures = backend, project, erasures
        self.generations = Generations(backend, project, view)
        self._record_key = generation_key(project, view.name)
        # What was read last: the next look-up supposes that it still holds.
        self._seen: tuple[bytes | None, Generation, Keyspace] | None = None

    def look_up(self, entities: Sequence[bytes | None]) -> Lookup:
        """The look-up of these entities (None: a null key, of which nothing is known)."""
        if self._seen is None:
            return Lookup(self, entities, None, [self._record_key])
        _, generation, space = self._seen
        asked = [e for e in entities if e is not None] if None in entities else entities
        at = buckets_of(asked)  # type: ignore[arg-type]
        buckets = list(dict.fromkeys(at))
        records = space.buckets
        keys = [self._record_key, *[records[bucket] for bucket in buckets]]
        keys += space.of_kinds(self.kinds, asked, at)  # type: ignore[arg-type]
        return Lookup(self, entities, generation, keys, at, buckets)

    def notice(self, record: bytes | None) -> Generation:
        """The generation that a record just read names. Raises StoreNotReady where none serves this view."""
        if self._seen is None or self._seen[0] != record:
            generation = read_generation(record, self.generations.view)
            space = self._seen[2] if self._seen else None
            if space is None or space.generation != generation.number:
                space = self.generations.space(generation.number)
            self._seen = (record, generation, space)
        return self._seen[1]

    @abstractmethod
    def decode(
        self,
        names: Sequence[str],
        stored: Sequence[Sequence[bytes | None]],
        times: np.ndarray,
        found: Found,
    ) -> ViewRead:
        """The named features of stored values: for each kind one value an entity, in the order of entities."""

    @abstractmethod
    def kept(self, stored: Sequence[bytes | None], until: int) -> Sequence[bytes | None]:
        """What of an entity's values (one a kind) remains where records known at or before a time (microseconds) go.

        Raises NotErasedOnline where that cannot be told of what is stored.
        """

    def read(self, names: Sequence[str], entities: Sequence[bytes | None], times: np.ndarray) -> ViewRead:
        """The named features of each entity as of its time, in one round trip (the first read takes another one)."""
        lookup: Lookup | None = self.look_up(entities)
        while lookup is not None:
            values = self.backend.get(lookup.keys)
            again = lookup.again(values)
            if again is None:
                return lookup.answer(names, values, times)
            lookup = again
        raise AssertionError("a look-up ends in an answer")


@dataclass(frozen=True, eq=False)
class Found:
    """What a look-up found beside the values: the generation, and each row's bucket record."""

    generation: Generation
    lookup: Lookup
    values: Sequence[bytes | None]

    @cached_property
    def buckets(self) -> list[bytes | None]:
        """Each row's bucket record, None for a null key."""
        records = dict(zip(self.lookup.buckets, self.values[1 : 1 + len(self.lookup.buckets)], strict=True))
        return self.lookup.spread([records[bucket] for bucket in self.lookup.at])


@dataclass(frozen=True, eq=False)
class Lookup:
    """One view's part of a read: `keys` are to be fetched in one round trip.

    `generation` is the one supposed (None: not known yet, then only its record is among the keys); `at` the bucket of
    each entity with a key, `buckets` those that are fetched; `second` whether a part of the view was missing before.
    """

    online: OnlineView
    entities: Sequence[bytes | None]
    generation: Generation | None
    keys: list[bytes]
    at: Sequence[int] = ()
    buckets: Sequence[int] = ()
    second: bool = field(default=False)

    def again(self, values: Sequence[bytes | None]) -> Lookup | None:
        """The look-up to try next, where these values are of a generation that readers have left; else None.

        Raises StoreNotReady where the view is not served, or a part of it is missing for the second time: seen once, it
        may be that the generation was just deleted.
        """
        generation = self.online.notice(values[0])
        if self.generation is None or generation.number != self.generation.number:
            return self.online.look_up(self.entities)
        records = values[1 : 1 + len(self.buckets)]
        if None not in records:
            return None
        if not self.second:
            return Lookup(self.online, self.entities, self.generation, self.keys, self.at, self.buckets, second=True)
        view = self.online.generations.view.name
        raise StoreNotReady(view, f"bucket {self.buckets[records.index(None)]} is missing")

    def answer(self, names: Sequence[str], values: Sequence[bytes | None], times: np.ndarray) -> ViewRead:
        """What the values that were fetched mean."""
        rest, low = len(self.at), 1 + len(self.buckets)
        stored = [values[low + k * rest : low + (k + 1) * rest] for k in range(len(self.online.kinds))]
        if rest != len(self.entities):
            stored = [self.spread(some) for some in stored]
        return self.online.decode(names, stored, times, Found(self.online.notice(values[0]), self, values))

    def spread(self, values: Sequence[bytes | None]) -> list[bytes | None]:
        """Values of entities with keys as values of all rows, None for a null key."""
        following = iter(values)
        return [None if entity is None else next(following) for entity in self.entities]
