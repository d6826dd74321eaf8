"""The description of the HTTP interface says what is served, no more and no less."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from relay.api import openapi
from relay.api.endpoints import ENDPOINTS
from relay.api.openapi import document, document_text
from tests.fakes.http import Rig


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


def test_every_endpoint_is_described_once():
    described = document()
    json.dumps(described)
    served = {(endpoint.method.lower(), endpoint.path) for endpoint in ENDPOINTS}
    assert served == {
        (method, path) for path, methods in described["paths"].items() for method in methods
    }
    assert len(served) == len(ENDPOINTS)
    names = [
        operation["operationId"]
        for path in described["paths"].values()
        for operation in path.values()
    ]
    assert len(set(names)) == len(names)


BESIDE = {
    ("get", "/metrics"),
    ("get", "/healthz"),
    ("get", "/readyz"),
    ("get", "/relay/v1/openapi.json"),
}
"""For machines that watch, and the description itself."""


async def test_every_route_of_the_server_is_described(rig: Rig):
    routes = {
        (route.method.lower(), route.resource.canonical) for route in rig.http.app.router.routes()
    }
    served = {(method, path) for method, path in routes if method != "head"}
    described = {
        (method, path) for path, methods in document()["paths"].items() for method in methods
    }
    assert served == described | BESIDE


async def test_description_is_made_for_who_asks_and_made_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    made = 0

    def counted() -> dict[str, Any]:
        nonlocal made
        made += 1
        return {"openapi": "3.1.0"}

    document_text.cache_clear()
    monkeypatch.setattr(openapi, "document", counted)
    assert (await rig.ask("GET", "/healthz"))[0] == 200
    assert made == 0
    for _ in range(2):
        assert await rig.ask("GET", "/relay/v1/openapi.json") == (200, {"openapi": "3.1.0"})
    assert made == 1
    document_text.cache_clear()


def test_every_reference_leads_somewhere():
    described = document()
    names = described["components"]["schemas"]
    assert _references(described) <= {f"#/components/schemas/{name}" for name in names}
    for schema in names.values():
        jsonschema_rs.meta.validate(schema)
