"""Makes the OpenAPI document (version 3.1) from the table of endpoints and its types. Pure."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from pydantic import TypeAdapter

from relay import __version__
from relay.api.endpoints import ENDPOINTS, TEXT, Endpoint
from relay.mail.jsontext import JsonDocument, JsonFields
from relay.queue.verbs import VERBS
from relay.report.webhook import KINDS

_REF = "#/components/schemas/{model}"

_IN_PATH: JsonFields = {
    "domain": {"type": "string", "minLength": 1, "examples": ["example.com"]},
    "name": {"type": "string", "enum": list(KINDS)},
    "verb": {"type": "string", "enum": list(VERBS)},
    "id": {"type": "string", "minLength": 1, "examples": ["1K0P4WATZXQTFT009"]},
    "page": {"type": "string", "minLength": 1, "examples": ["W1tdLDAsZmFsc2Vd"]},
}

_MEANINGS = {
    200: "Done",
    400: "A parameter is missing or invalid",
    401: "No key, or a wrong one",
    403: "A page of another site may not ask",
    404: "Not found",
    408: "The request took too long to come",
    413: "Too large",
    415: "The body has a Content-Encoding, or the wrong Content-Type",
    429: "Too many wrong keys: wait",
    503: "Trouble of our own: try again later",
}


@functools.cache
def document_text() -> str:
    """The document as JSON. Making it takes a tenth of a second, so it is made once."""
    return json.dumps(document())


def document() -> JsonDocument:
    """The description of all paths under /v3, /v4 and /relay/v1."""
    schemas: JsonDocument = {}
    paths: dict[str, JsonDocument] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "relay",
            "version": __version__,
            "description": "An SMTP smarthost: Mailgun's interface for sending, and an operator's.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "User `api`; the password is a key.",
                }
            },
        },
        "security": [{"key": []}],
    }


def _operation(endpoint: Endpoint, schemas: JsonDocument) -> JsonDocument:
    operation: JsonDocument = {
        "operationId": _name_of(endpoint),
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint, schemas),
        "responses": {
            str(status): _response(status, kind, schemas)
            for status, kind in endpoint.answers.items()
        },
    }
    if endpoint.form:
        form = _form(endpoint, schemas)
        kinds = ["multipart/form-data"]
        if not any("format" in str(one) for one in form["properties"].values()):
            kinds.append("application/x-www-form-urlencoded")
        operation["requestBody"] = {
            "required": bool(endpoint.needed),
            "content": {kind: {"schema": form} for kind in kinds},
        }
    if endpoint.body is not None:
        schema = _schema(endpoint.body, schemas)
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _name_of(endpoint: Endpoint) -> str:
    words = re.findall(r"[a-z0-9]+", endpoint.path)
    return "_".join([endpoint.method.lower(), *words])


def _parameters(endpoint: Endpoint, schemas: JsonDocument) -> list[JsonDocument]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _IN_PATH[name]}
        for name in re.findall(r"\{(\w+)\}", endpoint.path)
    ]
    in_query = [
        {
            "name": name,
            "in": "query",
            "required": name in endpoint.needed,
            "schema": _schema(kind, schemas),
        }
        for name, kind in endpoint.query.items()
    ]
    return in_path + in_query


def _response(status: int, kind: object, schemas: JsonDocument) -> JsonDocument:
    if kind == TEXT:
        content: JsonFields = {TEXT: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _schema(kind, schemas)}}
    return {"description": _MEANINGS[status], "content": content}


def _form(endpoint: Endpoint, schemas: JsonDocument) -> JsonDocument:
    return {
        "type": "object",
        "properties": {name: _schema(kind, schemas) for name, kind in endpoint.form.items()},
        "required": sorted(endpoint.needed),
    }


def _schema(kind: Any, schemas: JsonDocument) -> JsonDocument:
    """The JSON schema of a type. The schemas of its parts go to the components."""
    schema = TypeAdapter(kind).json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    title = schema.get("title")
    if title and schema.get("type") == "object":
        schemas[title] = schema
        return {"$ref": _REF.format(model=title)}
    return schema
