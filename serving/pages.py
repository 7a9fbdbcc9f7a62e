"""The page of API docs, without outside resources: BentoML's own loads a tracker."""

import base64
import hashlib

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
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


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)


def docs_page() -> Starlette:
    """The API docs at `/` and `/docs`, with the scripts BentoML ships."""
    return Starlette(routes=[Route("/", _docs), Route("/docs", _docs)])
