"""The three kinds of feature view, frozen, as the engines see them."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from feature_store.definitions.aggregation import Aggregation, reach
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.errors import DefinitionError, UnknownName


class Field(msgspec.Struct, frozen=True):
    """A name and a type: a join key, a feature, a request-time input."""

    name: str
    type: ValueType


def digest(content: Any) -> str:
    """SHA-256 of a definition's canonical JSON, in hex: equal definitions have equal fingerprints everywhere."""
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


class PlainView(msgspec.Struct, frozen=True, kw_only=True, tag="plain"):
    """A Feast view without aggregations: the newest row at or before the asked time. `ttl` in microseconds, 0: none."""

    name: str
    keys: tuple[Field, ...]
    features: tuple[Field, ...]
    source: Source
    ttl: int = 0
    online: bool = True

    def feature_type(self, feature: str) -> ValueType:
        return _type_of(self.name, feature, (*self.features, *self.keys))

    @property
    def fingerprint(self) -> str:
        return digest(["plain", self.keys, self.features, self.source.identity(), self.ttl])


class WindowedView(msgspec.Struct, frozen=True, kw_only=True, tag="windowed"):
    """A Feast StreamFeatureView with aggregations: each feature is a function of the events in a sliding window."""

    name: str
    keys: tuple[Field, ...]
    aggregations: tuple[Aggregation, ...]
    source: Source
    online: bool = True

    def feature_type(self, feature: str) -> ValueType:
        return _type_of(self.name, feature, (*(Field(a.name, a.output) for a in self.aggregations), *self.keys))

    def aggregation(self, name: str) -> Aggregation:
        return next(a for a in self.aggregations if a.name == name)

    @property
    def columns(self) -> tuple[str, ...]:
        """The source columns (mapped names) that any aggregation folds, sorted; `*` is none."""
        return tuple(sorted({a.column for a in self.aggregations} - {"*"}))

    def column_types(self) -> dict[str, ValueType]:
        """What each aggregated column is read as: exact where a function returns its values, else what suffices.

        A column that is only counted is read as BOOL (present or not). A column whose distinct values are counted and
        whose type no function tells is not in the answer: it is read as its file has it (64 bits wide, if a number).
        Raises DefinitionError where two aggregations declare different types for one column.
        """
        types = {column: self._column_type(column) for column in self.columns}
        return {column: value_type for column, value_type in types.items() if value_type}

    def unfit(self, column: str, found: ValueType) -> Aggregation | None:
        """The first aggregation over a column that is not defined on the type its file turned out to have."""
        return next((a for a in self.aggregations if a.column == column and not a.function.accepts(found)), None)

    def _column_type(self, column: str) -> ValueType | None:
        here = [a for a in self.aggregations if a.column == column]
        returned = {t for a in here if a.function.kind != "sum" and (t := a.function.column_of(a.output))}
        summed = {a.output for a in here if a.function.kind == "sum"}
        if column in {key.name for key in self.keys}:
            raise DefinitionError(self.name, f"column '{column}'", "is a join key", "count events with column='*'")
        agree = len(returned) <= 1 and len(summed) <= 1
        if agree and returned and summed:
            agree = next(iter(returned)).is_integer == next(iter(summed)).is_integer
        if not agree:
            raise DefinitionError(
                self.name,
                f"column '{column}'",
                f"is declared with different types ({', '.join(sorted(t.feast_name for t in returned | summed))})",
                "declare the type of the column itself in every feature that returns it, Int64 or Float64 for its sum",
            )
        if returned or summed:
            # Doubles hold every float and every int32, so a column is folded in the wide type and narrowed at the end.
            return next(iter(returned or summed)).widened
        if any(a.function.kind in ("count_distinct", "approx_count_distinct") for a in here):
            return None
        folded = any(a.function.kind in ("mean", "var", "std", "approx_quantile_p") for a in here)
        return ValueType.FLOAT64 if folded else ValueType.BOOL

    def reach(self, time: int) -> int | None:
        """Start of the oldest window that ends before `time`; None where one has no window."""
        return reach(self.aggregations, time)

    @property
    def fingerprint(self) -> str:
        return digest(["windowed", self.keys, self.aggregations, self.source.identity()])


class FeatureRef(msgspec.Struct, frozen=True, kw_only=True):
    """One requested feature: `shown_as` is the view's name in the request (its alias, if it has one).

    `join_key_map` pairs a view's join key with the column of the request that carries it.
    """

    view: str
    feature: str
    shown_as: str
    join_key_map: tuple[tuple[str, str], ...] = ()

    def key_column(self, key: str) -> str:
        return dict(self.join_key_map).get(key, key)

    def column(self, full_names: bool) -> str:
        """The output column: Feast writes `view__feature` for full names."""
        return f"{self.shown_as}__{self.feature}" if full_names else self.feature


class OnDemandView(msgspec.Struct, frozen=True, kw_only=True, tag="on_demand"):
    """A Feast on-demand view: a row-wise function of features and of values that the request carries.

    `body` is Feast's dill bytes of the function and loads only in the Python minor version `python` that wrote it.
    """

    name: str
    mode: str
    inputs: tuple[FeatureRef, ...]
    request: tuple[Field, ...]
    features: tuple[Field, ...]
    body: bytes
    text: str
    python: str

    def feature_type(self, feature: str) -> ValueType:
        return _type_of(self.name, feature, self.features)

    @property
    def fingerprint(self) -> str:
        inputs = sorted((ref.view, ref.feature) for ref in self.inputs)
        return digest(["on_demand", self.mode, inputs, self.request, self.features, self.text])


StoredView = PlainView | WindowedView
View = PlainView | WindowedView | OnDemandView


class Service(msgspec.Struct, frozen=True):
    """A named list of features, in the order every response keeps."""

    name: str
    features: tuple[FeatureRef, ...]


def _type_of(view: str, feature: str, fields: tuple[Field, ...]) -> ValueType:
    for field in fields:
        if field.name == feature:
            return field.type
    raise UnknownName(f"feature of view '{view}'", feature, [f.name for f in fields])
