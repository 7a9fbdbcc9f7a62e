"""What was acknowledged is there exactly once, and nothing is that nobody sent: many clients, a service that is killed at random moments, retries."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import httpx
import psutil

from features.definitions import HISTORY, HISTORY_ARRAYS
from features.online import OnlineFeatures
from serving.artifacts import ARTIFACTS
from serving.event_records import LoggedEvent, read_events
from tests.serving.bento import Outputs, server
from tests.serving.ledger import START, Ledger, told

ROOT = Path(__file__).parents[2]


def check(ledger: Ledger, state: Path, online: OnlineFeatures, before: dict[int, int], ids: dict[str, int]) -> None:
    """The log and, as Feast reads them, the histories hold each acknowledged event once, in one order, and nothing that was not sent."""
    logged = [event for chunk in read_events(state / "log" / "events") for event in chunk]
    names = [event.event_id for event in logged]
    assert len(names) == len(set(names)), "an event stands in the log twice"
    assert ledger.acknowledged <= set(names), "an acknowledged event is lost"
    assert set(names) <= set(ledger.sent), "an event was invented"
    for event in logged:
        row = ledger.sent[str(event.event_id)]
        assert (event.user, event.item, event.action) == (row["user_id"], row["item_id"], row["action"])
    own: dict[str, list[LoggedEvent]] = defaultdict(list)
    for event in logged:
        own[event.user].append(event)
    features = [f"{HISTORY}:{name}" for name in (*HISTORY_ARRAYS, "history_length")]
    found = online._store.get_online_features(features=features, entity_rows=[{"user_id": ids[key]} for key in own]).to_dict()
    for place, (key, events) in enumerate(own.items()):
        assert found["history_length"][place] == before.get(ids[key], 0) + len(events), f"{key}: an event is lost or there twice"
        times = found["times"][place][-len(events) :]
        assert times == [event.timestamp for event in events][-len(times) :], f"{key}: the history is not in the order of the log"
        newest = events[-len(times) :]  # the store keeps no more
        assert sorted(times) == sorted(START + int(str(event.event_id)[1:]) for event in newest)


def test_a_service_that_is_killed_while_many_clients_send(packaged: Outputs, tmp_path: Path) -> None:
    """Through HTTP and the packaged service with SQLite: SIGKILL for all its processes, twice, at moments nobody chose."""
    state, ledger, rng = tmp_path / "state", Ledger(), random.Random()
    snapshot = packaged.bento / "src" / ARTIFACTS / "feast"
    for life in range(3):
        with server(packaged.bento, state) as (client, process):
            stop = threading.Event()
            clients = [threading.Thread(target=send, args=(str(client.base_url), ledger, stop, n)) for n in range(16)]
            for thread in clients:
                thread.start()
            time.sleep(1.5 + rng.random())
            if life < 2:
                for each in [*psutil.Process(process).children(recursive=True), psutil.Process(process)]:
                    each.send_signal(signal.SIGKILL)
            stop.set()
            for thread in clients:
                thread.join()
    assert len(ledger.acknowledged) > 300
    (folder,) = (state / "online").iterdir()
    ids = known_users(packaged) | new_users(folder)
    assert len(ids) > 60, "clients should have met new users"
    untouched = OnlineFeatures(snapshot, state=tmp_path / "untouched").read(range(1, 61), 1).totals_B.tolist()
    before = dict(zip(range(1, 61), untouched, strict=True))
    check(ledger, state, OnlineFeatures(snapshot, state=folder), before, ids)


def known_users(packaged: Outputs) -> dict[str, int]:
    import pyarrow.parquet as pq

    table = pq.read_table(packaged.tables / "users.parquet")
    return dict(zip(table["user_key"].to_pylist(), table["user_id"].to_pylist(), strict=True))


def new_users(folder: Path) -> dict[str, int]:
    lines = (folder / "new_users.csv").read_text().splitlines()[1:]
    found = {key: int(number) for key, number in (line.rsplit(",", 1) for line in lines)}
    assert len(found) == len(lines) == len(set(found.values())), "a user was met twice"
    return found


def send(address: str, ledger: Ledger, stop: threading.Event, seed: int) -> None:
    """A client: batch after batch; what gets no answer is left for whoever sends it again."""
    rng = random.Random(seed + time.time_ns())
    with httpx.Client(base_url=address, timeout=20) as client:
        while not stop.is_set():
            rows = ledger.batch(rng)
            try:
                response = client.post("/events", json={"events": rows})
            except httpx.TransportError:
                ledger.failed(rows)
                return
            if response.status_code == 200:
                ledger.answered(rows, response.json())
            else:
                assert response.status_code == 503, response.text
                ledger.failed(rows)


# ---------------------------------------------------------------- the same without HTTP: many more deaths, at finer moments


def test_an_intake_that_is_killed_again_and_again(packaged: Outputs, tmp_path: Path) -> None:
    """Log, index of ids, group commit, users, histories in SQLite: everything but HTTP and the models, killed within milliseconds of anything."""
    snapshot = packaged.bento / "src" / ARTIFACTS / "feast"
    command = [sys.executable, "-c", _LIVES, str(snapshot), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.stdout.split().count("killed") >= 12 and ended.stdout.split()[-1] == "done", ended.stdout + ended.stderr[-3_000:]
    ledger = Ledger()
    for word, content in told(tmp_path / "told"):
        if word == "sent":
            ledger.remember(content)
        else:
            ledger.acknowledged |= set(content)
    assert len(ledger.acknowledged) > 100
    (folder,) = (tmp_path / "state" / "online").iterdir()
    ids = {"u0001": 1, "u0002": 2, "u0003": 3} | new_users(folder)
    untouched = OnlineFeatures(snapshot, state=tmp_path / "untouched").read([1, 2, 3], 1).totals_B.tolist()
    check(ledger, tmp_path / "state", OnlineFeatures(snapshot, state=folder), dict(zip([1, 2, 3], untouched, strict=True)), ids)


_LIVES = """
import json, os, random, signal, sys, threading, time
from contextlib import nullcontext
from pathlib import Path
from features.online import OnlineFeatures
from serving.intake import Intake
from serving.schemas import EventsRequest
from serving.state import State, StateSettings
from serving.users import Users
from tests.serving.ledger import Ledger, told

snapshot, folder = Path(sys.argv[1]), Path(sys.argv[2])
told_to = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
online = OnlineFeatures(snapshot, state=folder / "state" / "online" / ("f" * 16))  # each life opens its own connection for writing

class Items:
    def id_of(self, key):
        return int(key[1:])

def tell(word, content):
    os.write(told_to, f"{word} {json.dumps(content)}\\n".encode())

def life(number, alive):
    from longtrail.config import EventLogSettings
    state = State(StateSettings(folder=folder / "state"), "f" * 64, None, EventLogSettings(segment_bytes=4_000))
    users = Users({"u0001": 1, "u0002": 2, "u0003": 3, "the last of the snapshot": 60}, state)
    os.write(alive, b"x")
    timer = lambda stage: nullcontext()
    intake = Intake(log=state.events, users=users, catalogue=Items(), actions=("click",), online=online, timer=timer, max_events=99)
    if number < 0:
        os._exit(0)
    ledger = Ledger()
    os.write(told_to, b"\\n")
    lines = told(folder / "told")
    acknowledged = {name for word, content in lines if word == "acknowledged" for name in content}
    for word, rows in lines:
        if word == "sent":
            ledger.remember(rows)
            if not {event["event_id"] for event in rows} <= acknowledged:
                ledger.unanswered.append(rows)

    def client(seed):
        rng = random.Random(seed)
        while True:
            rows = ledger.batch(rng)
            tell("sent", rows)
            answer = intake.take(EventsRequest.model_validate({"events": rows}))
            assert answer.accepted + answer.duplicates == len(rows)
            tell("acknowledged", [event["event_id"] for event in rows])

    for n in range(6):
        threading.Thread(target=client, args=(1000 * number + n,)).start()
    time.sleep(60)

random.seed()
for number in [*range(14), -1]:
    alive, other = os.pipe()
    child = os.fork()
    if child == 0:
        life(number, other)
    os.close(other)
    os.read(alive, 1)
    os.close(alive)
    if number >= 0:
        time.sleep(random.random() ** 2 * 0.3)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "done" if status == 0 else f"failed {status}", flush=True)
"""
