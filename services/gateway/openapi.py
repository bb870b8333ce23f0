"""The OpenAPI document of the gateway: made from the very types that decode the requests."""

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from services.common.errors import TABLE, Reason
from services.gateway.answers_files import Batch
from services.gateway.routes import Route

__all__ = ["document"]

_PARAMETER: Final = re.compile(r"\{(\w+)(?::path)?\}")
_REFERENCE: Final = "#/components/schemas/{name}"
_REFUSALS: Final = (
    Reason.INVALID_REQUEST,
    Reason.INVALID_API_KEY,
    Reason.PERMISSION_DENIED,
    Reason.NOT_FOUND,
    Reason.METHOD_NOT_ALLOWED,
    Reason.REQUEST_TOO_LARGE,
    Reason.UNSUPPORTED_MEDIA_TYPE,
    Reason.RATE_LIMIT_EXCEEDED,
    Reason.INTERNAL,
    Reason.NO_READY_WORKER,
    Reason.DEADLINE_EXCEEDED,
)
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_EVENT: Final = {
    "type": "object",
    "description": "Each event; the data is JSON, or [DONE].",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "minLength": 1}},
}
_JSON: Final = "application/json"
_PREFER: Final = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": (
        "What to do where there is no room (RFC 7240). wait=SECONDS: wait so long for a worker; 0: be refused at once. "
        "respond-async: answer with a batch of this one request, which is worked on when there is room."
    ),
    # What it does not know it ignores, as the RFC says.
    "schema": {"type": "string", "examples": ["respond-async, wait=5"]},
}


def document(routes: Iterable[Route], *, version: str) -> bytes:
    """The document, as JSON."""
    routes = list(routes)
    used = (shape for route in routes for shape in (route.body, route.answer, Batch if route.may_be_put_off else None))
    shapes = list(dict.fromkeys(filter(None, used)))
    schemas, components = msgspec.json.schema_components(shapes, ref_template=_REFERENCE)
    by_shape = dict(zip(shapes, schemas, strict=True))
    for shape, schema in by_shape.items():
        # What types can't say.
        components[schema["$ref"].rpartition("/")[2]] |= getattr(shape, "MORE_SCHEMA", {})
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, by_shape)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "tokenloom", "version": version, "description": "An OpenAI-compatible API."},
            "security": [{"key": []}],
            "paths": paths,
            "components": {
                "schemas": {**_portable(components), "Error": _ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _operation(route: Route, schemas: dict[type, dict[str, Any]]) -> dict[str, Any]:
    summary = (route.handler.__doc__ or "").strip().partition("\n")[0]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": name in route.needs, "schema": schema}
        for name, schema in route.query.items()
    ]
    if route.may_be_put_off:
        parameters.append(_PREFER)
    operation: dict[str, Any] = {"summary": summary, "parameters": parameters, "responses": _responses(route, schemas)}
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schemas[route.body]}}}
    elif route.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
    return operation


def _responses(route: Route, schemas: dict[type, dict[str, Any]]) -> dict[str, Any]:
    if route.answer is None:
        answers: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    else:
        answers = {_JSON: {"schema": schemas[route.answer]}}
        if route.streams:
            answers["text/event-stream"] = {"schema": _EVENT}
    error = {_JSON: {"schema": {"$ref": _REFERENCE.format(name="Error")}}}
    refusals = {str(TABLE[reason].http): {"description": TABLE[reason].code, "content": error} for reason in _REFUSALS}
    put_off = {"202": {"description": "a batch of one", "content": {_JSON: {"schema": schemas[Batch]}}}}
    return {
        "200": {"description": "the answer", "content": answers},
        **(put_off if route.may_be_put_off else {}),
        **refusals,
    }


def _portable(schema: Any) -> Any:
    """The same schema in what JSON Schema calls a regular expression, which has no `\\Z`."""
    if isinstance(schema, dict):
        return {
            key: value.replace(r"\Z", "$") if key == "pattern" and isinstance(value, str) else _portable(value)
            for key, value in schema.items()
        }
    return [_portable(each) for each in schema] if isinstance(schema, list) else schema
