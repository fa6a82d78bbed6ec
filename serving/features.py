"""The feature server: Feast's `/get-online-features` and what goes with it, as an ASGI app.

The read route is a plain ASGI callable: a framework's routing, dependencies and response objects cost more than the
read itself. The others go through Starlette's request and response.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
from prometheus_client import CollectorRegistry
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_store.clock import Clock
from feature_store.definitions.view import PlainView
from feature_store.errors import IsochronError, StoreNotReady, UnknownName
from feature_store.layer import FeatureLayer
from feature_store.monitoring.metrics import FeatureServerMetrics
from feature_store.retrieval.on_demand import OnDemandError
from serving.current import CurrentDefinitions
from serving.encodings import FEAST, Rows, chosen, encode
from serving.errors import FunctionFailed
from serving.feature_requests import FeaturesRequest, Limits, decode
from serving.health import FeatureHealth
from serving.json_columns import table_of_view
from serving.routes import answer_metrics, answer_push, header, json_answer, not_served, read_body, refusal
from serving.shapes import LARGE, Shape, Shapes

READ, PUSH, WRITE = "/get-online-features", "/push", "/write-to-online-store"
HEALTH, METRICS, OPENAPI = "/health", "/metrics", "/openapi.json"

#: Seconds between looks at the registry: one stat of two files each.
POLL = 1.0

Given = TypeVar("Given")
Done = TypeVar("Done")


class FeatureServer:
    """An ASGI app that serves the features of a layer.

    `clock` says what *now* is. `registry` receives the metrics, `timer` measures them, in seconds. `poll` is the time
    in seconds between looks at the repository's registry. The store's connections are closed when the app stops; the
    layer stays the caller's to close.
    """

    def __init__(
        self,
        layer: FeatureLayer,
        clock: Clock,
        *,
        limits: Limits | None = None,
        registry: CollectorRegistry | None = None,
        timer: Callable[[], float] = time.perf_counter,
        poll: float = POLL,
    ) -> None:
        self._layer, self._clock, self._timer, self._poll = layer, clock, timer, poll
        self.limits = limits or Limits()
        self.metrics = FeatureServerMetrics(registry if registry is not None else CollectorRegistry())
        self.current = CurrentDefinitions(layer, clock, self.metrics)
        self._shapes = Shapes(self.current.served, layer, clock)
        self._health = FeatureHealth(layer)
        self._answered = self.metrics.requests.labels(READ, "200")
        self._routes: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {
            PUSH: {"POST": self._push},
            WRITE: {"POST": self._write},
            HEALTH: {"GET": self._ready},
            METRICS: {"GET": self._measured},
            OPENAPI: {"GET": self._described},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            with suppress(ClientDisconnect):
                if scope["path"] == READ and scope["method"] == "POST":
                    await self._read(scope, receive, send)
                else:
                    await self._other(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        keeping_up = asyncio.create_task(self.current.keep_up(self._poll))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        keeping_up.cancel()
        with suppress(asyncio.CancelledError):
            await keeping_up
        # Connections to a store belong to this event loop; whoever reads on opens others.
        self._layer.store.backend.close()
        await asyncio.sleep(0)
        await send({"type": "lifespan.shutdown.complete"})

    # -- reading ------------------------------------------------------------------------------------------------

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = self._timer()
        try:
            body = await read_body(scope["headers"], receive, self.limits.body)
            request = decode(body, self.limits)
            shape, rows = await self._up_to_date(self._rows, request)
            media_type = chosen(header(scope["headers"], b"accept"))
            with_views, echoed = request.include_feature_view_version_metadata, shape.echoed(request)
            write = partial(encode, media_type, shape.layout(rows), rows, with_views, echoed)
            content = write() if rows.count <= LARGE else await asyncio.to_thread(write)
        except OnDemandError as error:
            await self._refuse(_of_values(error), scope, receive, send)
            return
        except IsochronError as error:
            await self._refuse(error, scope, receive, send)
            return
        kind = b"application/json" if media_type == FEAST else media_type.encode()
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        self._answered.inc()
        self.metrics.rows_read.inc(rows.count)
        self._count_unknown(rows)
        self.metrics.read_seconds.observe(self._timer() - started)

    async def _rows(self, request: FeaturesRequest) -> tuple[Shape, Rows]:
        """What a request asks for."""
        shape = self._shape(request)
        return shape, await shape.read(request, self._clock.now(), self.limits)

    async def _up_to_date(self, act: Callable[[Given], Awaitable[Done]], given: Given) -> Done:
        """Acts, and again if what is unknown or not ready was so by definitions that have changed meanwhile."""
        while True:
            by = self.current.served
            try:
                return await act(given)
            except (StoreNotReady, UnknownName):
                if self.current.served is by and not await self.current.refresh():
                    raise

    def _shape(self, request: FeaturesRequest) -> Shape:
        if self._shapes.served is not self.current.served:
            self._shapes = Shapes(self.current.served, self._layer, self._clock)
        return self._shapes.of(request)

    def _count_unknown(self, rows: Rows) -> None:
        for view, part in rows.answer.parts.items():
            if part.known is None:
                continue
            if rows.count == 1:  # a single look costs a tenth of numpy's count
                unknown = int(not part.known[rows.low])
            else:
                unknown = rows.count - int(np.count_nonzero(part.known[rows.low : rows.high]))
            if unknown:
                self.metrics.rows_unknown.labels(view).inc(unknown)

    # -- the other routes ---------------------------------------------------------------------------------------

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, method = scope["path"], "GET" if scope["method"] == "HEAD" else scope["method"]
        if route == READ:
            answer = not_served(405, "Method Not Allowed", {"allow": "POST"})
        elif (methods := self._routes.get(route)) is None:
            # Paths that clients make up are no labels of a metric.
            route, answer = "other", not_served(404, "Not Found")
        elif (handler := methods.get(method)) is None:
            answer = not_served(405, "Method Not Allowed", {"allow": ", ".join(methods)})
        else:
            try:
                answer = await handler(Request(scope, receive))
            except IsochronError as error:
                await self._refuse(error, scope, receive, send)
                return
        self.metrics.requests.labels(route, str(answer.status_code)).inc()
        await answer(scope, receive, send)

    async def _refuse(self, error: IsochronError, scope: Scope, receive: Receive, send: Send) -> None:
        answer = refusal(error, scope["path"], self.metrics)
        self.metrics.requests.labels(scope["path"], str(answer.status_code)).inc()
        await answer(scope, receive, send)

    async def _push(self, request: Request) -> Response:
        body = await read_body(request.scope["headers"], request.receive, self.limits.body)
        return await self._up_to_date(self._pushed, body)

    async def _pushed(self, body: bytes) -> Response:
        return await answer_push(self._layer, body, self.metrics)

    async def _write(self, request: Request) -> Response:
        body = await read_body(request.scope["headers"], request.receive, self.limits.body)
        return await self._up_to_date(self._written, body)

    async def _written(self, body: bytes) -> Response:
        return await run_in_threadpool(self._write_rows, body)

    def _write_rows(self, body: bytes) -> Response:
        # As with the first push, see serving.routes.
        from serving.schemas import WriteRequest
        from serving.schemas import decode as decode_model

        asked = decode_model(WriteRequest, body)
        view = self._layer.definitions.stored_view(asked.feature_view_name)
        # The layer says why a windowed view takes no rows, whatever they are.
        rows = table_of_view(view, asked.df) if isinstance(view, PlainView) else pa.table({})
        entities = self._layer.write_to_online_store(view.name, rows)
        self.metrics.rows_written.labels(view.name).inc(rows.num_rows)
        return json_answer({"view": view.name, "entities": entities})

    async def _ready(self, _: Request) -> Response:
        ready, told = await run_in_threadpool(self._health.told, self.current.served)
        return json_answer(told, 200 if ready else 503)

    async def _measured(self, _: Request) -> Response:
        return answer_metrics(self.metrics.registry)

    async def _described(self, _: Request) -> Response:
        from serving.openapi import document

        return json_answer(document(self.limits))


def _of_values(error: OnDemandError) -> IsochronError:
    """What a function's error is to a client: with a cause it comes of the values that the function was given."""
    return FunctionFailed(error) if error.__cause__ is not None else error
