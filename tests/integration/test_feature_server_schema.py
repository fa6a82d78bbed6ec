"""The feature server under generated requests: its OpenAPI document is true, and nothing a client sends is a 500."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.types import Receive, Scope, Send

from feature_store.clock import ManualClock
from feature_store.definitions.view import PlainView, StoredView
from feature_store.layer import FeatureLayer
from feature_store.timestamps import iso, parse_time
from serving.features import FeatureServer
from serving.openapi import document

pytestmark = pytest.mark.filterwarnings("ignore")

OPENED = parse_time("2018-05-01T00:00:00Z")
_BOUNDED = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Narrowed:
    """The app with a second document, whose requests name what there is: so that generated ones come far."""

    def __init__(self, app: FeatureServer, names: dict[str, Any]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/narrowed.json":
            content = orjson.dumps(self.document())
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})
        else:
            await self.app(scope, receive, send)

    def document(self) -> dict[str, Any]:
        told = copy.deepcopy(document(self.app.limits))
        schemas = told["components"]["schemas"]
        schemas["FeaturesRequest"]["properties"].update(self.names["read"])
        schemas["PushRequest"]["properties"].update(self.names["push"])
        schemas["WriteRequest"]["properties"].update(self.names["write"])
        return told


@pytest.fixture(scope="module")
def app(fraud_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Narrowed]:
    repo = Path(shutil.copytree(fraud_repo, tmp_path_factory.mktemp("schema") / "feature_repo"))
    clock = ManualClock(OPENED)
    with FeatureLayer(repo, clock=clock) as layer:
        layer.bootstrap(until=OPENED)
        yield Narrowed(FeatureServer(layer, clock), names(layer))
        layer.store.backend.close()


def names(layer: FeatureLayer) -> dict[str, Any]:
    """Schemas of the fields that name something, and of columns that there are."""

    def among(values: list[str]) -> dict[str, Any]:
        return {"type": "string", "enum": values}

    def columns(types: dict[str, dict[str, Any]], rows: int) -> dict[str, Any]:
        arrays = {n: {"type": "array", "items": t, "minItems": rows, "maxItems": rows} for n, t in types.items()}
        return {"type": "object", "properties": arrays, "required": list(types), "additionalProperties": False}

    integer = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    keys = {"customer_id": integer, "terminal_id": {"type": ["integer", "string"], "enum": [1, 2, "3", "one"]}}
    given = {"TX_AMOUNT": {"type": "number"}, "TX_DATETIME": {"type": "string", "enum": [iso(OPENED)]}}
    event = {
        "CUSTOMER_ID": integer,
        "TERMINAL_ID": integer,
        "TX_AMOUNT": {"type": ["number", "null"]},
        "TX_DATETIME": {"type": "string", "format": "date-time"},
    }
    views = [view for view in layer.definitions.stored_views() if view.online]
    references = [f"{v.name}:{n}" for v in views for n in feature_names(v)] + ["customer_spend:customer_id", "no:such"]
    profile = {"customer_id": integer, "event_timestamp": {"type": "string", "format": "date-time"}}
    profile |= {f.name: {"type": ["number", "null"]} for f in layer.definitions.view("customer_profile").features}
    return {
        "read": {
            "feature_service": among(["fraud_v1"]),
            "features": {"type": "array", "items": among(references), "minItems": 1, "maxItems": 5},
            "entities": columns(keys | given, 3),
            "as_of": among([iso(OPENED), iso(OPENED - 60_000_000), "2018-04-01"]),
        },
        "push": {
            "push_source_name": among(["transaction_events", "label_events"]),
            "df": columns(event, 2),
            "to": among(["online"]),
        },
        "write": {"feature_view_name": among([v.name for v in views]), "df": columns(profile, 2)},
    }


def feature_names(view: StoredView) -> list[str]:
    return [f.name for f in (view.features if isinstance(view, PlainView) else view.aggregations)]


OPERATIONS = [
    ("/get-online-features", "POST"),
    ("/push", "POST"),
    ("/write-to-online-store", "POST"),
    ("/health", "GET"),
    ("/metrics", "GET"),
    ("/openapi.json", "GET"),
]


@pytest.mark.parametrize("described", ["/openapi.json", "/narrowed.json"])
@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*o, mode) for o in OPERATIONS for mode in GenerationMode if o[1] == "POST" or mode is GenerationMode.POSITIVE],
)
def test_generated_requests_are_answered_as_the_document_says(
    app: Narrowed, path: str, method: str, described: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_asgi(described, app)[path][method]
    statuses: Counter[int] = Counter()

    @_BOUNDED
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        # Not that all it allows succeeds: a name that there is none of is a 404. Nor that what the narrowed document
        # leaves out is wrong: it names some of the entities only.
        excluded = [positive_data_acceptance]
        if described == "/narrowed.json":
            excluded.append(negative_data_rejection)
        response = case.call_and_validate(excluded_checks=excluded)
        statuses[response.status_code] += 1

    ask()
    assert set(statuses) <= {200, 400, 404, 409, 413, 415, 422}
    if described == "/narrowed.json":
        assert statuses[200 if mode is GenerationMode.POSITIVE else 422] > 0, statuses


def test_methods_that_are_not_served(app: Narrowed) -> None:
    async def ask(other: str, path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(other, path)

    for path, method in OPERATIONS:
        for other in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - {method}:
            answer = asyncio.run(ask(other, path))
            assert (answer.status_code, answer.headers["allow"]) == (405, method)
