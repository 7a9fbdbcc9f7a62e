"""The few calls of Kubeflow Pipelines' REST API that the client and the run's report make, on loopback. It keeps what it was sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Kubeflow:
    """State of the server. `answers`: what a path answers instead, as (status, body)."""

    address: str = ""
    multi_user: bool = False
    experiments: dict[str, str] = field(default_factory=dict)  # id by name
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # successive records by run; the last one stays
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    received: list[tuple[str, str, Any, str | None]] = field(default_factory=list)  # method, path, body, authorization

    def posted(self, path: str) -> list[Any]:
        return [body for method, where, body, _ in self.received if method == "POST" and where == path]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        api = "/apis/v2beta1/"
        if path in self.answers:
            return self.answers[path]
        if path == f"{api}healthz":
            return 200, {"multi_user": self.multi_user}
        if path == f"{api}experiments" and method == "GET":
            (wanted,) = json.loads(query["filter"][0])["predicates"]
            name = wanted["stringValue"]
            return 200, {"experiments": [{"experiment_id": self.experiments[name], "display_name": name}]} if name in self.experiments else {}
        if path == f"{api}experiments":
            self.experiments[body["display_name"]] = f"experiment-{len(self.experiments)}"
            return 200, {"experiment_id": self.experiments[body["display_name"]], **body}
        if path == f"{api}runs" and method == "POST":
            return 200, {"run_id": "run-1", **body}
        if path == f"{api}recurringruns":
            return 200, {"recurring_run_id": "recurring-1", **body}
        records = self.runs.get(path.removeprefix(f"{api}runs/"), [])
        if records:
            return 200, records.pop(0) if len(records) > 1 else records[0]
        return (200, {}) if path == "/hook" else (404, {"error": f"{path}: not found"})


@contextmanager
def kubeflow_api(**settings: Any) -> Iterator[Kubeflow]:
    """A running server; `address` is where."""
    kubeflow = Kubeflow(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            kubeflow.received.append((self.command, parts.path, body, self.headers.get("Authorization")))
            status, answer = kubeflow.answer(self.command, parts.path, parse_qs(parts.query), body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kubeflow.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield kubeflow
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
