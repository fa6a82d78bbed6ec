"""The serving app: fraud scores and pushed events over HTTP, with health, metrics and a page for people."""

from __future__ import annotations

import html
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from feature_store import __version__
from feature_store.clock import Clock
from feature_store.errors import IsochronError
from feature_store.layer import FeatureLayer
from feature_store.monitoring.metrics import ServingMetrics
from feature_store.timestamps import iso
from models.booster import FraudModel
from serving.decision_log import Decision, DecisionLog
from serving.health import Readiness
from serving.predictor import MAX_AHEAD, SERVICE, Predictor
from serving.routes import answer_metrics, answer_push, json_answer, not_served, read_body, refusal
from serving.schemas import PushRequest, PushResponse, ScoreRequest, ScoreResponse, decode

#: Bytes. A transaction takes some 200; a push of 16 MiB some 100,000 events.
LONGEST_TRANSACTION = 16 * 1024
LONGEST_PUSH = 16 * 1024 * 1024

#: The page has its script and style within, and talks to this server only.
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def new_decision_id() -> str:
    """A name that no other decision has."""
    return uuid.uuid4().hex


def create_app(
    layer: FeatureLayer,
    model: FraudModel,
    log: DecisionLog,
    clock: Clock,
    *,
    code_commit: str = "unknown",
    new_id: Callable[[], str] = new_decision_id,
    max_ahead: int = MAX_AHEAD,
    registry: CollectorRegistry | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> FastAPI:
    """An app that scores card transactions with a model on the layer's features.

    The log is opened when the app starts and closed when it stops; the layer stays the caller's to close. `clock`
    bounds how far in the future a transaction may be (`max_ahead`, microseconds) and dates the log. `code_commit` is
    logged with each decision, which `new_id` names. `registry` receives the metrics; `timer` measures them, in seconds.

    Raises ModelError when the model does not fit the layer's definitions. The store may be filled later: until then
    `/health` and `/fraud/score` answer 503.
    """
    predictor = Predictor.setup(layer, model, clock, new_id, code_commit, max_ahead)
    metrics = ServingMetrics(registry if registry is not None else CollectorRegistry())
    metrics.model.labels(model.version, predictor.handle.fingerprint).set(1)
    routes = _Routes(layer, predictor, log, clock, Readiness.of(layer, predictor.handle), metrics, timer)
    app = FastAPI(title="Isochron", version=__version__, docs_url=None, redoc_url=None, lifespan=_opening(log))
    _add_routes(app, routes)
    app.add_exception_handler(IsochronError, _refusing(metrics))
    app.add_exception_handler(HTTPException, _not_served)
    return app


def _opening(log: DecisionLog) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with log:
            yield

    return lifespan


def _add_routes(app: FastAPI, routes: _Routes) -> None:
    app.add_api_route("/", routes.page, methods=["GET"], include_in_schema=False)
    app.add_api_route(
        "/fraud/score",
        routes.score,
        methods=["POST"],
        summary="The probability that a card transaction is fraud",
        openapi_extra=_body(ScoreRequest),
        responses=_answers(ScoreResponse, 400, 409, 413, 415, 422, 503),
    )
    app.add_api_route(
        "/push",
        routes.push,
        methods=["POST"],
        summary="Append raw events to the views on a push source",
        openapi_extra=_body(PushRequest),
        responses=_answers(PushResponse, 400, 404, 409, 413, 415, 422, 503),
    )
    app.add_api_route("/health", routes.health, methods=["GET"], summary="Whether transactions can be scored now")
    app.add_api_route("/metrics", routes.measured, methods=["GET"], summary="Metrics as Prometheus text")


@dataclass(frozen=True)
class _Routes:
    """What each route does.

    Everything but a push runs on the event loop: a score is a few reads of mapped memory, arithmetic, and a write to
    the page cache, which a thread would only make wait for the interpreter.
    """

    layer: FeatureLayer
    predictor: Predictor
    log: DecisionLog
    clock: Clock
    readiness: Readiness
    metrics: ServingMetrics
    timer: Callable[[], float]

    async def score(self, request: Request) -> Response:
        started = self.timer()
        body = await read_body(request.scope["headers"], request.receive, LONGEST_TRANSACTION)
        decision = self.predictor.score(decode(ScoreRequest, body))
        self.log.append(decision)
        answer = json_answer(_answer(decision))
        self._count(decision, self.timer() - started)
        return answer

    def _count(self, decision: Decision, seconds: float) -> None:
        self.metrics.decision_seconds.observe(seconds)
        self.metrics.decisions.labels("scored_with_warnings" if decision.warnings else "scored").inc()
        for key in self.predictor.unknown_keys(decision.unknown):
            self.metrics.unknown_entities.labels(key).inc()

    async def push(self, request: Request) -> Response:
        body = await read_body(request.scope["headers"], request.receive, LONGEST_PUSH)
        return await answer_push(self.layer, body, self.metrics)

    async def health(self) -> Response:
        served = {"model_version": self.predictor.model.version, "fingerprint": self.predictor.handle.fingerprint}
        if not_ready := self.readiness.not_ready():
            return json_answer({"status": "not ready", "not_ready": not_ready, **served}, 503)
        return json_answer({"status": "ready", **served})

    async def measured(self) -> Response:
        return answer_metrics(self.metrics.registry)

    async def page(self) -> Response:
        shown = {
            "service": SERVICE,
            "model_version": self.predictor.model.version,
            "fingerprint": self.predictor.handle.fingerprint,
            "now": iso(self.clock.now()),
        }
        return Response(_page(shown), media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})


def _answer(decision: Decision) -> dict[str, Any]:
    """A decision as its client gets it: a ScoreResponse, whose checks a value of our own making does not need."""
    return {
        "transaction_id": decision.request["transaction_id"],
        "score": decision.score,
        "decision_id": decision.decision_id,
        "as_of": iso(decision.as_of),
        "model_version": decision.model_version,
        "fingerprint": decision.fingerprint,
        "warnings": decision.warnings,
    }


def _refusing(metrics: ServingMetrics) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, IsochronError)
        return refusal(error, request.scope["route"].path, metrics)

    return refuse


async def _not_served(_: Request, error: Exception) -> Response:
    """A path or method that is not served, in the shape of the other errors."""
    assert isinstance(error, HTTPException)
    return not_served(error.status_code, error.detail, dict(error.headers or {}))


def _page(shown: dict[str, str]) -> str:
    text = resources.files("serving").joinpath("page.html").read_text(encoding="utf-8")
    for name, value in shown.items():
        text = text.replace("{{" + name + "}}", html.escape(value))
    return text


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body that the route reads itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answers(model: type[BaseModel], *refusals: int) -> dict[int | str, dict[str, Any]]:
    refused: dict[int | str, dict[str, Any]] = {
        status: {"description": "Refused, with a reason"} for status in refusals
    }
    return {200: {"model": model}, **refused}
