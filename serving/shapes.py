"""The shapes of requests for features: what is resolved once for all requests that ask for the same features."""

from __future__ import annotations

import asyncio
from functools import cached_property, lru_cache
from typing import Any

from feature_store.clock import Clock
from feature_store.errors import UnknownName
from feature_store.layer import FeatureLayer
from feature_store.retrieval.online import Prepared
from serving.current import Served
from serving.encodings import Layout, Rows
from serving.feature_requests import FeaturesRequest, Limits, bytes_columns, references, times_of, with_bytes
from serving.gathering import Entities, Gathering

#: Reads of more rows are made and written in a thread: on the event loop they would hold up all others for long.
LARGE = 1_000

#: How many shapes are kept.
_KEPT = 512


class Shapes:
    """The shapes under one state of the definitions, `served`; those asked for last are kept."""

    def __init__(self, served: Served, layer: FeatureLayer, clock: Clock) -> None:
        self.served, self._layer, self._clock = served, layer, clock
        self._of = lru_cache(maxsize=_KEPT)(self._made)

    def of(self, request: FeaturesRequest) -> Shape:
        """The shape of a request. Raises UnknownName, RequestError, DefinitionError."""
        return self._of(request.asked, request.full_feature_names)

    def _made(self, asked: str | bytes, full_names: bool) -> Shape:
        features = asked if isinstance(asked, str) else references(asked)
        try:
            request = self.served.definitions.resolve(features, full_names)
        except UnknownName:
            if not self.served.waiting:
                raise
            # What only the new definitions have is not unknown, but not ready.
            request = self.served.applied.resolve(features, full_names)
        return Shape(Prepared(request, self._layer.store), self._clock, self._join_keys)

    @cached_property
    def _join_keys(self) -> frozenset[str]:
        """The names of all join keys that there are."""
        return frozenset(key.name for view in self.served.definitions.stored_views() for key in view.keys)


class Shape:
    """Requests for the same features. `join_keys` are those of all views."""

    def __init__(self, prepared: Prepared, clock: Clock, join_keys: frozenset[str] = frozenset()) -> None:
        self._prepared = prepared
        self._others = join_keys - {*prepared.keys, *prepared.request_fields, *prepared.feature_names}
        self._columns = len(prepared.keys)
        self._gathering = Gathering(prepared, clock)
        self._bytes = bytes_columns(prepared)
        self._layout: Layout | None = None

    async def read(self, request: FeaturesRequest, now: int, limits: Limits) -> Rows:
        """The rows that a request asks for. Raises what Prepared.read raises."""
        entities: Entities = request.entities
        if self._bytes:
            entities = with_bytes(entities, self._bytes)
        if request.rows > LARGE:
            times = times_of(request, now, limits)
            return Rows.all_of(await asyncio.to_thread(self._prepared.read, entities, times))
        if request.as_of is None:
            return await self._gathering.read(entities)
        return Rows.all_of(await self._prepared.read_async(entities, times_of(request, now, limits)))

    def echoed(self, request: FeaturesRequest) -> dict[str, Any] | None:
        """The join keys that a request has and its features do not need: Feast's answers hold them too."""
        if len(request.entities) == self._columns:
            return None
        return {name: values for name, values in request.entities.items() if name in self._others}

    def layout(self, rows: Rows) -> Layout:
        """The layout of these and all other answers to such requests."""
        if self._layout is None:
            self._layout = Layout.of(rows.answer)
        return self._layout
