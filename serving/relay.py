"""A request handed on to the process that has the state folder now: the last ones of connections that were opened before a swap."""

from typing import Any

from starlette.types import Scope, Send

_OWN = {b"host", b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"expect", b"accept-encoding"}  # the connection's own headers


class Relay:
    """Hands requests on to `base_url`. For one event loop."""

    def __init__(self, base_url: str, timeout: float) -> None:
        import httpx  # BentoML's own client; needed in a swap alone

        self._failed = httpx.HTTPError
        self._client: Any = httpx.AsyncClient(base_url=base_url, timeout=timeout, trust_env=False)

    async def __call__(self, scope: Scope, body: bytes, send: Send) -> None:
        """Send the successor's answer as ours. Raises OSError where there is none."""
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _OWN]
        try:
            answer = await self._client.request(scope["method"], scope["path"], content=body, headers=headers)
        except self._failed as error:
            raise OSError(type(error).__name__) from error
        kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in _OWN | {b"content-encoding", b"date", b"server"}]
        content = answer.content
        await send({"type": "http.response.start", "status": answer.status_code, "headers": [*kept, (b"content-length", b"%d" % len(content))]})
        await send({"type": "http.response.body", "body": content})
