"""One service under constant load, all along: its model is swapped, a bad one refused, its worker killed, and it is told to stop."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from longtrail.files import write_json
from serving.canary import FOLDER, RECORD
from serving.event_records import read_events
from serving.guard import AVOIDED, SLOW
from tests.serving.bento import ROOT, Outputs, server
from tests.serving.load import Load


@pytest.fixture(scope="module")
def second(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same features, another arm: the incumbent, beside a canary that nobody is in."""
    made = Outputs(tmp_path_factory.mktemp("second"))
    for part in ("champion", "features", "tables", "validation"):
        (made.root / part).symlink_to(packaged.root / part)
    params = yaml.safe_load((packaged.root / "params.yaml").read_text())
    arms = {"popularity": {"model": "incumbent", "share": 1.0}, "fresh": {"model": "champion"}}
    params["serving"]["experiment"] = {"arms": arms, "canary": {"arm": "fresh", "steps": [1e-9]}}
    (made.root / "params.yaml").write_text(yaml.safe_dump(params))
    made.ab.mkdir()
    write_json(made.ab / "report.json", {"verdict": "equivalent", "sentence": "no better"})
    return made.package()


@pytest.fixture(scope="module")
def service(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, int, Path]]:
    state = tmp_path_factory.mktemp("swap") / "state"
    with server(packaged.bento, state) as (client, process):
        yield client, process, state


def swap(bento: Path, state: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.swap", "--bento", str(bento), "--state", str(state)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)


def workers(process: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(process).children() if "serving.worker" in " ".join(child.cmdline())]


def logged(state: Path) -> Counter[str | None]:
    return Counter(event.event_id for events in read_events(state / "log" / "events") for event in events)


def check_served(load: Load, *arms: str) -> None:
    """Nothing failed, and all lists are of these arms, or short of a history that a busy machine read too slowly."""
    assert not load.failures, load.failures[:5]
    assert set(load.fallbacks) <= {None, SLOW, AVOIDED}
    assert set(arms) <= {arm for _, arm in load.arms} <= {*arms, "popularity_fallback"}


def check_nothing_lost(load: Load, state: Path) -> None:
    """Every acknowledged event once, and none that nobody sent."""
    found = {event_id: times for event_id, times in logged(state).items() if event_id and event_id.startswith(f"{load.name}-")}
    assert load.events and set(found) >= load.events and set(found.values()) == {1}


def test_a_bento_that_is_damaged_is_refused_and_the_old_one_serves_on(
    service: tuple[httpx.Client, int, Path], packaged: Outputs, tmp_path: Path
) -> None:
    client, process, state = service
    bad = tmp_path / "bad"
    shutil.copytree(packaged.bento, bad)
    weights = next((bad / "src" / "artifacts" / "ranker").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with Load(str(client.base_url), "refused", clients=2) as load:
        load.wait_for_answers(4)
        done = swap(bad, state)
        load.wait_for_answers(8)
    assert done.returncode == 1 and "the old one serves on" in done.stderr
    assert f"ranker/{weights.name}: SHA-256 is" in done.stderr, done.stderr
    check_served(load, "sam")
    assert len(workers(process)) == 1
    check_nothing_lost(load, state)


def test_a_new_worker_that_fails_with_the_state_folder_gives_it_back(service: tuple[httpx.Client, int, Path], second: Path) -> None:
    """It loads, the old one gives the folder up, and only then does the new one find what it cannot read: the record of its canary."""
    client, process, state = service
    before, record = workers(process), state / FOLDER / RECORD
    record.parent.mkdir(exist_ok=True)
    record.write_text("{")
    with Load(str(client.base_url), "returned", clients=2, timeout=60.0) as load:
        load.wait_for_answers(4)
        done = swap(second, state)
        record.unlink()
        acknowledged = len(load.events)
        load.wait_for_answers(8)
    assert done.returncode == 1 and f"the old one serves on: {record}: not the record of a canary" in done.stderr, done.stderr
    output = (state.parent / f"{state.name}.out").read_text(errors="replace")
    assert output.count("ready: arm sam") == 2, "the old one opened the folder again: it had given it up"
    check_served(load, "sam")
    assert [worker.pid for worker in workers(process)] == [worker.pid for worker in before]
    assert len(load.events) > acknowledged, "events are taken again"
    check_nothing_lost(load, state)
    taken = client.post(
        "/events", json={"events": [{"user_id": "u0001", "item_id": "i0001", "action": "click", "event_id": "returned-last"}] * 2}
    ).json()
    assert (taken["accepted"], taken["duplicates"], taken["pending"]) == (1, 1, 0), "they reach the histories; what was taken before is known"
    assert httpx.get(f"{client.base_url}/readyz").status_code == 200


def test_a_swap_under_load_drops_nothing(service: tuple[httpx.Client, int, Path], second: Path) -> None:
    client, process, state = service
    before = workers(process)
    with Load(str(client.base_url), "swap", timeout=60.0) as load:
        load.wait_for_answers(10)
        done = swap(second, state)
        assert done.returncode == 0, done.stderr
        served_at = time.monotonic()
        load.wait_for_answers(60)
    check_served(load, "sam", "popularity")
    assert {status.split()[1] for status in load.statuses} == {"200"}
    personal = [(at, arm) for at, arm in load.arms if arm != "popularity_fallback"]
    assert personal[0][1] == "sam" and personal[-1][1] == "popularity"
    assert all(arm == "popularity" for at, arm in personal if at > served_at + 10), "old connections end soon"
    lists, events = (max(seconds for _, path, seconds in load.seconds if path == each) for each in ("/recommend", "/events"))
    assert events < 35, "an event waits while the state folder changes hands"
    assert lists < max(events, 5), "a list does not"
    check_nothing_lost(load, state)
    psutil.wait_procs(before, timeout=60)
    assert not any(worker.is_running() for worker in before) and len(workers(process)) == 1


def test_a_killed_worker_is_started_again(service: tuple[httpx.Client, int, Path]) -> None:
    """The listening socket outlives it: who connects meanwhile waits, nobody is turned away; only what it had in work is lost."""
    client, process, state = service
    with Load(str(client.base_url), "killed", clients=2, timeout=120.0) as load:
        load.wait_for_answers(4)
        workers(process)[0].kill()
        load.wait_for_answers(20, 150)
    assert len(load.failures) <= 2 * load.clients, load.failures
    check_nothing_lost(load, state)


def test_told_to_stop_it_finishes_its_work_and_goes(service: tuple[httpx.Client, int, Path]) -> None:
    """The last test of this service."""
    client, process, state = service
    codes: list[int] = []

    def probe() -> None:
        while not codes or codes[-1] != 503:
            try:
                codes.append(httpx.get(f"{client.base_url}/readyz", timeout=5).status_code)
            except httpx.HTTPError:
                return

    with Load(str(client.base_url), "stopped", clients=2, pause=0.0) as load:
        load.wait_for_answers(4)
        watcher = threading.Thread(target=probe)
        watcher.start()
        told = time.monotonic()
        os.kill(process, signal.SIGTERM)
        load._stop.wait(0.3)
        load.stop()
    watcher.join(10)
    assert 503 in codes, "readyz says no at once, while requests are still taken"
    assert not [failure for failure in load.failures if "Connect" not in failure], "what was taken is answered"
    psutil.wait_procs([psutil.Process(process)], timeout=40)
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - told < 40
    check_nothing_lost(load, state)
