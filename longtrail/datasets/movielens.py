"""MovieLens in all its official layouts, told apart by the files in the zip or folder.

Each rating is an interaction `rated_<rating, rounded up>` whose value is the rating, and an impression whose click is `rating >= like_from`.
All ratings of one user at one second are one request, in file order. Nothing says which policy showed the films: there is no propensity.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir

from longtrail.config import MovieLensDataset
from longtrail.datasets import fetching
from longtrail.datasets.raw import RawEvents, RawLog, Rules
from longtrail.datasets.reading import CsvFormat, load, load_text
from longtrail.engines import Engine
from longtrail.errors import DatasetError

log = logging.getLogger(__name__)

_ADDRESS = "https://files.grouplens.org/datasets/movielens"
# MD5 as GroupLens publishes it beside each zip; latest-small changes with time, so it has none.
OFFICIAL: dict[str, str | None] = {
    "ml-100k": "md5:0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "md5:c4d9eecfca2ab87c1945afe126590906",
    "ml-latest-small": None,
    "ml-20m": "md5:cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "md5:6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "md5:d472be332d4daa821edc399621853b57",
}
WHEELS = {
    "ml-100k": fetching.Wheel(
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        members={f"recbole/dataset_example/ml-100k/ml-100k.{end}": f"ml-100k.{end}" for end in ("inter", "item")},
    )
}
_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_RATING = ("user", "item", "value", "timestamp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One official layout: the file of ratings, the file of films (optional), and what their columns are called."""

    ratings: str
    names: tuple[str, ...]  # of user, item, rating and time
    format: CsvFormat
    films: str
    film_names: tuple[str, str, str]  # of item, title and genres
    film_format: CsvFormat


def _flags() -> tuple[str, ...]:
    return ("item", "title", "released", "video", "url", *_GENRES_100K)


LAYOUTS = (
    Layout(  # 100K
        ratings="u.data",
        names=_RATING,
        format=CsvFormat(delimiter="\t", quote="", header=_RATING),
        films="u.item",
        film_names=("item", "title", ""),
        film_format=CsvFormat(delimiter="|", quote="", header=_flags()),
    ),
    Layout(  # 1M, 10M
        ratings="ratings.dat",
        names=_RATING,
        format=CsvFormat(delimiter="::", quote="", header=_RATING),
        films="movies.dat",
        film_names=("item", "title", "genres"),
        film_format=CsvFormat(delimiter="::", quote="", header=("item", "title", "genres")),
    ),
    Layout(  # latest-small, 20M, 25M, 32M
        ratings="ratings.csv",
        names=("userId", "movieId", "rating", "timestamp"),
        format=CsvFormat(),
        films="movies.csv",
        film_names=("movieId", "title", "genres"),
        film_format=CsvFormat(),
    ),
    Layout(  # 100K as the wheel of recbole carries it
        ratings="ml-100k.inter",
        names=("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        format=CsvFormat(delimiter="\t", quote=""),
        films="ml-100k.item",
        film_names=("item_id:token", "movie_title:token_seq", "class:token_seq"),
        film_format=CsvFormat(delimiter="\t", quote=""),
    ),
)


def read_movielens(engine: Engine, dataset: MovieLensDataset, folder: Path, cache: Path) -> RawLog:
    """The ratings and, where the source has them, the films. `folder` takes what a zip holds. Raises DatasetError."""
    source = find_movielens(dataset.source, cache)
    layout, ratings, films = _open(source, folder)
    rules = Rules(
        timestamp_unit="s",
        click_from="value",
        like_from=dataset.like_from,
        action_from_value="rated_",
        value_bounds=(0.5, 5.0),
    )
    names = dict(zip(_RATING, layout.names, strict=True))
    rows = load(engine, "ratings", [ratings], names, csv_format=layout.format, label=fetching.label(source, ratings))
    events = RawEvents(rows=rows, names=names, rules=rules, delimiter=layout.format.delimiter, key="ratings")
    items = None if films is None else _films(engine, films, layout, fetching.label(source, films))
    if films is None:
        log.info("%s has no %s: films have neither title nor category", source, layout.films)
    files = (source,) if source.is_file() else tuple(f for f in (ratings, films) if f is not None)
    return RawLog(events=(events,), files=files, items=items)


def find_movielens(source: str, cache: Path) -> Path:
    """The zip or folder that `source` means: a path, or a variant, from its official address, else (ml-100k) from the package index."""
    if Path(source).exists():
        return Path(source)
    if source not in OFFICIAL:
        raise DatasetError(f"dataset.source {source!r}: no such file or folder (looked from {Path.cwd()}), and none of {', '.join(OFFICIAL)}")
    wheel = WHEELS.get(source)
    if wheel is not None and not (cache / f"{source}.zip").is_file() and (cache / wheel.requirement.replace("==", "-")).is_dir():
        return fetching.from_wheel(wheel, cache)
    url = f"{_ADDRESS}/{source}.zip"
    try:
        return fetching.download(url, cache / f"{source}.zip", checksum=OFFICIAL[source])
    except fetching.UnreachableError as error:
        if wheel is None:
            raise DatasetError(f"{error}; download {url} yourself and set dataset.source to its path") from None
        log.info("the official address cannot be reached, so %s comes from the package index (%s): %s", source, wheel.requirement, error)
        return fetching.from_wheel(wheel, cache)


def _open(source: Path, folder: Path) -> tuple[Layout, Path, Path | None]:
    """The layout of a zip, folder or file of ratings, and where its two files are."""
    packed = source.is_file() and source.name not in {layout.ratings for layout in LAYOUTS}
    if packed:
        members = fetching.archive_members(source)
    else:
        root = source if source.is_dir() else source.parent
        # one level down too: the folder a zip was unpacked into
        members = {p.name: str(p) for p in sorted((*root.glob("*/*"), *root.glob("*"))) if p.is_file()} if source.is_dir() else _beside(source)
    for layout in LAYOUTS:
        if layout.ratings in members:
            wanted = {members[name]: name for name in (layout.ratings, layout.films) if name in members}
            if packed:
                fetching.extract(source, wanted, folder)
                where = {name: folder / name for name in wanted.values()}
            else:
                where = {name: Path(path) for path, name in wanted.items()}
            return layout, where[layout.ratings], where.get(layout.films)
    expected = ", ".join(layout.ratings for layout in LAYOUTS)
    raise DatasetError(f"{source}: not a MovieLens layout: it has {', '.join(sorted(members)[:10]) or 'no file'}; expected one of {expected}")


def _beside(ratings: Path) -> dict[str, str]:
    return {p.name: str(p) for p in ratings.parent.iterdir() if p.is_file()}


def _films(engine: Engine, path: Path, layout: Layout, label: str) -> ir.Table:
    """item, category, title. The category is the combination of genres, in the file's order, between bars; null where there is none."""
    item, title, genres = layout.film_names
    columns: dict[str, str | None] = {"item": item, "title": title}
    columns |= {"genres": genres} if genres else {name: name for name in _GENRES_100K[1:]}
    csv_format = CsvFormat(
        delimiter=layout.film_format.delimiter,
        encoding=_encoding(path),
        quote=layout.film_format.quote,
        header=layout.film_format.header,
    )
    films = load_text(engine, "films", [path], columns, csv_format=csv_format, label=label)
    if genres:
        joined = films.genres if "|" in layout.film_format.delimiter or not genres.endswith("token_seq") else films.genres.replace(" ", "|")
    else:
        joined = ibis.literal("")
        for name in _GENRES_100K[1:]:
            joined = joined + (films[name] == "1").ifelse(f"|{name}", "")
        joined = joined.substr(1)
    category = joined.strip().nullif("").nullif("(no genres listed)").nullif("unknown")
    return films.select("order", item=films.item.strip(), category=category, title=films.title.strip().nullif(""))


def _encoding(path: Path) -> str:
    """The old files are Latin-1, the newer ones UTF-8; none says so. All are small."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"
