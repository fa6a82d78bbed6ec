"""Random Feast definitions of all that a plain view can be, and the text of the file that declares them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feature_store.definitions.types import ValueType

TYPES = tuple(t for t in ValueType if t is not ValueType.TIMESTAMP_LIST)
#: What Feast's Redis store takes as a join key. (It takes no booleans.)
KEY_TYPES = (ValueType.INT64, ValueType.INT32, ValueType.STRING, ValueType.BYTES)
NUMBERS = (ValueType.INT32, ValueType.INT64, ValueType.FLOAT32, ValueType.FLOAT64)


@dataclass(frozen=True)
class Column:
    name: str
    type: ValueType


#: One entity each, of two types that are common and two that are not.
KEYS = (*(Column(f"k_{t.value}", t) for t in KEY_TYPES), Column("k_user", ValueType.INT64))
#: What on-demand views read from the request.
MUCH = 1e300
REQUEST = (Column("r_amount", ValueType.FLOAT64), Column("r_text", ValueType.STRING))


@dataclass(frozen=True)
class View:
    """A plain view. `ttl` in hours, 0 for none; `filling` is how its rows come in: write, push or materialize; `stream`
    declares it as a StreamFeatureView (of a pushed view).
    """

    name: str
    keys: tuple[Column, ...]
    features: tuple[Column, ...]
    ttl: int
    filling: str
    created: bool
    stream: bool = False

    @property
    def columns(self) -> dict[str, ValueType]:
        return {column.name: column.type for column in (*self.keys, *self.features)}


@dataclass(frozen=True)
class OnDemand:
    """A view computed from numbers of one view and from the request: their sum, and a text. In Python mode the sum of
    an amount of `MUCH` is NaN.
    """

    name: str
    mode: str
    view: View
    inputs: tuple[Column, ...]

    @property
    def outputs(self) -> tuple[str, str]:
        return f"{self.name}_sum", f"{self.name}_text"


@dataclass(frozen=True)
class Shown:
    """A view in a service: under another name perhaps, some of its features, read by other entity columns."""

    view: View
    features: tuple[str, ...]
    alias: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.alias or self.view.name

    def key_column(self, key: str) -> str:
        return self.renamed.get(key, key)


@dataclass(frozen=True)
class Service:
    name: str
    shown: tuple[Shown, ...]
    on_demand: tuple[OnDemand, ...]


#: The same in every repository: for requests that are written by hand, and for those without an entity.
USER, TEXT = KEYS[-1], KEYS[2]
ONE = View("one", (USER,), (Column("x", ValueType.FLOAT64), Column("n", ValueType.INT64)), 0, "push", True)
PAIR = View("pair", (TEXT, USER), (Column("y", ValueType.FLOAT64),), 24, "write", True)
FILED = View(
    "filed",
    (USER,),
    (
        Column("real", ValueType.FLOAT64),
        Column("whole", ValueType.INT64),
        Column("when", ValueType.TIMESTAMP),
        Column("texts", ValueType.STRING_LIST),
        Column("reals", ValueType.FLOAT64_LIST),
    ),
    0,
    "materialize",
    True,
)
EVERYBODY = View("everybody", (), (Column("e", ValueType.INT64), Column("s", ValueType.STRING)), 0, "write", True)
AT_ONCE = OnDemand("at_once", "python", ONE, ONE.features)


#: One view read by two columns of a request. (Under its own name and another one Feast fails.)
BOTH = Service(
    "both", (Shown(ONE, ("x", "n"), "one_user"), Shown(ONE, ("x",), "other_one", {USER.name: "other_user"})), ()
)


@dataclass(frozen=True)
class Definitions:
    views: tuple[View, ...]
    on_demand: tuple[OnDemand, ...]
    services: tuple[Service, ...]


def random_definitions(rng: random.Random) -> Definitions:
    """Some views of every filling, with and without ttl and created time; every type occurs."""
    fillings = ["write", "push", "materialize"] * 3
    types = [rng.sample(TYPES, len(TYPES)) for _ in range(3)]
    dealt = [t for some in types for t in some]
    views = [_view(rng, number, filling, dealt[number::9]) for number, filling in enumerate(fillings)]
    views += [ONE, PAIR, FILED, EVERYBODY]
    on_demand = [_on_demand(rng, f"od{n}", mode, views) for n, mode in enumerate(("python", "pandas"))]
    on_demand.append(AT_ONCE)
    services = [BOTH, *(_service(rng, f"service_{n}", views, on_demand) for n in range(6))]
    return Definitions(tuple(views), tuple(on_demand), tuple(services))


def _view(rng: random.Random, number: int, filling: str, types: Sequence[ValueType]) -> View:
    keys = rng.sample(KEYS, rng.choice([1, 1, 2, 3]))
    names = rng.sample("abcdefghijklmnopqrstuvwxyz", len(types) + 1)
    own = [*types, rng.choice(NUMBERS)]
    features = [Column(f"{letter}{rng.choice(['', number])}", t) for letter, t in zip(names, own, strict=True)]
    ttl, created, stream = rng.choice([0, 0, 1, 24]), rng.random() < 0.7, filling == "push" and rng.random() < 0.5
    return View(f"view_{number}", tuple(keys), tuple(features), ttl, filling, created, stream)


def _on_demand(rng: random.Random, name: str, mode: str, views: Sequence[View]) -> OnDemand:
    view = rng.choice([v for v in views if any(f.type in NUMBERS for f in v.features)])
    numbers = [f for f in view.features if f.type in NUMBERS]
    return OnDemand(name, mode, view, tuple(numbers[:2]))


def _service(rng: random.Random, name: str, views: Sequence[View], on_demand: Sequence[OnDemand]) -> Service:
    shown = []
    for view in rng.sample(views, rng.choice([1, 2, 3])):
        features = rng.sample(view.features, rng.randint(1, len(view.features)))
        alias = f"{name}_{view.name}" if rng.random() < 0.6 else None
        renamed = {k.name: f"other_{k.name}" for k in view.keys if rng.random() < 0.5} if alias else {}
        shown.append(Shown(view, tuple(f.name for f in features), alias, renamed))
    return Service(name, tuple(shown), tuple(rng.sample(on_demand, rng.choice([0, 0, 1]))))


# -- the file -----------------------------------------------------------------------------------------------------

_HEAD = """
from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, StreamFeatureView
from feast import ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
"""


def text_of(definitions: Definitions, data: Path) -> str:
    """The file that declares them; each view's source is `<view>.parquet` in a folder."""
    parts = [_HEAD]
    parts += [
        f"{key.name} = Entity(name='entity_{key.name}', join_keys=['{key.name}'], value_type=ValueType.{key.type.name})"
        for key in KEYS
    ]
    parts += [_view_text(view, data) for view in definitions.views]
    parts.append(f"asked = RequestSource(name='asked', schema=[{_fields(REQUEST)}])")
    parts += [_on_demand_text(view) for view in definitions.on_demand]
    parts += [_service_text(service) for service in definitions.services]
    parts.append("switched_off = FeatureView(name='switched_off', entities=[k_user], source=one_rows, enabled=False, ")
    parts[-1] += "schema=[Field(name='x', dtype=Float64)])"
    return "\n\n".join(parts) + "\n"


def _fields(columns: Sequence[Column]) -> str:
    return ", ".join(f"Field(name='{c.name}', dtype={c.type.feast_name})" for c in columns)


def _view_text(view: View, data: Path) -> str:
    created = "created_timestamp_column='created', " if view.created else ""
    source = (
        f"{view.name}_rows = FileSource(name='{view.name}_rows', path='{data / view.name}.parquet', "
        f"timestamp_field='event_timestamp', {created})"
    )
    kind, used, more = "FeatureView", f"{view.name}_rows", ""
    if view.filling == "push":
        used = f"PushSource(name='{view.name}_pushed', batch_source={used})"
    if view.stream:
        kind, more = "StreamFeatureView", ", timestamp_field='event_timestamp'"
    return (
        f"{source}\n{view.name} = {kind}(name='{view.name}', entities=[{', '.join(k.name for k in view.keys)}], "
        f"source={used}, ttl=timedelta(hours={view.ttl}), schema=[{_fields((*view.keys, *view.features))}]{more})"
    )


def _on_demand_text(view: OnDemand) -> str:
    names = [column.name for column in view.inputs]
    total, text = view.outputs
    body = {
        "python": f"""
    rows = zip(*(inputs[name] for name in {[*names, "r_amount"]}))
    total = [None if None in v else float("nan") if v[-1] == {MUCH} else float(sum(v)) for v in rows]
    return {{"{total}": total, "{text}": [None if t is None else t + "!" for t in inputs["r_text"]]}}""",
        "pandas": f"""
    made = pd.DataFrame()
    made["{total}"] = sum((inputs[name].astype("float64") for name in {names}), inputs["r_amount"].astype("float64"))
    made["{text}"] = inputs["r_text"] + "!"
    return made""",
    }[view.mode]
    subset = f"{view.view.name}[{names}]"
    return (
        f"@on_demand_feature_view(sources=[{subset}, asked], mode='{view.mode}', "
        f"schema=[Field(name='{total}', dtype=Float64), Field(name='{text}', dtype=String)])\n"
        f"def {view.name}(inputs):{body}"
    )


def _service_text(service: Service) -> str:
    features = []
    for shown in service.shown:
        text = f"{shown.view.name}[{list(shown.features)}]"
        if shown.alias:
            text += f".with_name('{shown.alias}')"
        if shown.renamed:
            text += f".with_join_key_map({dict(shown.renamed)})"
        features.append(text)
    features += [view.name for view in service.on_demand]
    return f"{service.name} = FeatureService(name='{service.name}', features=[{', '.join(features)}])"
