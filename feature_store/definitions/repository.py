"""All definitions of one project, and what a request for features resolves to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from feature_store.definitions.erasure import values_in
from feature_store.definitions.source import Source
from feature_store.definitions.types import ValueType
from feature_store.definitions.view import (
    FeatureRef,
    Field,
    OnDemandView,
    PlainView,
    Service,
    StoredView,
    View,
    WindowedView,
    digest,
)
from feature_store.errors import ConfigError, DefinitionError, RequestError, UnknownName
from feature_store.files import replacing

FORMAT = 1


class Definitions(msgspec.Struct, frozen=True, kw_only=True):
    """A project's views and services as they stand in its registry.

    `stamp` is the registry's state they were read from; a reader that finds another stamp reads the registry again.
    """

    format: int = FORMAT
    project: str
    stamp: str
    views: dict[str, View]
    services: dict[str, Service]

    def view(self, name: str) -> View:
        if name not in self.views:
            raise UnknownName("feature view", name, list(self.views))
        return self.views[name]

    def stored_view(self, name: str) -> StoredView:
        """A view that has values of its own (plain or windowed); an on-demand view has none."""
        view = self.view(name)
        if isinstance(view, OnDemandView):
            stored = [v.name for v in self.views.values() if not isinstance(v, OnDemandView)]
            raise UnknownName("stored feature view", name, stored)
        return view

    def stored_views(self, names: Iterable[str] = ()) -> list[StoredView]:
        """The named stored views, or all of them."""
        wanted = list(names) or [n for n, v in self.views.items() if not isinstance(v, OnDemandView)]
        return [self.stored_view(name) for name in sorted(wanted)]

    def keyed_by(self, values: Mapping[str, str]) -> list[StoredView]:
        """The stored views that may hold records of an entity: those with all of its keys among their join keys, and
        of types that have its values (given as text, see `erasure.key_value`).

        Raises UnknownName for what is no view's join key; RequestError where no view has all the keys, or none of
        those that have them a key of such a value.
        """
        types = {key.name: key.type for view in self.stored_views() for key in view.keys}
        if unknown := [name for name in values if name not in types]:
            raise UnknownName("join key", unknown[0], list(types))
        named = ", ".join(values) or "keys"
        if not (views := [v for v in self.stored_views() if values and values.keys() <= {k.name for k in v.keys}]):
            keyed = sorted({f"({', '.join(k.name for k in v.keys)})" for v in self.stored_views() if v.keys})
            raise RequestError(named, f"are the join keys of no view; views are keyed by {', '.join(keyed) or 'none'}")
        if not (readable := [view for view in views if values_in(values, view.keys) is not None]):
            wanted = ", ".join(f"{name} is {types[name].feast_name}" for name in values)
            raise RequestError(named, f"is no value of its type: {wanted} (Bool is true or false, Bytes hex digits)")
        return readable

    def service(self, name: str) -> Service:
        if name not in self.services:
            raise UnknownName("feature service", name, list(self.services))
        return self.services[name]

    def resolve(self, features: str | Sequence[str] | Service, full_names: bool = False) -> Request:
        """What a service name, a service, or a list of `view:feature` references asks for."""
        if isinstance(features, str):
            features = self.service(features)
        if isinstance(features, Service):
            return self.request(features.features, full_names, features.name)
        return self.request([self._ref(text) for text in features], full_names)

    def request(self, refs: Sequence[FeatureRef], full_names: bool = False, service: str | None = None) -> Request:
        """A resolved request for these references, in their order."""
        for ref in refs:
            self.view(ref.view).feature_type(ref.feature)
        _check_names_apart(refs, full_names)
        return Request(definitions=self, refs=tuple(refs), full_names=full_names, service=service)

    def _ref(self, text: str) -> FeatureRef:
        view, colon, feature = text.partition(":")
        if not colon:
            raise UnknownName("feature reference of the form view:feature", text, [])
        return FeatureRef(view=view, feature=feature, shown_as=view)

    def sources(self) -> dict[str, Source]:
        """Every source that a stored view reads, by name."""
        return {v.source.name: v.source for v in self.stored_views()}

    def with_sources(self, paths: Mapping[str, str]) -> Definitions:
        """The same definitions, reading the named sources (and those that read them) from other paths.

        Raises UnknownName for a source that no view reads.
        """
        sources = self.sources()
        known = set(sources) | {s.reads for s in sources.values() if s.reads}
        for name in paths:
            if name not in known:
                raise UnknownName("file source", name, sorted(known))
        views = {name: _with_path(view, paths) for name, view in self.views.items()}
        return msgspec.structs.replace(self, views=views)

    def save(self, path: Path) -> None:
        """Writes the definitions as JSON; whoever reads meanwhile sees the old file or the new one, whole."""
        with replacing(path) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self, order="deterministic")))

    @classmethod
    def load(cls, path: Path) -> Definitions:
        """Reads a compiled definitions file; raises ConfigError when it is none, or of another format."""
        try:
            loaded = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path} is no compiled definitions file ({error}); run `feast apply` again.") from error
        if loaded.format != FORMAT:
            raise ConfigError(f"{path} has format {loaded.format}, this version reads {FORMAT}; run `feast apply`.")
        return loaded


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved request: which stored features to fetch and which on-demand views to run for `refs`, in order."""

    definitions: Definitions
    refs: tuple[FeatureRef, ...]
    full_names: bool = False
    service: str | None = None

    @property
    def on_demand(self) -> tuple[OnDemandView, ...]:
        """The on-demand views asked for, in order of first mention."""
        named = dict.fromkeys(ref.view for ref in self.refs)
        return tuple(v for v in map(self.definitions.view, named) if isinstance(v, OnDemandView))

    @property
    def stored(self) -> tuple[FeatureRef, ...]:
        """The stored features asked for, in order, then the inputs of on-demand views that nobody asked for."""
        asked = [r for r in self.refs if not isinstance(self.definitions.view(r.view), OnDemandView)]
        return tuple(dict.fromkeys([*asked, *(ref for view in self.on_demand for ref in view.inputs)]))

    def by_view(self) -> list[tuple[StoredView, list[FeatureRef]]]:
        """The stored features grouped by view, alias and key mapping, in order of first mention."""
        groups: dict[tuple, list[FeatureRef]] = {}
        for ref in self.stored:
            groups.setdefault((ref.view, ref.shown_as, ref.join_key_map), []).append(ref)
        return [(self.definitions.stored_view(key[0]), refs) for key, refs in groups.items()]

    @property
    def columns(self) -> list[str]:
        """The output columns, in the request's order."""
        return [ref.column(self.full_names) for ref in self.refs]

    def output_columns(self, inputs: bool = False) -> list[tuple[FeatureRef, str]]:
        """The requested features with their columns; with `inputs`, then the stored features that nobody asked for but
        on-demand views read.
        """
        columns = list(zip(self.refs, self.columns, strict=True))
        asked = set(self.refs) if inputs else set(self.stored)
        return columns + [(ref, ref.column(self.full_names)) for ref in self.stored if ref not in asked]

    def type_of(self, ref: FeatureRef) -> ValueType:
        return self.definitions.view(ref.view).feature_type(ref.feature)

    @property
    def keys(self) -> dict[str, ValueType]:
        """The entity columns that a request must carry, by name."""
        keys: dict[str, ValueType] = {}
        for view, refs in self.by_view():
            for key in view.keys:
                column = refs[0].key_column(key.name)
                if keys.setdefault(column, key.type) is not key.type:
                    raise DefinitionError(
                        view.name,
                        f"join key '{column}'",
                        f"is {key.type} here and {keys[column]} in another view of this request",
                        "give both entities the same value type",
                    )
        return keys

    @property
    def request_fields(self) -> dict[str, ValueType]:
        """The request-time values that on-demand views need, by name."""
        fields: dict[str, ValueType] = {}
        for view in self.on_demand:
            for field in view.request:
                if fields.setdefault(field.name, field.type) is not field.type:
                    raise DefinitionError(
                        view.name,
                        f"request field '{field.name}'",
                        f"is {field.type} here and {fields[field.name]} in another view of this request",
                        "give both the same type",
                    )
        return fields

    @property
    def fingerprint(self) -> str:
        """Identity of what is computed: the order of features and the definition of every view behind them."""
        views = {ref.view for ref in (*self.refs, *self.stored)}
        fingerprints = {name: self.definitions.view(name).fingerprint for name in sorted(views)}
        return digest([[(r.shown_as, r.feature) for r in self.refs], fingerprints])


def _check_names_apart(refs: Sequence[FeatureRef], full_names: bool) -> None:
    seen: set[str] = set()
    for ref in refs:
        column = ref.column(full_names)
        if column in seen:
            raise RequestError(column, "is the name of two requested features; ask with full feature names")
        seen.add(column)


def _with_path(view: View, paths: Mapping[str, str]) -> View:
    if isinstance(view, OnDemandView):
        return view
    source = view.source
    path = paths.get(source.name, paths.get(source.reads or "", source.path))
    moved = msgspec.structs.replace(source, path=path)
    if isinstance(view, PlainView):
        return msgspec.structs.replace(view, source=moved)
    return msgspec.structs.replace(view, source=moved)


__all__ = ["Definitions", "FeatureRef", "Field", "Request", "Service", "WindowedView"]
