"""Malformed requests by the thousand against a running service: `python -m tests.serving.fuzz URL --count 100000 --pid WORKER`.

What is sent follows from the seed alone, each request on a connection of its own. The answer must be no 5xx, and must have our shape where it is a
refusal. Prints what was answered and how the worker's memory went.
"""

import argparse
import asyncio
import collections
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

GOOD: dict[str, Any] = {
    "/recommend": {"user_id": "u0001", "k": 3},
    "/rank": {"user_id": "u0001", "candidates": ["i0001", "i0002"]},
    "/events": {"events": [{"user_id": "u0001", "item_id": "i0001", "action": "click", "timestamp": "2026-01-01T00:00:00Z", "value": 1.5}]},
    "/demo/api/explain": {"user_id": "u0001", "arms": ["sam"], "k": 3},
    "/demo/api/users": {"starts": "u"},
}
PATHS = (
    *GOOD,
    "/",
    "/docs.json",
    "/metrics",
    "/readyz",
    "/livez",
    "/demo/",
    "/static_content/../../etc/passwd",
    "/%00",
    "/%ff%fe",
    "/rank/",
    "//rank",
    "*",
)
SPECIAL: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 31, 1 << 63, 1 << 64, -(1 << 70), 1e308, -0.0, 1e-320, "", " ", "0", "\x00", "\x1f", "\u2028", "é", "𐍈", "a" * 513,
    "a\nb", "../../etc/passwd", "%s%n",
    "${jndi:ldap://x}", "' OR 1=1 --", "<script>", "i0001", "u0001", [], [[]], {}, {"": {}}, [None], ["i0001"] * 70,
    "2026-13-45T99:99:99Z", "9999-12-31T23:59:59Z", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "now", "NaN", "Infinity",
)  # fmt: skip
TOKENS = ("Bearer ", "Bearer \xff\xfe", "Basic eDp5", "a" * 9_000)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "")
TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "multipart/form-data; boundary=x",
    "application/vnd.bentoml+pickle",
    "",
    "\xff",
)


@dataclass
class Found:
    """What a run was answered."""

    sent: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)  # "closed" where the connection was, without an answer
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)  # (requests sent, resident bytes of the worker)
    seconds: float = 0.0


def http(
    body: bytes, path: str = "/rank", method: str = "POST", headers: str = "Content-Type: application/json\r\n", length: str | None = None
) -> bytes:
    size = str(len(body)) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1", "replace") + body


def wrong_value(chance: random.Random) -> bytes:
    """A good request with one place of its JSON exchanged, lost, doubled or added."""
    path = chance.choice(tuple(GOOD))
    body = json.loads(json.dumps(GOOD[path]))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(body)
    node, key = chance.choice(places)
    what = chance.randrange(4)
    if what == 0 and isinstance(node, dict):
        del node[key]
    elif what == 1 and isinstance(node, list):
        node.extend(node * chance.randrange(1, 90))
    elif what == 2 and isinstance(node, dict):
        node[chance.choice(("limit", "", "user_id ", "__proto__", "k" * 600))] = chance.choice(SPECIAL)
    else:
        node[key] = chance.choice(SPECIAL)
    return http(json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"), path)


def wrong_bytes(chance: random.Random) -> bytes:
    """The bytes of a good body, some of them changed, cut or added."""
    path = chance.choice(tuple(GOOD))
    body = bytearray(json.dumps(GOOD[path]).encode())
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(body) + 1)
        body[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
    return http(bytes(body), path)


def wrong_json(chance: random.Random) -> bytes:
    """No JSON, or JSON that nobody writes: deep, long, doubled keys, numbers beyond floats, lone surrogates."""
    deep = chance.choice((10, 500, 5_000))
    bodies = (
        b"", b"{", b"null", b"[]", b"1e999", b"NaN", b"\xef\xbb\xbf{}", b'"' + b"x" * 9_000 + b'"', b"[" * deep, b"[" * deep + b"]" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep, b'{"user_id":"u0001","user_id":7,"candidates":["i0001"]}',
        b'{"user_id":"\\ud800","candidates":["i0001"]}',
        b'{"user_id":"u0001","k":1e400}', b'{"user_id":"u0001","k":' + b"9" * 5_000 + b"}",
        b'{"user_id":"u0001","candidates":[' + b'"i0001",' * 2_000 + b'"i1"]}',
        b'{"events":[{"user_id":"u0001","item_id":"i0001","action":"click","value":-1e999}]}', b"\x00" * 100, b"\xff\xfe{\x00}\x00", b" " * 30_000,
    )  # fmt: skip
    return http(chance.choice(bodies), chance.choice(tuple(GOOD)))


def wrong_frame(chance: random.Random) -> bytes:
    """HTTP that is none, or not quite: methods, versions, lengths, chunks, headers, smuggling."""
    body = json.dumps(GOOD["/rank"]).encode()
    head = "Content-Type: application/json\r\n"
    many = "".join(f"X-{n}: {n}\r\n" for n in range(chance.choice((70, 300))))
    frames: tuple[Callable[[], bytes], ...] = (
        lambda: chance.randbytes(chance.randrange(1, 400)),
        lambda: http(body, method=chance.choice(METHODS), path=chance.choice(PATHS)),
        lambda: http(body, headers=f"Content-Type: {chance.choice(TYPES)}\r\n"),
        lambda: http(body, length=chance.choice(("-1", "0", "99999999999999999999", "1e3", "abc", "", "5"))),
        lambda: http(body, headers=head + "Transfer-Encoding: chunked\r\n"),
        lambda: http(b"zz\r\nxx\r\n0\r\n\r\n", headers=head + "Transfer-Encoding: chunked, identity\r\n"),
        lambda: http(body, headers=head + many),
        lambda: http(body, headers=head + f"X-Long: {'a' * chance.choice((20_000, 90_000))}\r\n"),
        lambda: http(body, headers=head + f"X-Request-Id: {chance.choice(('a' * 300, chr(0xE9), '..', '%0d%0aX: y'))}\r\n"),
        lambda: http(body, headers=head + f"Authorization: {chance.choice(TOKENS)}\r\n"),
        lambda: http(body, headers=head + "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n"),
        lambda: http(body, headers=head + "Expect: 100-continue\r\n"),
        lambda: http(body, path="/" + "a" * chance.choice((300, 20_000, 70_000))),
        lambda: http(body, path=f"/rank?{chance.choice(('a=b', '%', chr(0xFF), 'x' * 3_000))}"),
        lambda: http(body).replace(b"HTTP/1.1", chance.choice((b"HTTP/0.9", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"http/1.1", b""))),
        lambda: http(body).replace(b"\r\n", b"\n"),
        lambda: http(body)[: chance.randrange(1, 150)],
        lambda: http(body) + chance.randbytes(50),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    return chance.choice(frames)()


KINDS = (wrong_value, wrong_value, wrong_bytes, wrong_json, wrong_frame)


async def fuzz(url: str, *, count: int, seed: int = 0, clients: int = 8, worker: int | None = None) -> Found:
    """Send `count` requests; `worker` is the process whose memory is watched."""
    chance, found, start = random.Random(seed), Found(), time.monotonic()
    parts = urlsplit(url)
    process = psutil.Process(worker) if worker else None

    async def client() -> None:
        while found.sent < count:
            kind = chance.choice(KINDS)
            request = kind(chance)
            found.sent += 1
            if process and found.sent % max(1, count // 20) == 0:
                found.memory.append((found.sent, process.memory_info().rss))
            answer = await send(parts.hostname or "", parts.port or 80, request)
            _judge(found, kind, request, answer)

    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds = time.monotonic() - start
    return found


async def send(host: str, port: int, request: bytes) -> bytes:
    """All that is answered until the connection is closed; nothing comes of a request that is not whole, so we close our side too."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(0.3 if b"\r\n\r\n" not in request else 30):
            return await reader.read()
    except TimeoutError:
        return b""
    except OSError:
        return b""
    finally:
        writer.transport.abort()


def _judge(found: Found, kind: Callable[..., bytes], request: bytes, answer: bytes) -> None:
    status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"
    found.statuses[status] += 1
    fault = None
    if status.startswith("5"):
        fault = "a 5xx"
    elif status == "closed" and kind is not wrong_frame:
        fault = "no answer"
    elif b"Traceback" in answer or b"site-packages" in answer:
        fault = "a stack trace"
    elif status.startswith("4") and not request.startswith(b"HEAD"):
        body = answer.partition(b"\r\n\r\n")[2]
        try:
            if set(json.loads(body)) != {"error", "detail"}:
                fault = "another shape"
        except ValueError:
            fault = "no JSON"
    if fault and len(found.faults) < 20:
        found.faults.append(f"{fault}: {request[:300]!r} -> {answer[:300]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int)
    arguments = parser.parse_args()
    found = asyncio.run(fuzz(arguments.url, count=arguments.count, seed=arguments.seed, worker=arguments.pid))
    print(f"{found.sent} requests in {found.seconds:.0f} s; answers: {dict(sorted(found.statuses.items()))}")
    print("resident MiB:", ", ".join(f"{sent}: {size / 2**20:.0f}" for sent, size in found.memory))
    print("\n".join(found.faults) or "no fault")


if __name__ == "__main__":
    main()
