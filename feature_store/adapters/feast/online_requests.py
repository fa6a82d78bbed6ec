"""What Feast's SDK asks of the online store, resolved once for many reads: features, entity columns, Feast's errors."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from feast import FeatureService, utils
from feast.errors import RequestDataNotFoundInEntityRowsException
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.Value_pb2 import RepeatedValue
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.repo_config import RepoConfig
from feast.type_map import feast_value_type_to_python_type

from feature_store.adapters.feast.registry import Registered, registered
from feature_store.adapters.feast.settings import erasures, online_store, root_of
from feature_store.definitions.erasure import LoadErasures
from feature_store.definitions.repository import Definitions, Request
from feature_store.definitions.types import ValueType
from feature_store.engines.duckdb.engine import DuckDBEngine
from feature_store.errors import IsochronError, NotExactOnline, RequestError
from feature_store.retrieval.online import OnlineFeatures, Prepared

#: Requests that a store remembers; one more, and it begins anew.
_REMEMBERED = 256

Features: TypeAlias = "list[str] | FeatureService"


class BadRequest(RequestError, ValueError):
    """A request's values cannot be used: a ValueError, as in Feast."""


@contextmanager
def _bad_requests() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise BadRequest(error.field, error.problem) from error


@dataclass(frozen=True, eq=False)
class Asked:
    """A request with all its resolution done. `history` opens the engine for times that the store no longer holds."""

    prepared: Prepared
    registered: Registered
    history: Callable[[], DuckDBEngine]

    def read(self, given: Mapping[str, Sequence[Any]], now: int) -> OnlineFeatures:
        """The answer as of now, also where it takes history."""
        with _bad_requests():
            try:
                return self.prepared.read(given, now)
            except NotExactOnline:
                return self._read_history(given, now)

    async def read_async(self, given: Mapping[str, Sequence[Any]], now: int) -> OnlineFeatures:
        """The same without holding up an event loop."""
        with _bad_requests():
            try:
                return await self.prepared.read_async(given, now)
            except NotExactOnline:
                return await asyncio.to_thread(self._read_history, given, now)

    def _read_history(self, given: Mapping[str, Sequence[Any]], now: int) -> OnlineFeatures:
        return replace(self.prepared, history=self.history()).read(given, now)

    def columns(self, rows: Any) -> Mapping[str, Sequence[Any]]:
        """The entity rows as columns that hold all that the request needs, as Feast takes them.

        Raises KeyError for a missing join key, RequestDataNotFoundInEntityRowsException for a missing request value,
        ValueError for columns of unequal length.
        """
        given = self._columnar(rows)
        if len({len(values) for values in given.values()}) > 1:
            raise ValueError("All entity rows must have the same columns.")
        if any(name not in given for name in self.prepared.keys):
            given = self._by_entity(given)
        if missing := [name for name in self.prepared.request_fields if name not in given]:
            raise RequestDataNotFoundInEntityRowsException(feature_names=missing)
        if missing := [name for name in self.prepared.keys if name not in given]:
            known = [name for name in given if self._is_entity(name)]
            raise KeyError(
                f"Missing join key values for keys: {missing}. No values provided for keys: {missing}. "
                f"Provided join_key_values: {known}"
            )
        texts = {
            name: [v if isinstance(v, str | NoneType) else str(v) for v in given[name]]
            for name, key_type in self.prepared.keys.items()
            if key_type is ValueType.STRING and not _are_texts(given[name])
        }
        return {**given, **texts} if texts else given

    def shown(self, given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The entity columns of an answer: whatever was given under the name of a join key, in the order it came in."""
        needed = self.prepared.request_fields
        return {name: list(values) for name, values in given.items() if name not in needed and self._is_entity(name)}

    def versions(self) -> dict[str, int]:
        """The name and the version in the registry of each stored view behind the answer."""
        versions = self.registered.versions
        return {refs[0].shown_as: versions[view.name] for view, refs in self.prepared.request.by_view()}

    def _is_entity(self, name: str) -> bool:
        return name in self.prepared.keys or name in self.registered.join_keys.values()

    def _columnar(self, rows: Any) -> Mapping[str, Sequence[Any]]:
        if isinstance(rows, Mapping):
            return {name: _plain_values(values) for name, values in rows.items()}
        if not rows:
            return {name: [] for name in (*self.prepared.keys, *self.prepared.request_fields)}
        names = list(rows[0])
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError("All entity_rows must have the same keys.")
        return {name: _plain_values([row[name] for row in rows]) for name in names}

    def _by_entity(self, given: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Columns named after an entity under the name of its join key: Feast still takes them."""
        wanted = {
            entity: key
            for entity, key in self.registered.join_keys.items()
            if entity in given and key not in given and key in self.prepared.keys and entity not in self.prepared.keys
        }
        if wanted:
            warnings.warn("Using entity name is deprecated. Use join_key instead.", stacklevel=2)
        return {wanted.get(name, name): values for name, values in given.items()}


class Requests:
    """The requests that were asked of one store, remembered while the registry, as Feast has it cached, stays as it is.

    `refuses` raises Feast's own error for a request that Feast itself would refuse.
    """

    def __init__(self, refuses: Callable[[BaseRegistry, str, Features, bool], None]) -> None:
        self._refuses = refuses
        self._known: _Known | None = None

    def find(
        self, config: RepoConfig, features: Features, registry: BaseRegistry, project: str, full_names: bool
    ) -> Asked:
        """What these features of a project mean now."""
        now = registered(registry, project)
        known = self._known
        if known is None or not known.holds(now, config):
            known = self._known = _Known(now, config, os.getpid(), {})
        key = (features.name if isinstance(features, FeatureService) else tuple(features), full_names)
        if (asked := known.asked.get(key)) is None:
            if len(known.asked) >= _REMEMBERED:
                known.asked.clear()
            asked = known.asked[key] = self._resolve(now, config, features, registry, full_names)
        return asked

    def _resolve(
        self, now: Registered, config: RepoConfig, features: Features, registry: BaseRegistry, full_names: bool
    ) -> Asked:
        if not features:
            raise ValueError("No features specified for retrieval")
        try:
            request = _request(now.definitions, features, full_names)
        except IsochronError:
            self._refuses(registry, now.definitions.project, features, full_names)
            raise
        for name in dict.fromkeys(ref.view for ref in request.refs):
            if name in now.switched_off:
                raise ValueError(
                    f"Feature view '{name}' is disabled and cannot serve features. "
                    f"Enable it with `feast feature-views enable {name}` or set enabled=True."
                )
        limit = getattr(config.offline_store, "memory_limit", None)
        history = partial(_history, root_of(config), limit, erasures(config), os.getpid())
        return Asked(Prepared(request, online_store(config)), now, history)


@dataclass(frozen=True, eq=False)
class _Known:
    """What was asked while registry, configuration and process were these."""

    registered: Registered
    config: RepoConfig
    process: int
    asked: dict[Any, Asked]

    def holds(self, registered: Registered, config: RepoConfig) -> bool:
        return self.registered is registered and self.config is config and self.process == os.getpid()


def _request(definitions: Definitions, features: Features, full_names: bool) -> Request:
    if isinstance(features, FeatureService):
        request = definitions.resolve(features.name, full_names)
    else:
        request = definitions.resolve([_newest(ref) for ref in features], full_names)
    _ = request.keys, request.request_fields
    return request


def _newest(ref: str) -> str:
    """A reference without `@latest`, which is what any reference means; with a number it stays, and is not found."""
    if "@" not in ref:
        return ref
    view, version, feature = utils._parse_feature_ref(ref)
    return f"{view}:{feature}" if version is None else ref


@lru_cache(maxsize=8)
def _history(root: Path, memory_limit: str | None, erasures: LoadErasures, process: int) -> DuckDBEngine:
    """The engine that answers times the store no longer holds, one a repository and process: opening it costs more
    than a read.
    """
    return DuckDBEngine(root, memory_limit, erasures)


def _plain_values(values: Any) -> list[Any]:
    if isinstance(values, RepeatedValue):
        values = values.val
    if isinstance(values, list) and ValueProto not in set(map(type, values)):
        return values
    return [feast_value_type_to_python_type(v) if isinstance(v, ValueProto) else v for v in values]


def _are_texts(values: Sequence[Any]) -> bool:
    return set(map(type, values)) <= {str, NoneType}
