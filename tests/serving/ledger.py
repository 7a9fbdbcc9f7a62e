"""What clients of /events sent and were told. Light to import: processes that are killed by the dozen use it."""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START = 1_600_000_000_000_000  # µs; each event happened at its own moment, so that it can be told apart in a history
ITEMS = 50


@dataclass
class Ledger:
    """What clients sent and what they were told, by event id; shared by all threads."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    unanswered: list[list[dict[str, Any]]] = field(default_factory=list)  # batches whose answer never came
    duplicates: int = 0
    made: int = 0  # the next event's number; not how many were sent: a line torn by a kill leaves a hole, and no number may come twice
    lock: threading.Lock = field(default_factory=threading.Lock)

    def batch(self, rng: random.Random) -> list[dict[str, Any]]:
        """New events of a few users, old and new, or a batch whose answer never came."""
        with self.lock:
            if self.unanswered and rng.random() < 0.5:
                return self.unanswered.pop(rng.randrange(len(self.unanswered)))
            rows = []
            for _ in range(rng.randrange(1, 5)):
                number = self.made
                user = rng.choice(["u0001", "u0002", "u0003", "new-1", "new-2", f"new-{number // 40}"])
                moment = START + number
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment // 10**6)) + f".{moment % 10**6:06d}Z"
                event = {"event_id": f"e{number}", "user_id": user, "item_id": f"i{1 + number % ITEMS:04d}", "action": "click", "timestamp": stamp}
                self.remember([event])
                rows.append(event)
            return rows

    def remember(self, rows: list[dict[str, Any]]) -> None:
        """Events that were sent, in this life or an earlier one."""
        self.sent |= {event["event_id"]: event for event in rows}
        self.made = max(self.made, *(1 + int(event["event_id"][1:]) for event in rows))

    def answered(self, rows: list[dict[str, Any]], answer: dict[str, Any]) -> None:
        assert answer["accepted"] + answer["duplicates"] == len(rows) and answer["rejected"] == 0, answer
        with self.lock:
            self.acknowledged |= {event["event_id"] for event in rows}
            self.duplicates += answer["duplicates"]

    def failed(self, rows: list[dict[str, Any]]) -> None:
        with self.lock:
            self.unanswered.append(rows)


def told(path: Path) -> list[tuple[str, Any]]:
    """(word, content) of each line a client wrote before it was killed. A line torn by that is none: what it tells of was not done, or not heard."""
    lines = []
    for line in path.read_text().splitlines():
        word, _, content = line.partition(" ")
        try:
            lines.append((word, json.loads(content)))
        except ValueError:
            continue
    return lines
