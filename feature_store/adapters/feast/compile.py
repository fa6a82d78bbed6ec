"""From Feast objects to frozen definitions, with every check that the contract makes at apply."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import feast.types
from feast import FeatureService, FeatureView, FileSource, OnDemandFeatureView, PushSource, StreamFeatureView
from feast.data_source import DataSource
from feast.feature_view_projection import FeatureViewProjection
from feast.infra.registry import proto_registry_utils as listing
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto

from feature_store.definitions.aggregation import HISTORY_ONLY, Aggregation, Function, hop_problem, resolve_hop
from feature_store.definitions.repository import Definitions
from feature_store.definitions.source import Source
from feature_store.definitions.types import KEY_TYPES, ValueType
from feature_store.definitions.view import FeatureRef, Field, OnDemandView, PlainView, Service, StoredView, WindowedView
from feature_store.errors import DefinitionError
from feature_store.timestamps import parse_duration

DUMMY_KEY = "__dummy_id"

#: What a source's tags can say to us; any other `isochron.` tag is a typing mistake.
DELAY_TAG = "isochron.delay"
READS_TAG = "isochron.reads"

_MICROSECOND = timedelta(microseconds=1)
_BY_FEAST_NAME = {t.feast_name: t for t in ValueType}


@contextmanager
def without_feasts_warnings() -> Iterator[None]:
    """Feast warns that stream views are alpha on every object it builds; what it warns of is what we replace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def compile_registry(proto: RegistryProto, project: str, stamp: str) -> Definitions:
    """Every definition of a project in Feast's registry. Raises DefinitionError for what the contract refuses."""
    with without_feasts_warnings():
        feature_views = listing.list_feature_views(proto, project, None)
        stream_views = listing.list_stream_feature_views(proto, project, None)
        on_demand_views = listing.list_on_demand_feature_views(proto, project, None)
    stored = [compile_view(view) for view in (*feature_views, *stream_views)]
    on_demand = [compile_on_demand(view) for view in on_demand_views]
    services = [compile_service(service) for service in listing.list_feature_services(proto, project, None)]
    return Definitions(
        project=project,
        stamp=stamp,
        views={v.name: v for v in sorted([*stored, *on_demand], key=lambda v: v.name)},
        services={s.name: s for s in sorted(services, key=lambda s: s.name)},
    )


def compile_view(view: FeatureView) -> StoredView:
    """A Feast FeatureView or StreamFeatureView as a frozen view; DefinitionError where it breaks the contract."""
    if isinstance(view, StreamFeatureView) and view.aggregations:
        return _windowed(view)
    if isinstance(view, StreamFeatureView) and view.udf is not None:
        raise DefinitionError(
            view.name, "udf", "a transformation on a stream view is not computed yet", "transform in the source"
        )
    keys = _keys(view)
    features = tuple(sorted((_feature(view, f) for f in _features(view)), key=lambda f: f.name))
    _check_apart(view.name, [f.name for f in (*keys, *features)])
    for feature in features:
        if feature.type is ValueType.TIMESTAMP_LIST:
            raise DefinitionError(
                view.name, f"feature '{feature.name}'", "a list of times cannot be stored yet", "store them as Int64"
            )
    return PlainView(
        name=view.name,
        keys=keys,
        features=features,
        source=_source(view),
        ttl=(view.ttl or timedelta(0)) // _MICROSECOND,
        online=view.online,
    )


def _windowed(view: StreamFeatureView) -> WindowedView:
    if view.udf is not None:
        raise DefinitionError(
            view.name, "udf", "a transformation on a windowed view is not computed yet", "transform in the source"
        )
    if view.ttl and view.ttl > timedelta(0):
        raise DefinitionError(
            view.name, "ttl", f"is {view.ttl}, but a windowed view ends with its windows", "leave ttl out"
        )
    source = _source(view)
    _check_time_columns(view, source)
    keys = _keys(view)
    schema = {f.name: f for f in _features(view)}
    aggregations = tuple(sorted((_aggregation(view, a, schema) for a in view.aggregations), key=lambda a: a.name))
    _check_names(view, aggregations, schema)
    windowed = WindowedView(name=view.name, keys=keys, aggregations=aggregations, source=source, online=view.online)
    windowed.column_types()
    _check_apart(view.name, [*(k.name for k in keys), *windowed.columns])
    _check_apart(view.name, [*(k.name for k in keys), *(a.name for a in aggregations)])
    return windowed


def _check_apart(view: str, names: list[str]) -> None:
    """SQL engines do not tell names apart by case alone, so one view may not have two such names; those that begin
    with two underscores are the engines' own.
    """
    for i, name in enumerate(names):
        if name.startswith("__"):
            raise DefinitionError(view, f"'{name}'", "begins with two underscores, as the engines' own do", "rename it")
        if name.lower() in {other.lower() for other in names[:i]}:
            raise DefinitionError(view, f"'{name}'", "is another name of this view but for its case", "rename one")


def _aggregation(view: StreamFeatureView, declared: Any, schema: dict[str, Any]) -> Aggregation:
    name = declared.resolved_name(declared.time_window)
    subject = f"aggregation '{name}'"
    try:
        function = Function.parse(declared.function)
    except ValueError as error:
        raise DefinitionError(view.name, subject, str(error), f"use one of {', '.join(Function.names())}") from error
    if view.online and function.kind in HISTORY_ONLY:
        raise DefinitionError(
            view.name,
            subject,
            f"'{declared.function}' is not kept by the online store yet, only computed in history",
            "declare it in a view of its own with online=False",
        )
    if not declared.column or (declared.column == "*" and function.kind != "count"):
        raise DefinitionError(view.name, subject, f"{function.kind} needs a column", "name the column it folds")
    window = (declared.time_window or timedelta(0)) // _MICROSECOND
    hop = resolve_hop(window, (declared.slide_interval or timedelta(0)) // _MICROSECOND, _tiling_hop(view))
    if problem := hop_problem(window, hop, view.online):
        raise DefinitionError(view.name, subject, *problem)
    if name not in schema:
        raise DefinitionError(
            view.name, subject, "is not in the schema", f"add Field(name='{name}', ...) or name the aggregation"
        )
    output = _type(view.name, schema[name])
    _check_output(view, subject, function, output)
    return Aggregation(name=name, function=function, column=declared.column, window=window, hop=hop, output=output)


def _check_output(view: StreamFeatureView, subject: str, function: Function, output: ValueType) -> None:
    column = function.column_of(output)
    fits = (
        function.output(ValueType.FLOAT64) is output
        if column is None
        else (not column.is_list and function.accepts(column) and function.output(column) is output)
    )
    if not fits:
        raise DefinitionError(
            view.name,
            subject,
            f"{function.kind} does not give {output.feast_name}",
            f"declare it as {_meant_output(function)}",
        )


def _meant_output(function: Function) -> str:
    """What a function's output can be declared as, in words."""
    if function.kind == "sum":
        return "Int64 or Float64"
    if function.output(ValueType.STRING) is ValueType.STRING_LIST:
        return "Array(<the column's type>)"
    if function.column_of(ValueType.STRING) is None:
        return function.output(ValueType.FLOAT64).feast_name
    return "the column's own type"


def _check_names(view: StreamFeatureView, aggregations: tuple[Aggregation, ...], schema: dict[str, Any]) -> None:
    names = [a.name for a in aggregations]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise DefinitionError(
            view.name,
            f"aggregation '{doubled[0]}'",
            "is the name of two aggregations (names cut windows to whole seconds)",
            "give each its own name=",
        )
    if others := sorted(set(schema) - set(names)):
        raise DefinitionError(
            view.name,
            f"feature '{others[0]}'",
            "is in the schema but is no aggregation's name",
            f"the schema must list exactly: {', '.join(sorted(names))}",
        )


def _tiling_hop(view: StreamFeatureView) -> int | None:
    """The view's own hop where tiling is on. Tiling without a hop means 5 minutes to Feast, but is stored as none."""
    if not view.enable_tiling:
        return None
    return (view.tiling_hop_size or timedelta(minutes=5)) // _MICROSECOND


def _check_time_columns(view: StreamFeatureView, source: Source) -> None:
    """A stream view has two time columns, its own and its source's; nothing in Feast compares them."""
    own = source.physical(view.timestamp_field)
    if view.timestamp_field and own != source.timestamp_field:
        raise DefinitionError(
            view.name,
            "timestamp_field",
            f"is '{view.timestamp_field}' but its source's is '{source.timestamp_field}'",
            "name the same column in both",
        )


def _features(view: FeatureView) -> list[Any]:
    return [f for f in view.features if f.name != DUMMY_KEY and f.name not in set(view.join_keys)]


def _keys(view: FeatureView) -> tuple[Field, ...]:
    """The view's join keys by name: Feast's own order is not stable."""
    columns = [column for column in view.entity_columns if column.name != DUMMY_KEY]
    return tuple(sorted((_key(view.name, column) for column in columns), key=lambda k: k.name))


def _key(view: str, column: Any) -> Field:
    key_type = _type(view, column)
    if key_type not in KEY_TYPES:
        raise DefinitionError(
            view,
            f"join key '{column.name}'",
            f"a key of type {key_type.feast_name} has no exact equality",
            "use a string",
        )
    return Field(column.name, key_type)


def _feature(view: FeatureView, field: Any) -> Field:
    return Field(field.name, _type(view.name, field))


def _type(view: str, field: Any) -> ValueType:
    dtype = field.dtype
    is_array = isinstance(dtype, feast.types.Array)
    name = f"Array({_feast_name(dtype.base_type)})" if is_array else _feast_name(dtype)
    if name not in _BY_FEAST_NAME:
        raise DefinitionError(
            view,
            f"feature '{field.name}'",
            f"type {name} cannot be stored yet",
            f"use one of {', '.join(t.feast_name for t in ValueType if not t.is_list)} or an Array of them",
        )
    return _BY_FEAST_NAME[name]


def _feast_name(dtype: Any) -> str:
    for name in ("Bool", "Int32", "Int64", "Float32", "Float64", "String", "Bytes", "UnixTimestamp"):
        if dtype == getattr(feast.types, name):
            return name
    return str(dtype)


def _source(view: FeatureView) -> Source:
    batch, push = view.batch_source, None
    stream = view.stream_source
    if isinstance(stream, PushSource):
        push = stream.name
    elif isinstance(view, StreamFeatureView) and stream is not None:
        raise DefinitionError(
            view.name,
            f"source '{stream.name}'",
            f"a {type(stream).__name__} is not read yet",
            "use a PushSource over a FileSource",
        )
    if isinstance(batch, PushSource):
        push, batch = batch.name, batch.batch_source
    return _file_source(view.name, batch, push)


def _file_source(view: str, source: DataSource | None, push: str | None) -> Source:
    if not isinstance(source, FileSource):
        kind = type(source).__name__ if source is not None else "nothing"
        raise DefinitionError(view, "source", f"its batch source is {kind}", "use a FileSource of Parquet files")
    subject = f"source '{source.name}'"
    if not source.timestamp_field:
        raise DefinitionError(view, subject, "names no timestamp_field", "name its event-time column")
    if unknown := sorted(t for t in source.tags if t.startswith("isochron.") and t not in (DELAY_TAG, READS_TAG)):
        raise DefinitionError(view, subject, f"tag '{unknown[0]}' means nothing", f"use {DELAY_TAG} or {READS_TAG}")
    try:
        delay = parse_duration(source.tags[DELAY_TAG]) if DELAY_TAG in source.tags else 0
    except ValueError as error:
        raise DefinitionError(view, subject, f"tag {DELAY_TAG}: {error}", "write it like 7d") from error
    mapping = dict(source.field_mapping or {})
    if len(set(mapping.values())) < len(mapping):
        raise DefinitionError(view, subject, "field_mapping gives two columns one name", "give each a name of its own")
    described = Source(
        name=source.name,
        path=source.path,
        timestamp_field=source.timestamp_field,
        created_field=source.created_timestamp_column or None,
        field_mapping=mapping,
        delay=delay,
        reads=source.tags.get(READS_TAG),
        push_source=push,
    )
    return Source(
        **{
            **{f: getattr(described, f) for f in described.__struct_fields__},
            "timestamp_field": described.physical(described.timestamp_field),
            "created_field": described.physical(described.created_field) if described.created_field else None,
        }
    )


def compile_on_demand(view: OnDemandFeatureView) -> OnDemandView:
    """A Feast on-demand view as a frozen one; raises DefinitionError for modes that are not run yet."""
    if view.mode not in ("python", "pandas"):
        raise DefinitionError(view.name, "mode", f"'{view.mode}' is not run", "use mode='python' or mode='pandas'")
    if view.singleton or view.write_to_online_store or getattr(view, "aggregations", None):
        raise DefinitionError(
            view.name,
            "",
            "singleton, write_to_online_store and aggregations are not supported on an on-demand view yet",
            "leave them out",
        )
    proto = view.feature_transformation.to_proto()
    return OnDemandView(
        name=view.name,
        mode=view.mode,
        inputs=tuple(
            sorted(
                (r for p in view.source_feature_view_projections.values() for r in _refs(p)),
                key=lambda r: (r.shown_as, r.feature),
            )
        ),
        request=tuple(
            sorted(
                {Field(f.name, _type(view.name, f)) for s in view.source_request_sources.values() for f in s.schema},
                key=lambda f: f.name,
            )
        ),
        features=tuple(sorted((_feature(view, f) for f in view.features), key=lambda f: f.name)),
        body=proto.body,
        text=proto.body_text,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )


def compile_service(service: FeatureService) -> Service:
    """A Feast feature service as a frozen one, its features in their declared order."""
    return Service(service.name, tuple(r for p in service.feature_view_projections for r in _refs(p)))


def _refs(projection: FeatureViewProjection) -> Iterable[FeatureRef]:
    for field in projection.features:
        yield FeatureRef(
            view=projection.name,
            feature=field.name,
            shown_as=projection.name_to_use(),
            join_key_map=tuple(sorted(projection.join_key_map.items())),
        )
