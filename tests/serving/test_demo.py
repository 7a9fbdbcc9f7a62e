"""The demo through the real server: its routes, and the page in headless Chromium, by mouse, keyboard and finger."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from serving.demo.app import Demo
from tests.components.chromium import BROWSER
from tests.serving.bento import log_lines
from tests.serving.browser import Browser, browser
from tests.serving.canned import EVENTS, HOSTILE, Canned, canned
from tests.serving.conftest import Running

LOOKED_AT = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the demo page is not looked at")
READY = "document.querySelectorAll('#items-a .item').length > 0 && !document.querySelector('.waiting')"
PICKED = f"document.getElementById('changed').textContent && {READY}"


def ask(running: Running, path: str, body: Any) -> dict[str, Any]:
    response = running.client.post(f"/demo/api/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def history(running: Running, user: str) -> list[str]:
    answer = ask(running, "explain", {"user_id": user, "arms": ["sam"]})
    return [answer["items"][item][0] for item in answer["history"]["items"]]


# ---------------------------------------------------------------- routes


def test_the_page_is_files_of_this_service_alone(running: Running) -> None:
    entered = running.client.get("/demo")
    assert entered.status_code == 307 and entered.headers["location"] == "demo/"
    page = running.client.get("/demo/")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", page.text)
    files = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
    assert {"demo.css", "main.js", "icon.svg"} == files
    script = running.client.get("/demo/main.js")
    files |= set(re.findall(r'from "\./([^"]+)"', script.text))
    for name in files:
        found = running.client.get(f"/demo/{name}")
        assert found.status_code == 200 and found.headers["content-security-policy"] == policy, name
        assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", found.text), name
        assert "innerHTML" not in found.text and "insertAdjacentHTML" not in found.text and "eval(" not in found.text, name
    for name in ("app.py", "..%2fdemo%2fapp.py", "%2e%2e/service.py", "nothing.js"):
        assert running.client.get(f"/demo/{name}").status_code == 404, name


def test_setup_names_arms_actions_and_users(running: Running) -> None:
    setup = running.client.get("/demo/api/setup").json()
    assert [arm["name"] for arm in setup["arms"]] == ["sam", "popularity_fallback"]
    assert [arm["kind"] for arm in setup["arms"]] == ["attention", None] and setup["actions"] == ["click", "view"]
    assert setup["suggestions"][0] == {"user_id": "u0000", "events": 40, "why": "longest"}
    assert [one["user_id"] for one in ask(running, "users", {"starts": "u003"})["users"]] == [f"u003{digit}" for digit in range(8)]


def test_explaining_leaves_no_trace(running: Running) -> None:
    logged, metrics = log_lines(running.state), running.client.get("/metrics").text
    answer = ask(running, "explain", {"user_id": "u0011", "arms": ["sam", "popularity_fallback"], "k": 7})
    assert len(answer["arms"][0]["list"]) == 7
    assert log_lines(running.state) == logged
    pattern = r"^longtrail_(?:answers_total|stage_seconds_count).*$"
    assert re.findall(pattern, running.client.get("/metrics").text, re.M) == re.findall(pattern, metrics, re.M)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("explain", {"user_id": "u0001"}, "arms: missing"),
        ("explain", {"user_id": "u0001", "arms": []}, "arms"),
        ("explain", {"user_id": "u0001", "arms": ["sam"] * 3}, "arms"),
        ("explain", {"user_id": "u0001", "arms": ["nobody"]}, "arms[0]: unknown arm"),
        ("explain", {"user_id": "u0001", "arms": ["sam"], "k": 21}, "k"),
        ("explain", {"user_id": "u\n", "arms": ["sam"]}, "user_id"),
        ("explain", {"user_id": "u0001", "arms": ["sam"], "more": 1}, "more: unknown field"),
        ("users", {"starts": "x" * 600}, "starts"),
        ("users", {"starts": 3}, "starts"),
        ("users", [], "body"),
    ],
)
def test_what_is_refused(running: Running, path: str, body: Any, says: str) -> None:
    response = running.client.post(f"/demo/api/{path}", json=body)
    assert response.status_code == 400 and says in response.json()["error"], response.text


def test_other_bodies_methods_and_types_are_refused(running: Running) -> None:
    client = running.client
    assert (
        client.post("/demo/api/explain", content=b'{"user_id": "u0001", "arms": ["sam"]', headers={"Content-Type": "application/json"}).status_code
        == 400
    )
    assert client.post("/demo/api/explain", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post("/demo/api/users", json={"starts": "x" * 18_000}).status_code == 413
    assert client.get("/demo/api/explain").status_code == 405 and client.post("/demo/api/nothing", json={}).status_code in (404, 405)


def test_switched_off_it_answers_404_everywhere() -> None:
    from starlette.testclient import TestClient

    client = TestClient(Demo(enabled=False).app(), follow_redirects=False)
    for path in ("/demo", "/demo/", "/demo/main.js", "/demo/api/setup"):
        response = client.get(path)
        assert response.status_code == 404 and "serving.demo" in response.json()["error"], path
    response = client.post("/demo/api/explain", json={"user_id": "a", "arms": ["b"]})
    assert response.status_code == 404
    not_ready = TestClient(Demo(enabled=True).app()).get("/demo/api/setup")
    assert not_ready.status_code == 503 and not_ready.headers["retry-after"]


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def page(screen: Browser) -> Iterator[Browser]:
    """Whatever a test does: nothing is thrown, blocked or asked of another host. Faults that a test makes it clears itself."""
    screen.faults.clear()
    screen.asked.clear()
    screen.screen(1280, 900)
    yield screen
    assert not screen.faults
    assert {urlsplit(address).hostname for address in screen.asked} <= {"127.0.0.1", None}


def visit(page: Browser, running: Running, user: str, *, ready: str = READY) -> None:
    page.go(f"{str(running.client.base_url).rstrip('/')}/demo#user={user}")
    page.until(ready)


def text(page: Browser, selector: str) -> str:
    return page.js(f"document.querySelector({selector!r}).innerText")


def titles(page: Browser, side: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('#items-{side} .name bdi')].map((one) => one.textContent)")


@LOOKED_AT
def test_a_pick_changes_the_history_and_the_lists(running: Running, page: Browser) -> None:
    before, logged = history(running, "u0021"), log_lines(running.state)
    visit(page, running, "u0021")
    assert text(page, "#history-title") == "History of u0021" and text(page, "#history-facts").startswith("40 events, ")
    assert len(titles(page, "a")) == 10 == len(titles(page, "b")) and "of 30 candidates" in text(page, "#facts-a")
    assert page.js("document.querySelectorAll('.plot.row').length") == 3, "a row for each pass of SAM"
    chosen = titles(page, "a")[3]
    page.hover("#items-a li:nth-child(4) .item")
    assert f"Weighed for {chosen}" in text(page, "#why") and page.js("document.querySelectorAll('.row .weight').length") >= 3
    page.click("#items-a li:nth-child(4) .pick")
    page.until(PICKED)
    assert history(running, "u0021") == [*before, chosen.removeprefix("Item ")]
    assert f"Recorded click for {chosen}" in text(page, "#changed")
    assert chosen not in titles(page, "a") and text(page, "#history-facts").startswith("41 events")
    assert text(page, "#events li.fresh").startswith(chosen) and page.js("Boolean(document.querySelector('#strip .grown'))")
    moved = page.js("document.querySelectorAll('#items-a .move.new, #items-a .move.up, #items-a .move.down').length")
    assert moved >= 1, "at least the item that came in is marked"
    assert log_lines(running.state) == logged


@LOOKED_AT
def test_it_works_by_keyboard_alone(running: Running, page: Browser) -> None:
    visit(page, running, "u0030")
    focused = "document.activeElement"
    page.key("Tab")
    assert page.js(f"{focused}.className") == "skip" and page.js(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.key("Tab")
    assert page.js(f"{focused}.id") == "user"
    page.type("u003")
    page.until("document.querySelectorAll('#found [role=option]').length === 8")
    page.key("ArrowDown", times=3)
    assert page.js("document.getElementById(document.getElementById('user').getAttribute('aria-activedescendant')).innerText").startswith("u0032")
    page.key("Enter")
    page.until(f"document.getElementById('history-title').innerText === 'History of u0032' && {READY}")
    # The timeline: to its oldest column, whose events are then listed.
    page.js("document.getElementById('by-time').focus()")
    page.key("Tab")
    assert page.js(f"{focused}.id") == "strip"
    page.key("Home")
    assert (
        page.js(f"{focused}.getAttribute('aria-valuetext')") == text(page, "#cursor") and page.js(f"{focused}.getAttribute('aria-valuenow')") == "1"
    )
    page.key("Enter")
    assert page.js("document.querySelectorAll('#events li').length") == 1 and not page.js("document.getElementById('newest').hidden")
    # On through the controls to the first item, down to the second, and pick it.
    for _ in range(12):
        if page.js(f"{focused}.className") == "item":
            break
        page.key("Tab")
    second = titles(page, "a")[1]
    page.key("Tab", times=2)
    assert text(page, "#why").startswith(f"Weighed for {second}") and page.js(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.key("Enter")
    assert page.js(f"{focused}.getAttribute('aria-pressed')") == "true"
    page.key("Tab")
    assert page.js(f"{focused}.getAttribute('aria-label')") == f"Record click for {second}"
    page.key("Enter")
    page.until(PICKED)
    assert history(running, "u0032")[-1] == second.removeprefix("Item ")
    assert page.js(f"{focused}.className") == "pick", "the focus went to whoever stands there now"


@LOOKED_AT
def test_it_works_on_a_phone(running: Running, page: Browser) -> None:
    page.screen(375, 812)
    visit(page, running, "u0040")
    assert page.js("document.documentElement.scrollWidth") == 375
    assert page.js("document.querySelector('.list.a').offsetParent !== null && document.querySelector('.list.b').offsetParent === null")
    low = page.js("[...document.querySelectorAll('.list.a button')].filter((one) => one.getBoundingClientRect().height < 44).length")
    assert low == 0, "everything is large enough for a finger"
    third = titles(page, "a")[2]
    page.tap("#items-a li:nth-child(3) .item")
    page.until("document.querySelector('#items-a li:nth-child(3) .item').getAttribute('aria-pressed') === 'true'")
    assert third in text(page, "#why")
    stuck = page.js("document.querySelector('.history').getBoundingClientRect().bottom")
    assert 0 < stuck < 330, "the plots stay in sight, and leave room for the list"
    page.tap("#items-a li:nth-child(3) .pick")
    page.until(PICKED)
    assert history(running, "u0040")[-1] == third.removeprefix("Item ")
    page.tap("#sides button:last-child")
    page.until("document.querySelector('.list.b').offsetParent !== null && document.querySelector('.list.a').offsetParent === null")
    assert page.js("document.documentElement.scrollWidth") == 375


@LOOKED_AT
def test_a_stranger_becomes_known(running: Running, page: Browser) -> None:
    visit(page, running, "")
    page.click("#suggestions .visitor")
    page.until("document.getElementById('notice').innerText.startsWith('Nobody knows this user')")
    assert titles(page, "a") == titles(page, "b") and text(page, "#facts-a") == "most popular: unknown user"
    assert text(page, "#events").strip() == "No events yet."
    page.click("#items-b li:nth-child(2) .pick")
    page.until(PICKED)
    assert page.js("document.getElementById('notice').hidden") and text(page, "#history-facts").startswith("1 event, ")
    assert "candidates" in text(page, "#facts-a") and "a list of their own now" in text(page, "#changed")


@LOOKED_AT
def test_pictures(running: Running, page: Browser, tmp_path: Path) -> None:
    """Taken of every run, kept where LONGTRAIL_SCREENSHOTS says."""
    keep = os.environ.get("LONGTRAIL_SCREENSHOTS")
    folder = Path(keep).resolve() if keep else tmp_path
    backgrounds = set()
    for name, width, height, dark in (
        ("desk", 1280, 900, False),
        ("desk_dark", 1280, 900, True),
        ("phone", 375, 812, False),
        ("phone_dark", 375, 812, True),
    ):
        page.screen(width, height, dark=dark)
        visit(page, running, "u0050")
        backgrounds.add(page.js("getComputedStyle(document.body).backgroundColor"))
        out = page.picture(folder / f"demo_{name}{'_dark' * dark}.png")
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
        assert page.js("document.documentElement.scrollWidth") == width
    assert len(backgrounds) == 2


# ---------------------------------------------------------------- the page over answers made by hand


@pytest.fixture
def made() -> Iterator[Canned]:
    with canned() as answers:
        yield answers


@LOOKED_AT
def test_nothing_from_the_log_is_read_as_markup(made: Canned, page: Browser) -> None:
    page.go(made.url)
    page.until(READY)
    assert titles(page, "a")[0] == f"0 {HOSTILE}" and titles(page, "a")[1] == f"key1{HOSTILE}", "a title, or the key where there is none"
    page.click("#items-a li:nth-child(2) .pick")
    page.until(PICKED)
    page.click("#user")
    page.type("x")
    page.until("document.querySelectorAll('#found li').length === 1")
    page.hover("#strip")
    assert page.js("window.harmed") is None
    assert page.js("document.querySelectorAll('img').length") == 1 and page.js("document.querySelectorAll('script').length") == 1
    assert made.picked[0]["item_id"] == f"key1{HOSTILE}" and made.picked[0]["action"] == "buy"


@LOOKED_AT
def test_thousands_of_events_stay_readable(made: Canned, page: Browser) -> None:
    page.go(made.url)
    page.until(READY)
    assert page.js("document.querySelectorAll('svg *').length") < 80, "no element an event"
    assert page.js("Number(document.getElementById('strip').getAttribute('aria-valuemax'))") <= 300
    assert text(page, "#history-facts").startswith(f"the newest {EVENTS:,} of 5,000 events, 14 Jul 2017 – ")
    assert page.js("document.querySelectorAll('#events li').length") == 12
    page.click("#older")
    assert page.js("document.querySelectorAll('#events li').length") == 24
    page.click("#by-time")
    assert page.js("document.getElementById('by-time').getAttribute('aria-pressed')") == "true"
    page.js("document.getElementById('strip').focus()")
    page.key("Home")
    assert re.fullmatch(r"\d+ events, 14 Jul 2017 – .*: \d+ look.*, \d+ buy", text(page, "#cursor").replace("\u202e", ""), re.S)
    page.key("End")
    assert page.js(
        "document.getElementById('strip').getAttribute('aria-valuenow') === document.getElementById('strip').getAttribute('aria-valuemax')"
    )
    assert EVENTS == 4_000


@LOOKED_AT
def test_faults_are_said_and_overcome(made: Canned, page: Browser) -> None:
    made.token = "secret"
    page.go(made.url)
    page.until("!document.getElementById('token-form').hidden")
    assert text(page, "#trouble-text") == "The service wants a token."
    page.type("secret")
    page.key("Enter")
    page.until(READY)
    assert page.js("document.getElementById('trouble').hidden") and made.told[-1] == "Bearer secret"
    assert (
        page.js("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie, location.href.includes('secret')])") == '[0,0,"",false]'
    )
    # Busy: it comes again by itself, with the same event, which is counted once.
    made.faults = [503]
    page.click("#items-a li:nth-child(1) .pick")
    page.until("document.getElementById('trouble').innerText.includes('Trying again in 1 second')")
    page.until(PICKED)
    assert len(made.picked) == 1
    made.faults = [500]
    page.click("#items-a li:nth-child(1) .pick")
    page.until("!document.getElementById('trouble').hidden")
    assert len(titles(page, "a")) == 10, "what was shown stays"
    page.click("#retry")
    page.until(f"document.getElementById('trouble').hidden && {READY}")
    assert len(made.picked) == 2
    page.faults.clear()  # the browser tells of every refusal


@LOOKED_AT
def test_a_service_that_is_gone_is_said(page: Browser) -> None:
    with canned() as answers:
        page.go(answers.url)
        page.until(READY)
    page.click("#items-a li:nth-child(1) .pick")
    page.until("document.getElementById('trouble-text').innerText === 'The service does not answer.'")
    page.faults.clear()


@LOOKED_AT
def test_less_motion_is_less_motion(made: Canned, page: Browser) -> None:
    for calm, moves in ((True, False), (False, True)):
        made.picked.clear()
        page.screen(1280, 900, calm=calm)
        page.go(f"{made.url}?{calm}")
        page.until(READY)
        page.js("window.moved = 0; Element.prototype.animate = function () { window.moved += 1; }; 0")
        page.click("#items-a li:nth-child(1) .pick")
        page.until(PICKED)
        assert (page.js("window.moved") > 0) is moves
