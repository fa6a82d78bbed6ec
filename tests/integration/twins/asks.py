"""Random requests over random definitions, and where each column of their answers comes from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.integration.twins.answers import Ask
from tests.integration.twins.definitions import MUCH, REQUEST, Definitions, OnDemand, Service, Shown
from tests.integration.twins.rows import Key

_AMOUNTS = (0.0, 1.5, -2.25, MUCH)
_TEXTS = ("a", "é😀", "two words")


@dataclass(frozen=True)
class Asked:
    """A request, its stored columns (from which view, as shown, which feature) and its computed ones (which output)."""

    ask: Ask
    stored: Mapping[str, tuple[Shown, str]]
    computed: Mapping[str, tuple[OnDemand, int]]

    @property
    def columns(self) -> list[str]:
        """The answer's columns in the order they are due in."""
        return [*self.ask.entities.keys() - {c.name for c in REQUEST}, *self.stored, *self.computed]

    def key(self, shown: Shown, row: int) -> Key:
        """The entity of a row in a view."""
        return tuple(self.ask.entities[shown.key_column(k.name)][row] for k in shown.view.keys)

    def confused(self, shown: Shown, row: int) -> bool:
        """Whether Feast reads another entity: of two columns that mean one join key it takes the later one."""
        meant = {alias: key for key, alias in shown.renamed.items()}
        given = {meant.get(name, name): values[row] for name, values in self.ask.entities.items()}
        return tuple(given[k.name] for k in shown.view.keys) != self.key(shown, row)

    @property
    def lost_by_feast(self) -> set[str]:
        """Columns that are not in Feast's answer: with full names it loses what functions in Python mode return."""
        return {name for name, (view, _) in self.computed.items() if self.ask.full_names and view.mode == "python"}

    @property
    def feast_fails(self) -> bool:
        """Whether Feast's on-demand views lose an input: without full names it takes features of other views from them
        by name alone, also where the view's own input has that name.
        """
        shown = {(one.name, feature) for one, feature in self.stored.values()}
        views = {view for view, _ in self.computed.values()}
        read = {(view.view.name, column.name) for view in views for column in view.inputs}
        others = shown | read
        return not self.ask.full_names and any(
            name == other and view != source for view, name in read for source, other in others
        )


def random_asks(rng: random.Random, definitions: Definitions, keys: Mapping[str, Sequence[Key]]) -> list[Asked]:
    """Every service, every view, and lists of references to some views and on-demand views; of few rows and of many."""
    made = [_service(rng, service, keys) for service in definitions.services]
    for view in definitions.views:
        made.append(_asked(rng, None, [Shown(view, tuple(f.name for f in view.features))], [], keys))
    for _ in range(10):
        views = rng.sample(definitions.views, rng.choice([1, 1, 2, 3]))
        shown = [Shown(v, tuple(f.name for f in v.features if rng.random() < 0.7)) for v in views]
        on_demand = rng.sample(definitions.on_demand, rng.choice([0, 0, 1, 2]))
        made.append(_asked(rng, None, [s for s in shown if s.features], on_demand, keys))
    return [asked for asked in made if asked is not None]


def _service(rng: random.Random, service: Service, keys: Mapping[str, Sequence[Key]]) -> Asked | None:
    return _asked(rng, service.name, service.shown, service.on_demand, keys)


def _asked(
    rng: random.Random,
    service: str | None,
    shown: Sequence[Shown],
    on_demand: Sequence[OnDemand],
    keys: Mapping[str, Sequence[Key]],
) -> Asked | None:
    features = [f for s in shown for f in s.features]
    full = len(set(features)) < len(features) or rng.random() < 0.4
    stored = {f"{s.name}__{f}" if full else f: (s, f) for s in shown for f in s.features}
    computed = {f"{v.name}__{o}" if full else o: (v, i) for v in on_demand for i, o in enumerate(v.outputs)}
    rows = [_entity(rng, shown, on_demand, keys) for _ in range(rng.choice([1, 2, 9, 30]))]
    if not rows[0]:  # Feast wants a column, also where views have no entity
        return None
    columns = rng.sample(list(rows[0]), len(rows[0]))
    references = [f"{s.name}:{f}" for s in shown for f in s.features]
    references += [f"{v.name}:{o}" for v in on_demand for o in v.outputs]
    ask = Ask(service or references, {name: [row[name] for row in rows] for name in columns}, full)
    return Asked(ask, stored, computed)


def _entity(
    rng: random.Random, shown: Sequence[Shown], on_demand: Sequence[OnDemand], keys: Mapping[str, Sequence[Key]]
) -> dict[str, Any]:
    """One row: the keys of one view are those of an entity of its own, the others' as far as they are free."""
    row: dict[str, Any] = {}
    sources = [Shown(v.view, ()) for v in on_demand]
    for one in rng.sample([*shown, *sources], len(shown) + len(sources)):
        for column, value in zip(one.view.keys, rng.choice(keys[one.view.name]), strict=True):
            row.setdefault(one.key_column(column.name), value)
    if on_demand:
        row |= {REQUEST[0].name: rng.choice(_AMOUNTS), REQUEST[1].name: rng.choice(_TEXTS)}
    return row


def inputs_of(asked: Asked, view: OnDemand) -> Ask:
    """The request for what an on-demand view reads, of the same rows."""
    names = {key.name for key in view.view.keys}
    entities = {name: values for name, values in asked.ask.entities.items() if name in names}
    return Ask([f"{view.view.name}:{column.name}" for column in view.inputs], entities or asked.ask.entities, False)
