"""The page of API docs, without outside resources (BentoML's own loads a tracker), and the description it shows."""

import base64
import functools
import hashlib
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

_SCRIPT = 'SwaggerUIBundle({url: "docs.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});'
_PAGE = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Longtrail</title><link rel="stylesheet" href="static_content/swagger-ui.css"></head>
<body><div id="docs"></div>
<script src="static_content/swagger-ui-bundle.js"></script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_HEADERS = {
    # Swagger UI writes styles into elements and shows images of its own as data; scripts are BentoML's files and the one line above.
    "Content-Security-Policy": f"default-src 'none'; script-src 'self' 'sha256-{_HASH}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


REFUSALS = {
    "400": "A field is missing, unknown or wrong",
    "401": "No token, or none of this service",
    "403": "The token lacks the right",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The body is no JSON",
    "429": "More requests a second than this client may send; Retry-After says when to come again",
    "431": "Too many or too long headers",
    "500": "A fault of the service",
    "503": "Not ready, or too busy; Retry-After says when to come again",
    "507": "No room on the disk for events; Retry-After says when to come again",
}
_TEXT = {"type": "string"}
_REFUSAL = {
    "type": "object",
    "required": ["error", "detail"],
    "properties": {
        "error": {**_TEXT, "description": "FIELD: MESSAGE; …"},
        "detail": {
            "type": "array",
            "items": {"type": "object", "required": ["field", "message"], "properties": {"field": _TEXT, "message": _TEXT}},
        },
    },
}


def described(spec: dict[str, Any]) -> dict[str, Any]:
    """BentoML's OpenAPI description with our refusals in the place of its own, and with the fields that may be null, which it leaves out."""
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    refusals = {status: {"description": says, "content": body} for status, says in REFUSALS.items()}
    paths = {
        path: {
            method: {**operation, "responses": {**{k: v for k, v in operation["responses"].items() if str(k) == "200"}, **refusals}}
            if method == "post"
            else operation
            for method, operation in operations.items()
        }
        for path, operations in spec["paths"].items()
    }
    models = {name: _nullable(model) for name, model in spec["components"]["schemas"].items()}
    components = {**spec["components"], "schemas": {**models, "Refusal": _REFUSAL}}
    return {**spec, "paths": _referring(paths, set(models)), "components": components}


def _nullable(model: dict[str, Any]) -> dict[str, Any]:
    """BentoML describes what may be null as JSON Schema does; OpenAPI 3.0 says `nullable`."""
    fields = {}
    for name, field in model.get("properties", {}).items():
        kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
        maybe = len(kinds) == 1 and len(field["anyOf"]) == 2
        fields[name] = {**{key: value for key, value in field.items() if key != "anyOf"}, **kinds[0], "nullable": True} if maybe else field
    return {**model, "properties": fields} if fields else model


def _referring(node: Any, models: set[str]) -> Any:
    """`node` with references in the place of models that are written out: BentoML loses there what may be null."""
    if isinstance(node, dict):
        if node.get("type") == "object" and node.get("title") in models:
            return {"$ref": f"#/components/schemas/{node['title']}"}
        return {key: _referring(value, models) for key, value in node.items()}
    return [_referring(value, models) for value in node] if isinstance(node, list) else node


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)


def docs_page(spec: Callable[[], dict[str, Any]]) -> Starlette:
    """The API docs at `/` and `/docs`, with the scripts BentoML ships, and the description at `/docs.json`, made of `spec()` once."""

    @functools.cache
    def content() -> bytes:
        return bytes(JSONResponse(described(spec())).body)

    async def described_api(request: Request) -> Response:
        return Response(content(), media_type="application/json")

    return Starlette(routes=[Route("/", _docs), Route("/docs", _docs), Route("/docs.json", described_api)])
