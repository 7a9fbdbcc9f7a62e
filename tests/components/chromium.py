"""Headless Chromium, for looking at pages: pictures, and whether anything is cut off or fetched."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars")

# A frame of the width to be tested holds the page: the browser's own window cannot be made as narrow as a phone everywhere.
_PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:2000px"></iframe>
<pre id="out"></pre><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const inner = frame.contentDocument, seen = [];
  for (const one of inner.querySelectorAll("details")) one.open = true;
  for (const one of inner.querySelectorAll("body *")) {{
    const box = one.getBoundingClientRect();
    const outside = box.width && (box.right > {width} + 1 || box.left < -1);
    if (outside && !one.closest("svg") && !one.closest(".wide")) seen.push(one.tagName + "." + one.className);
    if (one.classList.contains("wide") && one.scrollWidth > one.clientWidth + 1) seen.push("scrolls: " + one.className);
  }}
  const entries = frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name);
  const found = {{wide: inner.documentElement.scrollWidth, tall: inner.documentElement.scrollHeight, cut: seen.slice(0, 5), fetched: entries}};
  document.getElementById("out").textContent = "FOUND" + JSON.stringify(found) + "END";
}};
frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob("{page}"), (letter) => letter.charCodeAt(0)));
</script>"""


def measure(page: Path, width: int, folder: Path) -> dict:
    """{wide, tall: of the whole page in px, cut: elements that reach outside, fetched: addresses} at this width, everything unfolded."""
    probe = folder / f"probe-{width}.html"
    encoded = base64.b64encode(page.read_bytes()).decode()
    probe.write_text(_PROBE.format(width=width, page=encoded), encoding="utf-8")
    dumped = _run([f"--window-size={max(width, 600)},2000", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()], folder)
    found = re.search(r'<pre id="out">FOUND(.*?)END</pre>', dumped, re.S)
    assert found, dumped[-500:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


def screenshot(page: Path, out: Path, width: int, height: int, folder: Path) -> None:
    _run([f"--window-size={width},{height}", f"--screenshot={out}", page.as_uri()], folder)


def _run(arguments: list[str], folder: Path) -> str:
    """The browser is ended with all its helpers when it takes more than a minute: they hold the output open otherwise."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
