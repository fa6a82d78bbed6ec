"""What an online store is built on: a place for keys and values that answers many at once and changes a few together.

A *write* changes keys of one bucket, all of them or none, provided that its *guards* hold: values that are still what
the writer's knowledge was built on. Guards compare for equality, never for order, so that a writer of the past and a
store that fell back to older data are both noticed. A writer whose write was not applied reads again and decides anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from feature_store.errors import StoreContended

#: What becomes of a key: S is set, A appended to, D deleted, T loses as many first bytes as a `u32 little-endian` in
#: front of the operand says and has the rest of the operand put before what remains, N is set if the operand is newer
#: (see rows.py).
SET, APPEND, DELETE, TRIM, NEWER = "S", "A", "D", "T", "N"

#: Results of a NEWER: what was there stays, it was replaced, or only a reader of values can tell.
KEPT, REPLACED, UNDECIDED = 0, 1, 2

#: A change: what becomes of which key, with which operand.
Change = tuple[str, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Write:
    """Changes of keys that lie in one bucket, made together provided that every guard holds.

    `equal` pairs a key with the value it must have (None: it must be missing), `prefix` with what it must begin with.
    """

    equal: Sequence[tuple[bytes, bytes | None]]
    changes: Sequence[Change]
    prefix: Sequence[tuple[bytes, bytes]] = ()


class Backend(Protocol):
    """A place for keys and values.

    `together` says that writes given at once are applied all or none; without it each stands for itself. `one_place`
    says that the keys of one write may be of any bucket. Every method raises StoreError where the place does not
    answer.
    """

    @property
    def one_place(self) -> bool: ...

    @property
    def together(self) -> bool: ...

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of these keys in one round trip, None if missing. Keys of a bucket are seen at one moment."""
        ...

    async def get_async(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The same without holding up an event loop."""
        ...

    def apply(self, writes: Iterable[Write], once: bool = False) -> list[list[int] | None]:
        """Applies writes: for each None where a guard did not hold, else a result a change (the new length of what was
        appended to, KEPT, REPLACED or UNDECIDED for a NEWER, 0 otherwise). A key is NEWER once in a write.

        Where an answer is lost, writes are made again: their guards tell whether they were made before. `once` does
        not, for writes that a second time would do harm: then whoever gets the error cannot know if they were made.
        """
        ...

    def scan(self, *tails: bytes) -> Iterator[bytes]:
        """The keys whose tails start with any of these bytes, each at least once; looked for in one go."""
        ...

    def delete(self, keys: Iterator[bytes]) -> None:
        """Deletes keys, a bounded number at a time."""
        ...

    def exists(self) -> bool:
        """Whether there is anything to read; a place that was never written need not be made for that."""
        ...

    def close(self) -> None: ...


#: How often a writer reads again before it gives up: each failure means that another writer was let through.
ROUNDS = 1_000

Item = TypeVar("Item")


def settle(
    backend: Backend,
    items: Sequence[Item],
    keys: Callable[[Item], Sequence[bytes]],
    write: Callable[[Item, Sequence[bytes | None]], Write | None],
    what: str,
) -> list[list[int] | None]:
    """Reads, decides and writes for every item, and again for those whose guards did not hold.

    `keys` are read for an item in each round, `write` makes its write of their values (None: nothing to do). Returns
    the results by item, None where there was nothing to do. Raises StoreContended, with `what` was tried, if it never
    ends.
    """
    results: list[list[int] | None] = [None] * len(items)
    pending = list(range(len(items)))
    for _ in range(ROUNDS):
        wanted = [keys(items[i]) for i in pending]
        found = iter(backend.get([key for some in wanted for key in some]))
        writes = [write(items[i], [next(found) for _ in some]) for i, some in zip(pending, wanted, strict=True)]
        due = [(i, made) for i, made in zip(pending, writes, strict=True) if made is not None]
        outcomes = backend.apply([made for _, made in due])
        for (i, _), outcome in zip(due, outcomes, strict=True):
            results[i] = outcome
        pending = [i for (i, _), outcome in zip(due, outcomes, strict=True) if outcome is None]
        if not pending:
            return results
    raise StoreContended(what)
