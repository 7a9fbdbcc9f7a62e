"""What tests ask of a running service, and what they expect of it."""

from typing import Any

from serving.event_records import read_events
from tests.serving.conftest import Running

RANK, EVENT = {"user_id": "u0001", "candidates": ["i0001"]}, {"user_id": "u0001", "item_id": "i0001", "action": "click"}


def post(running: Running, path: str, body: Any) -> dict[str, Any]:
    response = running.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def lines_of_events(running: Running) -> int:
    return sum(len(chunk) for chunk in read_events(running.state / "log" / "events"))


def taken_all(accepted: int, *, duplicates: int = 0, new_users: int = 0) -> dict[str, Any]:
    return {"accepted": accepted, "duplicates": duplicates, "rejected": 0, "pending": 0, "new_users": new_users, "rejections": []}
