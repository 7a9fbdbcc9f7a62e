"""Every official layout, on a dozen rows that can be checked by hand, and slices of the real files."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from longtrail.errors import DatasetError
from tests.datasets.logs import quarantine, run, shared, table, write_zip

# user, film, rating, second: user 2's first two ratings are of one second; ids are given in order of first appearance.
RATINGS = [
    (1, 10, 5, 900000100),
    (1, 20, 3, 900000160),
    (2, 30, 4, 900000050),
    (2, 10, 1, 900000050),
    (2, 20, 4, 900000300),
    (3, 10, 2, 900000160),
]
FILMS = {10: ("Amélie (2001)", ["Comedy", "Romance"]), 20: ("Heat, The (1995)", ["Crime"]), 30: ("Unknown (1990)", [])}
FLAGS = {"Comedy": 5, "Crime": 6, "Romance": 14}


def rows(between: str, head: str = "") -> bytes:
    return (head + "".join(between.join(map(str, row)) + "\n" for row in RATINGS)).encode()


def item_100k(film: int) -> bytes:
    title, genres = FILMS[film]
    flags = ["0"] * 19
    for genre in genres:
        flags[FLAGS[genre]] = "1"
    return ("|".join([str(film), title, "01-Jan-1995", "", "http://x", *(flags if genres else ["1"] + ["0"] * 18)]) + "\n").encode("latin-1")


def layout(name: str) -> dict[str, bytes]:
    combined = {film: "|".join(genres) or "(no genres listed)" for film, (_, genres) in FILMS.items()}
    if name == "100k":
        return {"ml-100k/u.data": rows("\t"), "ml-100k/u.item": b"".join(map(item_100k, FILMS))}
    if name == "1m":
        films = "".join(f"{film}::{title}::{combined[film]}\n" for film, (title, _) in FILMS.items())
        return {"ml-1m/ratings.dat": rows("::"), "ml-1m/movies.dat": films.encode("latin-1"), "ml-1m/README": b"read me"}
    if name == "csv":
        films = "movieId,title,genres\n" + "".join(f'{film},"{title}",{combined[film]}\n' for film, (title, _) in FILMS.items())
        return {"ml-32m/ratings.csv": rows(",", "userId,movieId,rating,timestamp\n"), "ml-32m/movies.csv": films.encode(), "ml-32m/tags.csv": b"x\n"}
    films = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    films += "".join(f"{film}\t{title}\t1999\t{' '.join(genres)}\n" for film, (title, genres) in FILMS.items())
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    return {"x/ml-100k.inter": rows("\t", head), "x/ml-100k.item": films.encode()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["100k", "1m", "csv", "recbole"])
def test_each_official_layout_gives_the_same_tables(tmp_path: Path, name: str, packed: bool) -> None:
    members = layout(name)
    if packed:
        source = write_zip(tmp_path / "source.zip", members)
    else:
        source = tmp_path / "source"
        for member, content in members.items():
            (source / member).parent.mkdir(parents=True, exist_ok=True)
            (source / member).write_bytes(content)

    counts = run(tmp_path, {"kind": "movielens", "source": str(source)})

    assert {k: counts[k] for k in ("rows_read", "rows_quarantined", "interactions", "impressions", "users", "items", "categories")} == {
        "rows_read": 6,
        "rows_quarantined": 0,
        "interactions": 6,
        "impressions": 6,
        "users": 3,
        "items": 3,
        "categories": 2,
    }
    assert counts["actions"] == ["rated_1", "rated_2", "rated_3", "rated_4", "rated_5"]
    assert (counts["propensity"], counts["first"], counts["last"]) == ("none", "1998-07-09T16:00:50+00:00", "1998-07-09T16:05:00+00:00")
    items = table(tmp_path, "items")
    # films 10 and 30 are first seen in the same second: then the key decides
    assert items[["item_id", "item_key", "category_id", "title", "popularity"]].values.tolist() == [
        [1, "10", 1, "Amélie (2001)", 3],
        [2, "30", 0, "Unknown (1990)", 1],
        [3, "20", 2, "Heat, The (1995)", 2],
    ]
    assert items["category"].tolist() == ["Comedy|Romance", None, "Crime"]
    users = table(tmp_path, "users")
    assert users[["user_id", "user_key", "events"]].values.tolist() == [[1, "2", 3], [2, "1", 2], [3, "3", 1]]
    interactions = table(tmp_path, "interactions")
    assert interactions[["user_id", "item_id", "action", "value"]].values.tolist() == [
        [1, 2, "rated_4", 4.0],
        [1, 1, "rated_1", 1.0],
        [2, 1, "rated_5", 5.0],
        [2, 3, "rated_3", 3.0],
        [3, 1, "rated_2", 2.0],
        [1, 3, "rated_4", 4.0],
    ]
    assert (interactions["timestamp"] == interactions["available_at"]).all()
    assert interactions["timestamp"].iloc[0] == pd.Timestamp(900000050, unit="s", tz="UTC")
    shown = table(tmp_path, "impressions")
    assert shown[["request_id", "user_id", "item_id", "position", "click", "policy"]].values.tolist() == [
        ["2:900000050000000", 1, 2, 1, 1, "logged"],
        ["2:900000050000000", 1, 1, 2, 0, "logged"],
        ["1:900000100000000", 2, 1, 1, 1, "logged"],
        ["1:900000160000000", 2, 3, 1, 0, "logged"],
        ["3:900000160000000", 3, 1, 1, 0, "logged"],
        ["2:900000300000000", 1, 3, 1, 1, "logged"],
    ]
    assert shown["propensity"].isna().all()


def test_the_quarantine_names_the_member_of_a_zip(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "ml.zip", {"ml-1m/ratings.dat": rows("::") + b"9::9\n9::9::7::900000000\n"})
    run(tmp_path, {"kind": "movielens", "source": str(source)})
    rejected = table(tmp_path, "quarantine")
    assert rejected[["file", "row"]].values.tolist() == [[f"{source}/ratings.dat", 7], [f"{source}/ratings.dat", 8]]


def test_films_are_optional_and_like_from_moves_the_click(tmp_path: Path) -> None:
    members = {k: v for k, v in layout("1m").items() if k.endswith("ratings.dat")}
    source = write_zip(tmp_path / "source.zip", members)
    counts = run(tmp_path, {"kind": "movielens", "source": str(source), "like_from": 3})
    assert counts["categories"] == 0
    assert table(tmp_path, "items")["title"].isna().all()
    assert table(tmp_path, "impressions")["click"].tolist() == [1, 0, 1, 1, 0, 1]


def test_half_stars_round_up_in_the_action_and_stay_in_the_value(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_bytes(b"userId,movieId,rating,timestamp\n1,1,3.5,900000000\n1,2,0.5,900000001\n")
    counts = run(tmp_path, {"kind": "movielens", "source": str(source)})
    assert counts["actions"] == ["rated_1", "rated_4"]
    assert table(tmp_path, "interactions")["value"].tolist() == [3.5, 0.5]


def test_bad_ratings_are_quarantined_with_their_line(tmp_path: Path) -> None:
    bad = [
        "9::9::6::900000000",
        "9::9::::900000000",
        "9::9::4::yesterday",
        "::9::4::900000000",
        "9::9::4",
        "-9::9::4::900000000",
        "1::10::5::900000100",
    ]
    source = tmp_path / "ratings.dat"
    source.write_bytes(rows("::") + "\n".join(bad).encode() + b"\n")
    counts = run(tmp_path, {"kind": "movielens", "source": str(source)})
    assert counts["rows_read"] == 13
    assert quarantine(tmp_path) == [
        (7, "value", "value outside 0.5 to 5"),
        (8, "value", "missing value"),
        (9, "timestamp", "unparsable time; expected seconds since 1970"),
        (10, "user", "missing user"),
        (11, "row", "too few fields in the row"),
        (12, "user", "negative user id; expected an id from 0, or any text"),
        (13, "row", "duplicate of an earlier row (same user, item, timestamp and action)"),
    ]
    assert table(tmp_path, "quarantine")["raw"].tolist() == bad
    assert counts["users"] == 3  # user 9 has no good row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "not a whole zip"),
        (write_zip, "damaged|not a whole zip"),
        ({"folder/readme.txt": b"x"}, "not a MovieLens layout: it has readme.txt; expected one of u.data, ratings.dat"),
    ],
)
def test_a_source_that_is_no_movielens(tmp_path: Path, content: Any, message: str) -> None:
    source = tmp_path / "source.zip"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif isinstance(content, dict):
        write_zip(source, content)
    else:  # a whole zip with one byte of a member changed
        write_zip(source, layout("1m"))
        damaged = bytearray(source.read_bytes())
        damaged[60] ^= 0xFF
        source.write_bytes(damaged)
    with pytest.raises(DatasetError, match=message) as error:
        run(tmp_path, {"kind": "movielens", "source": str(source)})
    assert str(source) in str(error.value) and "partial" not in str(error.value)
    assert not (tmp_path / "tables").exists()


def test_a_source_that_is_not_there_names_the_variants(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'ml-2m': no such file or folder .* none of ml-100k, ml-1m, ml-latest-small"):
        run(tmp_path, {"kind": "movielens", "source": "ml-2m"})


@pytest.mark.parametrize(("name", "events", "users", "items"), [("ml-1m.zip", 999_611, 6_040, 3_416), ("ml-latest-small.zip", 100_836, 610, 9_724)])
def test_real_zips_equal_a_plain_reading(tmp_path: Path, name: str, events: int, users: int, items: int) -> None:
    source = shared(name)
    counts = run(tmp_path, {"kind": "movielens", "source": str(source)}, max_quarantined_share=0.0)
    assert [counts[k] for k in ("interactions", "impressions", "users", "items")] == [events, events, users, items]
    raw = plain(source)
    found = (
        table(tmp_path, "interactions")
        .merge(table(tmp_path, "users")[["user_id", "user_key"]])
        .merge(table(tmp_path, "items")[["item_id", "item_key"]])
    )
    found["second"] = found["timestamp"].astype("int64") // 1_000_000
    left = found[["user_key", "item_key", "value", "second"]].astype({"user_key": int, "item_key": int}).sort_values(["user_key", "item_key"])
    right = raw.sort_values(["user", "item"])
    assert (left.to_numpy() == right.to_numpy()).all()
    assert table(tmp_path, "impressions")["click"].mean() == pytest.approx((raw["rating"] >= 4).mean(), abs=1e-12)
    if name == "ml-1m.zip":
        assert table(tmp_path, "items").query("item_key == '1'")[["title", "category"]].values.tolist() == [
            ["Toy Story (1995)", "Animation|Children's|Comedy"]
        ]


def plain(source: Path) -> pd.DataFrame:
    import zipfile

    columns = ["user", "item", "rating", "time"]
    with zipfile.ZipFile(source) as archive:
        member = next(n for n in archive.namelist() if "ratings" in n)
        text = archive.read(member).decode("latin-1").replace("::", ",")
    import io

    return pd.read_csv(io.StringIO(text), names=columns, header=0 if text.startswith("user") else None)
