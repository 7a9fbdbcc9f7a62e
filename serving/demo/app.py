"""The demo's routes: the page's own files, and what the page asks for. A click goes to /events like any other.

GET /demo, /demo/FILE        the page: files of this folder, no build step, nothing from elsewhere
GET /demo/api/setup          arms, actions, users to start with
POST /demo/api/users         users whose key begins with a text
POST /demo/api/explain       serving.explain
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from serving.demo.schemas import ExplainRequest, UsersRequest
from serving.errors import RequestError
from serving.faults import faults_of
from serving.http import refusal

if TYPE_CHECKING:  # BentoML's supervisor mounts the routes: it need not load the models' libraries
    from serving.demo.people import People
    from serving.explain import Explainer

FOLDER = Path(__file__).parent
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MAX_BODY = 1 << 14  # bytes; our choice: three keys of the greatest length fit
AT_ONCE = 1  # explanations in work: the demo must not take the cores from those who are served
WAITING = 8
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_DATA_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Body = TypeVar("Body", bound=BaseModel)


class Demo:
    """The page and its data. It exists before the models do: until `open` is called, and where it is switched off, it says so."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._explainer: Explainer | None = None
        self._people: People | None = None
        self._actions: tuple[str, ...] = ()
        self._limiter: CapacityLimiter | None = None  # belongs to the event loop, so it is made there

    def open(self, explainer: "Explainer", people: "People", actions: tuple[str, ...]) -> None:
        self._explainer, self._people, self._actions = explainer, people, actions

    def app(self) -> Starlette:
        """To be mounted at /."""
        return Starlette(
            routes=[
                Route("/demo", self._enter),
                Route("/demo/", self._file),
                Route("/demo/api/setup", self._setup),
                Route("/demo/api/users", self._users, methods=["POST"]),
                Route("/demo/api/explain", self._explain, methods=["POST"]),
                Route("/demo/{name}", self._file),
            ]
        )

    async def _enter(self, request: HTTPRequest) -> Response:
        # Relative, so that the page also works below a proxy's prefix.
        return RedirectResponse("demo/", status_code=307) if self._enabled else _switched_off()

    async def _file(self, request: HTTPRequest) -> Response:
        if not self._enabled:
            return _switched_off()
        path = _FILES.get(request.path_params.get("name", "index.html"))
        if path is None:
            return refusal(404, [("path", "no such file; the page is at /demo")])
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=_PAGE_HEADERS)

    async def _setup(self, request: HTTPRequest) -> Response:
        def setup(explainer: "Explainer", people: "People") -> dict[str, Any]:
            return {"arms": explainer.arms(), "actions": self._actions, "suggestions": people.suggestions()}

        return await self._answer(setup)

    async def _users(self, request: HTTPRequest) -> Response:
        asked = await _body(request, UsersRequest)
        if isinstance(asked, Response):
            return asked
        return await self._answer(lambda explainer, people: {"users": people.starting_with(asked.starts)})

    async def _explain(self, request: HTTPRequest) -> Response:
        asked = await _body(request, ExplainRequest)
        if isinstance(asked, Response):
            return asked
        return await self._answer(lambda explainer, people: explainer.explain(asked))

    async def _answer(self, work: "Callable[[Explainer, People], dict[str, Any]]") -> Response:
        """What `work` gives, worked out in a thread, one after another."""
        if not self._enabled:
            return _switched_off()
        if self._explainer is None or self._people is None:
            return _later(503, "not ready: see the service's log", 5)
        limiter = self._limiter = self._limiter or CapacityLimiter(AT_ONCE)
        if limiter.statistics().tasks_waiting >= WAITING:
            return _later(503, "the demo is busy", 1)
        try:
            content = await to_thread.run_sync(partial(work, self._explainer, self._people), limiter=limiter)
        except RequestError as error:
            return refusal(400, [(error.field, error.message)])
        return JSONResponse(content, headers=_DATA_HEADERS)


_FILES = {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}


async def _body(request: HTTPRequest, kind: type[Body]) -> Body | Response:
    """The request's body as `kind`, or why it is refused."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":  # what another site's page can send without asking is refused here
        return refusal(415, [("Content-Type", f"{media_type or 'none'}; expected application/json")])
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return refusal(413, [("body", f"larger than {MAX_BODY} bytes; expected at most that")])
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        return refusal(400, faults_of(error.errors(include_url=False)))


def _switched_off() -> Response:
    return refusal(404, [("demo", "switched off; `serving.demo: true` in params.yaml shows it, and `make serve` on a laptop")])


def _later(status: int, message: str, seconds: int) -> Response:
    response = refusal(status, [("service", message)])
    response.headers["Retry-After"] = str(seconds)
    return response
