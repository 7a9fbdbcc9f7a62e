"""What a shadow arm costs the requests that are answered beside it: `python -m benchmarks.shadow`.

One Bento, SAM with 1,000 events and 200 candidates, served without and with SAM again as its shadow (so twice the arithmetic), in turns: asked one
after the other, and at fixed rates on an open loop. The client shares the machine. `scored` is what the shadow got to.
"""

import os
import re
import tempfile
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.serving.bentos import Bento, make_bento, make_requests
from benchmarks.serving.load import at_rate, in_sequence
from benchmarks.serving.report import made
from benchmarks.serving.servers import packaged
from components.package import seal
from longtrail.files import write_json

LENGTH, CANDIDATES = 1_000, 200
WARM = 30  # requests before each measurement


def configure(bento: Bento, *, shadow: bool) -> None:
    """Rewrite the Bento's settings, and its hashes, as if it had been packaged so."""
    params, labels = bento.artifacts / "params.yaml", bento.folder / "bento.yaml"
    settings = yaml.safe_load(params.read_text())
    settings["serving"]["experiment"] = {"shadow": {"model": "packaged"}} if shadow else {}
    params.write_text(yaml.safe_dump(settings))
    described = yaml.safe_load(labels.read_text())
    described["labels"]["manifest"] = seal(bento.artifacts)
    labels.write_text(yaml.safe_dump(described))


def scored(port: int) -> float:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    return sum(
        float(line.split()[-1])
        for line in connection.getresponse().read().decode().splitlines()
        if line.startswith("longtrail_changes_total") and re.search('what="shadow"', line) and re.search('outcome="scored"', line)
    )


def main(
    rounds: Annotated[int, typer.Option(help="times that each is measured")] = 2,
    count: Annotated[int, typer.Option(help="requests in sequence")] = 150,
    rate: Annotated[float, typer.Option(help="requests a second")] = 20.0,
    seconds: Annotated[float, typer.Option(help="at that rate")] = 12.0,
    port: int = 3998,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/shadow.json"),
) -> None:
    """Measure, print a line each, write JSON."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longtrail-shadow-") as folder:
        bento = make_bento(Path(folder) / "bento", "sam", [LENGTH], items=10_000, threads=1, redis_address=None)
        rows = measure(bento, port, rounds=rounds, count=count, rate=rate, seconds=seconds)
    write_json(out, {"rows": rows, "length": LENGTH, "candidates": CANDIDATES, **made(load_before)})


def measure(bento: Bento, port: int, *, rounds: int, count: int, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Rows of both, in turns."""
    rows: list[dict[str, Any]] = []
    bodies = make_requests(bento, length=LENGTH, candidates=CANDIDATES, count=max(count, int(rate * seconds)) + WARM)
    for _ in range(rounds):
        for shadow in (False, True):
            configure(bento, shadow=shadow)
            with packaged(bento, port):
                in_sequence(port, bodies[:WARM])
                for load in ("in sequence", f"{rate:g} a second"):
                    if load == "in sequence":
                        taken = in_sequence(port, bodies[WARM : WARM + count])
                    else:
                        taken = at_rate(port, bodies[WARM : WARM + int(rate * seconds)], rate)
                    rows.append({"shadow": shadow, "load": load, **taken.row(), "scored": scored(port)})
                    print({name: round(value, 1) if isinstance(value, float) else value for name, value in rows[-1].items()}, flush=True)
    return rows


if __name__ == "__main__":
    typer.run(main)
