"""An S3 server on loopback (moto), which a test may have break a connection, or kill a client, in the middle of an upload."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "longtrail"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
Trap = Callable[[dict[str, Any]], None]  # is given the request (WSGI) in which it snaps


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


class S3:
    """`url` is its address; `uploads` the places of all objects that were put since `forget()`."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.uploads: list[str] = []
        self._trap: Trap | None = None
        self._after = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        self.uploads.clear()

    @contextmanager
    def trap(self, snap: Trap, *, after: int) -> Iterator[None]:
        """`snap` is called once, in the upload that follows `after` whole ones, with half of its body read."""
        self._trap, self._after = snap, after
        try:
            yield
        finally:
            self._trap = None

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """All objects below `prefix`."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1:
            with self._lock:
                snap, self._trap = (self._trap, None) if len(self.uploads) >= self._after else (None, self._trap)
            if snap is not None:
                environ["wsgi.input"].read(max(1, int(environ.get("CONTENT_LENGTH") or 2) // 2))
                snap(environ)
                return []
            answer = self._app(environ, start_response)
            with self._lock:
                self.uploads.append(environ["PATH_INFO"])
            return answer
        return self._app(environ, start_response)
