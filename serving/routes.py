"""What the apps of this folder have in common: how bodies come in, how answers and refusals go out, and the routes for
pushed rows and for metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from feature_store.errors import IsochronError
from feature_store.layer import FeatureLayer
from feature_store.monitoring.metrics import ServerMetrics
from serving.errors import BodyTooLarge, WrongMediaType, body_of, status_of

if TYPE_CHECKING:
    from serving.push import Pushed

logger = logging.getLogger(__name__)

Headers = Iterable[tuple[bytes, bytes]]


def json_answer(content: Any, status: int = 200) -> Response:
    """Content as a JSON response."""
    return Response(orjson.dumps(content), status, media_type="application/json")


def header(headers: Headers, name: bytes) -> bytes:
    """The first value of a header (its name in lower case), empty where it is not sent."""
    return next((value for key, value in headers if key == name), b"")


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """The bytes of a JSON body.

    Raises WrongMediaType; BodyTooLarge before more than `most` bytes are held; ClientDisconnect.
    """
    if not is_json(header(headers, b"content-type")):
        raise WrongMediaType()
    message = await receive()
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise BodyTooLarge(most)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)
        message = await receive()


def is_json(content_type: bytes) -> bool:
    """Whether a body of this declared type is JSON."""
    return content_type == b"application/json" or (
        content_type.partition(b";")[0].strip().lower() == b"application/json"
    )


def refusal(error: IsochronError, route: str, metrics: ServerMetrics) -> Response:
    """An error as its client gets it; counted, and logged where it is our fault."""
    metrics.refused_requests.labels(route, type(error).__name__).inc()
    status = status_of(error)
    if status == 500:
        logger.error("%s failed: %s", route, error, exc_info=error)
    return json_answer(body_of(error), status)


def not_served(status: int, problem: str, headers: dict[str, str] | None = None) -> Response:
    """A path or method that is not served, in the shape of the other errors."""
    answer = json_answer({"error": "NotServed", "message": f"{problem}.", "retryable": False}, status)
    answer.headers.update(headers or {})
    return answer


async def answer_push(layer: FeatureLayer, body: bytes, metrics: ServerMetrics) -> Response:
    """Takes pushed rows in, and says by view what was done with them."""
    # A push waits for the disk (its commit is synced) and may be long: in a thread, so that reads go on meanwhile.
    done = await run_in_threadpool(_pushed, layer, body)
    _count(done, metrics)
    windowed = {view: asdict(appended) for view, appended in done.windowed.items()}
    return json_answer({"views": windowed | {view: {"entities": entities} for view, entities in done.plain.items()}})


def _pushed(layer: FeatureLayer, body: bytes) -> Pushed:
    # Loaded with the first push: pydantic takes a third of the time in which a server starts.
    from serving.push import push
    from serving.schemas import PushRequest, decode

    return push(layer, decode(PushRequest, body))


def _count(done: Pushed, metrics: ServerMetrics) -> None:
    for view, appended in done.windowed.items():
        metrics.events_applied.labels(view).inc(appended.applied)
        metrics.events_repeated.labels(view).inc(appended.repeated)
    for view in done.plain:
        metrics.rows_written.labels(view).inc(done.rows)


def answer_metrics(registry: CollectorRegistry) -> Response:
    """Metrics as Prometheus text."""
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
