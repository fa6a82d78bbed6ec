"""The OpenAPI document of the feature server."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from feature_store import __version__
from feature_store.stores.online.status import Status
from serving.encodings import ARROW, COMPACT, FEAST
from serving.feature_requests import FeaturesRequest, Limits
from serving.schemas import PushRequest, PushResponse, WriteRequest, WriteResponse

_COMPONENTS = "#/components/schemas/{}"

_REASONS = {
    400: "The body is no JSON",
    404: "A name that is not among the applied definitions; the message lists those that are",
    409: "A time that the store cannot answer exactly any more, or events out of turn",
    413: "The body is longer than the server takes",
    415: "The body is not declared as JSON",
    422: "A field that is missing, of the wrong type or out of range; the message names it",
    500: "The server's fault, such as bytes in the store that cannot be read",
    503: "The store holds nothing of a view yet, or does not answer: the same request may succeed later",
}


def document(limits: Limits) -> dict[str, Any]:
    """The document, as JSON content."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Isochron feature server", "version": __version__, "description": _about(limits)},
        "paths": {
            "/get-online-features": {"post": _read()},
            "/push": {"post": _rows("Give raw events and rows to the views on a push source", "Push")},
            "/write-to-online-store": {"post": _rows("Write rows of a plain view", "Write")},
            "/health": {"get": _health()},
            "/metrics": {"get": _text("Metrics as Prometheus text", "text/plain")},
            "/openapi.json": {"get": _text("This document", "application/json")},
        },
        "components": {"schemas": _schemas()},
    }


def _about(limits: Limits) -> str:
    return (
        f"A body may have {limits.body:,} bytes, a read {limits.entities:,} entity rows. "
        "docs/serving.md says what each value is."
    )


def _read() -> dict[str, Any]:
    features, compact = ({"schema": _ref(name)} for name in ("FeaturesResponse", "CompactResponse"))
    binary = {"schema": {"type": "string", "contentMediaType": ARROW}}
    return {
        "operationId": "get_online_features",
        "summary": "The features of entities, as of now or another time",
        "description": "`Accept` chooses among Feast's JSON, compact JSON and an Arrow IPC stream.",
        "requestBody": _body("FeaturesRequest"),
        "responses": {
            "200": {"description": "The features", "content": {FEAST: features, COMPACT: compact, ARROW: binary}},
            **_refusals(400, 404, 409, 413, 415, 422, 500, 503),
        },
    }


def _rows(summary: str, name: str) -> dict[str, Any]:
    return {
        "operationId": name.lower(),
        "summary": summary,
        "requestBody": _body(f"{name}Request"),
        "responses": {
            "200": {"description": "What was done", "content": _json(f"{name}Response")},
            **_refusals(400, 404, 409, 413, 415, 422, 500, 503),
        },
    }


def _health() -> dict[str, Any]:
    content = _json("HealthResponse")
    return {
        "operationId": "health",
        "summary": "Whether the online views can be read now",
        "responses": {
            "200": {"description": "They can", "content": content},
            "503": {"description": "Some cannot, or the store does not answer", "content": content},
        },
    }


def _text(summary: str, media_type: str) -> dict[str, Any]:
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    return {
        "operationId": summary.split(maxsplit=1)[0].lower(),
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {media_type: {"schema": schema}}}},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _COMPONENTS.format(name)}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _body(name: str) -> dict[str, Any]:
    return {"required": True, "content": _json(name)}


def _refusals(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _REASONS[status], "content": _json("Error")} for status in statuses}


def _schemas() -> dict[str, Any]:
    template = _COMPONENTS.format("{model}")
    models = [(model, "validation") for model in (PushRequest, PushResponse, WriteRequest, WriteResponse)]
    _, pushes = models_json_schema(models, ref_template=template)  # type: ignore[arg-type]
    _, reads = msgspec.json.schema_components([FeaturesRequest], ref_template=_COMPONENTS.format("{name}"))
    # Which the server reads apart.
    references = {"type": "array", "items": {"type": "string", "maxLength": 500}, "minItems": 1}
    reads["FeaturesRequest"]["properties"]["features"] = references
    return {**pushes["$defs"], **reads, **_ANSWERS}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _by_name(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


def _object(required: dict[str, Any], others: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **(others or {})}, "required": list(required)}


_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS = _list_of(_TEXT)
_SCALAR: dict[str, Any] = {"type": ["boolean", "number", "string", "null"]}
_VALUES = _list_of({"anyOf": [_SCALAR, _list_of(_SCALAR)]})
_STATUSES = _list_of({"enum": [status.value for status in Status]})
_VIEW = _object({"name": _TEXT, "fingerprint": _TEXT}, {"version": {"type": "integer"}})

_ANSWERS: dict[str, Any] = {
    "FeaturesResponse": _object(
        {
            "metadata": _object({"feature_names": _TEXTS}, {"feature_view_metadata": _list_of(_VIEW)}),
            "results": _list_of(
                _object(
                    {
                        "values": _VALUES,
                        "statuses": _STATUSES,
                        "event_timestamps": _list_of({"type": "string", "format": "date-time"}),
                    }
                )
            ),
        }
    ),
    "CompactResponse": _object(
        {
            "columns": _by_name(_VALUES),
            "statuses": _by_name(_STATUSES),
            "event_timestamps": _by_name(_list_of({"type": ["string", "null"], "format": "date-time"})),
        }
    ),
    "HealthResponse": {
        "anyOf": [
            _object(
                {
                    "status": {"enum": ["ready", "not ready"]},
                    "not_ready": _by_name(_TEXT),
                    "waiting": _TEXTS,
                    "new": _TEXTS,
                    "definitions": _TEXT,
                }
            ),
            _ref("Error"),
        ]
    },
    "Error": {
        **_object({"error": _TEXT, "message": _TEXT, "retryable": {"type": "boolean"}}),
        "description": "Beside these an error carries what a program can act on: `field`, `view`, `expected`.",
    },
}
