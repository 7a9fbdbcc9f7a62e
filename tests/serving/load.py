"""A constant load on a service: clients that ask for lists and send events on connections they keep, and remember every answer."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Load:
    """`clients` threads, each asking for a list and sending an event every `pause` seconds, until `stop`."""

    url: str
    name: str
    clients: int = 3
    first: int = 0  # the users are u{first} and the `users` - 1 after it
    users: int = 60
    pause: float = 0.05
    timeout: float = 20.0
    headers: dict[str, str] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    arms: list[tuple[float, str]] = field(default_factory=list)  # when answered, arm
    seconds: list[tuple[float, str, float]] = field(default_factory=list)  # when answered, path, how long it took
    events: set[str] = field(default_factory=set)  # ids acknowledged as accepted
    fallbacks: Counter[str | None] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> "Load":
        self._threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def wait_for_answers(self, more: int, seconds: float = 60.0) -> None:
        """Until `more` lists were answered after now."""
        wanted, end = len(self.arms) + more, time.monotonic() + seconds
        while len(self.arms) < wanted:
            assert time.monotonic() < end, f"{len(self.arms)} of {wanted} answers; failures: {self.failures[:3]}"
            time.sleep(0.02)

    def __enter__(self) -> "Load":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=self.timeout, headers=self.headers) as client:
            count = 0
            while not self._stop.is_set():
                user, count = f"u{self.first + (7 * count + number) % self.users:04d}", count + 1
                answer = self._post(client, "/recommend", {"user_id": user, "k": 3})
                if answer is not None:
                    self.arms.append((time.monotonic(), answer["arm"]))
                    self.fallbacks[answer["fallback"]] += 1
                event = {"user_id": user, "item_id": f"i{1 + count % 50:04d}", "action": "click", "event_id": f"{self.name}-{number}-{count}"}
                taken = self._post(client, "/events", {"events": [event]})
                if taken is not None and taken["accepted"] == 1:
                    self.events.add(event["event_id"])
                self._stop.wait(self.pause)

    def _post(self, client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        start = time.monotonic()
        try:
            response = client.post(path, json=body)
        except httpx.HTTPError as error:
            self.failures.append(f"{path}: {type(error).__name__}: {error}")
            return None
        now = time.monotonic()
        self.statuses[f"{path} {response.status_code}"] += 1
        self.seconds.append((now, path, now - start))
        if response.status_code != 200:
            self.failures.append(f"{path}: {response.status_code}: {response.text[:200]}")
            return None
        return response.json()
