"""What ingest says of a log that it does not take as it is: how much, where, and why."""

from pathlib import Path

import pytest

from longtrail.engines.duck_files import other_line_end
from longtrail.errors import DatasetError, QuarantineError
from longtrail.ingest import DUPLICATE_EVENT
from tests.datasets.logs import EVENTS, run_csv

HEAD = EVENTS.splitlines()[0] + "\n"


def test_shares_that_are_nearly_equal_are_told_apart(tmp_path: Path) -> None:
    rows = "".join(f"x,1,{1_000_000_000 + second},view,1\n" for second in range(1500))
    with pytest.raises(QuarantineError, match=r"2 of 1,501 rows were rejected \(0\.133%\), more than ingest\.max_quarantined_share \(0\.130%\)"):
        run_csv(tmp_path, HEAD + rows.replace("x,1,1000000007", "x,,7", 1) + "x,1,never,view,1\n", settings={"max_quarantined_share": 0.0013})


def test_what_was_quarantined_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longtrail.ingest"):
        run_csv(tmp_path, EVENTS + EVENTS.splitlines()[1] + "\n")
    assert f"  - 1 × {DUPLICATE_EVENT}; first: {tmp_path / 'log.csv'}, row 4" in caplog.text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (EVENTS.replace("\n", "\r\n", 2), "line 3 ends in LF, line 1 in CR LF"),
        (EVENTS + "eve,3,1000000500,view,1\r\n", "line 5 ends in CR LF, line 1 in LF"),
        (EVENTS.replace("view", "vi\rew", 1), "line 2 ends in CR, line 1 in LF"),
    ],
)
def test_mixed_line_ends_are_an_error_that_names_the_line(tmp_path: Path, content: str, found: str) -> None:
    with pytest.raises(DatasetError, match=rf"log\.csv: {found}, so the rows cannot be told apart; expected one kind"):
        run_csv(tmp_path, content)


def test_line_ends_are_told_apart_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"x" * ((1 << 20) - 1) + b"\r\n" + b"y\r\n")  # the first block ends between CR and LF
    assert other_line_end(path) is None
    path.write_bytes(path.read_bytes() + b"z\n")
    assert str(other_line_end(path)).startswith("line 3 ends in LF, line 1 in CR LF")
