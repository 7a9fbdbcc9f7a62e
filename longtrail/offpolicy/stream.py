"""Any log in the impressions schema, read once and in blocks of whole requests: logs of a billion rows take no more memory than a small one.

A log is a Parquet file, or a folder of them read in name order. The rows of a request must stand together; a request may end in the next block, row
group or file, so what has not ended is carried over. What is read of it:

    request_id, user_id, position, click, propensity      as in longtrail.schema.IMPRESSIONS
    A and B                                               each policy's probability of the logged item, of the propensities' kind: a column of the log
                                                          (`propensity` is the logger itself), or a Parquet file of its own, row for row as the log
    predicted, {column}_expected, {column}_direct         optional: the reward model's value of the logged item, and of the policy (see slates.py)
    timestamp, item_id, history_length, category, …       optional: context for segments and figures over time

What `propensity` means stands in the file's metadata (`PROPENSITY_METADATA`). N rows of a block.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from longtrail.errors import EvaluationError
from longtrail.offpolicy.estimated import ShareCounts
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import ESTIMATED, PROPENSITY_METADATA, PROPENSITY_SOURCE_METADATA, Propensity

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Item = TypeVar("Item")

BLOCK_ROWS = 1 << 18  # rows a block: its columns stay near the processor
NEEDED = ("request_id", "user_id", "position", "click")
CONTEXT = {"timestamp": "time", "item_id": "item", "history_length": "history_length", "category": "category"}
PROBABILITY, EXPECTED, DIRECT = "probability", "expected", "direct"  # columns of a policy's own file


class Block(NamedTuple):
    """Whole requests. `context` is name → [N] in the order of the slates' rows: "time" (µs), "item" and whatever else was there or asked for."""

    slates: LoggedSlates
    a: EvaluatedPolicy
    b: EvaluatedPolicy
    context: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PolicySource:
    """Where a policy's probabilities stand. `columns` maps probability, expected and direct to columns of the log, or of `files`."""

    name: str
    columns: dict[str, str]
    files: tuple[Path, ...] | None = None


class LogReader:
    """Iterate to get Blocks. Each iteration reads the log once from its beginning; the counts are complete when it has ended.

    rows            rows in the log, before any is left out
    repeated_rows   left out: they repeat the request and position of a row beside them
    stray_clicks    left out: clicks without a position or propensity, so without an impression
    clicks          of the rows that were used
    kind, estimated what the propensities are
    lists           some request shows several items
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        policies: tuple[PolicySource, PolicySource],
        *,
        kind: Propensity,
        estimated: bool,
        shares: ShareCounts | None,
        independent_places: bool,
        context: dict[str, str],
        block_rows: int,
    ) -> None:
        self.files, self.policies = files, policies
        self.kind, self.estimated, self.independent_places = kind, estimated, independent_places
        self._shares, self._context, self._block_rows = shares, context, block_rows
        self._names = _columns_of(files[0])
        self.rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        self.lists = _has_lists(files, block_rows)
        self.repeated_rows = self.stray_clicks = self.clicks = 0

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B for people."""
        return self.policies[0].name, self.policies[1].name

    def __iter__(self) -> Iterator[Block]:
        self.repeated_rows = self.stray_clicks = self.clicks = 0
        sides = [_Aligned(policy.files, self._block_rows) if policy.files else None for policy in self.policies]
        carried: pa.Table | None = None
        requests = row = 0
        with tqdm(total=self.rows, desc="log", unit="row", unit_scale=True, disable=None) as progress:
            for table, last in _marking_last(_ahead(_tables(self.files, self._wanted(), self._block_rows))):
                for side, source in zip(sides, "ab", strict=True):
                    table = table if side is None else side.beside(table, source)
                progress.update(table.num_rows)
                table = table if carried is None else pa.concat_tables([carried, table])
                runs_N = _runs(table["request_id"])
                whole = table.num_rows if last else int(np.searchsorted(runs_N, runs_N[-1]))  # the last request may go on
                carried = table.slice(whole)
                if whole:
                    block = self._block(table.slice(0, whole), runs_N[:whole], requests, row)
                    row, requests = row + whole, requests + int(runs_N[whole - 1]) + 1
                    if block is not None:
                        yield block

    def _wanted(self) -> list[str]:
        wanted = [*NEEDED, *self._context]
        wanted += ["propensity"] if self._shares is None else ["item_id"]
        wanted += ["predicted"] if "predicted" in self._names else []
        wanted += [column for policy in self.policies if policy.files is None for column in policy.columns.values()]
        return list(dict.fromkeys(wanted))

    def _block(self, table: pa.Table, runs_N: Ints, first_request: int, first_row: int) -> Block | None:
        click_N, position_N = _floats(table["click"]), _floats(table["position"])
        propensity_N = _floats(table["propensity"]) if self._shares is None else self._shares.propensities(
            table["item_id"].to_numpy(), table["position"].fill_null(0).to_numpy()
        )  # fmt: skip
        stray_N = (click_N == 1) & (np.isnan(position_N) | np.isnan(propensity_N))
        repeated_N = _repeated(runs_N, position_N) & ~stray_N
        self.stray_clicks += int(stray_N.sum())
        self.repeated_rows += int(repeated_N.sum())
        if stray_N.any() or repeated_N.any():
            keep = ~(stray_N | repeated_N)
            table, runs_N = table.filter(pa.array(keep)), runs_N[keep]
            click_N, position_N, propensity_N = click_N[keep], position_N[keep], propensity_N[keep]
        if not table.num_rows:
            return None
        self._check(click_N, position_N, runs_N, table, first_row)
        self.clicks += int(click_N.sum())
        try:
            slates = LoggedSlates.build(
                requests=runs_N,
                users=table["user_id"].to_numpy(),
                positions=position_N.astype(np.int64),
                rewards=click_N,
                propensities=propensity_N,
                kind=self.kind,
                predicted=_floats(table["predicted"]) if "predicted" in table.column_names else None,
                estimated=self.estimated,
                independent_places=self.independent_places,
                lists=self.lists,
                first_request=first_request,
            )
            a, b = (self._policy(index, slates, table, propensity_N) for index in range(2))
        except EvaluationError as error:
            raise EvaluationError(f"{self.files[0]}: block of rows from {first_row}: {error}") from None
        context = {name: _context(table[column])[slates.order_N] for column, name in self._context.items()}
        return Block(slates, a, b, context)

    def _policy(self, index: int, slates: LoggedSlates, table: pa.Table, propensity_N: Floats) -> EvaluatedPolicy:
        source = self.policies[index]
        of = {key: column if source.files is None else f"{'ab'[index]}/{key}" for key, column in source.columns.items()}
        itself = source.files is None and of[PROBABILITY] == "propensity"
        more = {key: _floats(table[of[key]]) for key in (EXPECTED, DIRECT) if key in of}
        if itself and slates.predicted_N is not None and not more:
            # What the logger showed is a draw from it: the model's value of that is unbiased for its mean, and doubly robust is then its own rate.
            more = {EXPECTED: _floats(table["predicted"]), DIRECT: _floats(table["predicted"])}
        return EvaluatedPolicy.build(source.name, slates, propensity_N if itself else _floats(table[of[PROBABILITY]]), **more)

    def _check(self, click_N: Floats, position_N: Floats, runs_N: Ints, table: pa.Table, first_row: int) -> None:
        """Raises EvaluationError naming the request where a click is not 0 or 1, a user or position is missing, or a request is not whole."""
        problems = [
            (~((click_N == 0) | (click_N == 1)), "click", click_N, "0 or 1"),
            (~(position_N >= 1), "position", position_N, "1, 2, 3, …"),
            (np.isnan(user_N := _floats(table["user_id"])), "user_id", user_N, "the user's id"),
        ]
        if self.lists:
            length_N = np.bincount(runs_N)[runs_N]
            problems.append(
                ((length_N == 1) & (position_N > 1), "position", position_N, "1 in a request of one row; do the rows of each request stand together?")
            )
        for bad_N, name, values_N, expected in problems:
            if bad_N.any():
                row = int(np.argmax(bad_N))
                raise EvaluationError(
                    f"{self.files[0]}: request {table['request_id'][row].as_py()} (about row {first_row + row}): {name} is {values_N[row]:g}; "
                    f"expected {expected} ({int(bad_N.sum())} such rows in this block)"
                )


def open_log(
    log: Path,
    a: str | Path,
    b: str | Path,
    *,
    kind: Propensity | None = None,
    estimate: bool = False,
    independent_places: bool = False,
    context: Sequence[str] = (),
    block_rows: int = BLOCK_ROWS,
) -> LogReader:
    """A reader of `log` with policies A and B: columns of the log, or Parquet files (a string ending in .parquet is a file).

    kind                None: as the file's metadata says
    estimate            the log has no propensities: estimate them as the share of each item at each position (right only for a logger that looks at
                        nothing else); marked as estimated, and of marginal kind
    independent_places  declared, see LoggedSlates
    context             further columns of the log to hand on

    Raises EvaluationError naming the file and column where something is missing, or the log's propensities are not known.
    """
    files = _files(Path(log))
    names = _columns_of(files[0])
    metadata = pq.read_schema(files[0]).metadata or {}
    estimated = metadata.get(PROPENSITY_SOURCE_METADATA.encode(), b"").decode() == ESTIMATED
    kind = kind or Propensity(metadata.get(PROPENSITY_METADATA.encode(), b"none").decode())
    shares = None
    if estimate:
        shares, kind, estimated = _shares(files, block_rows), Propensity.MARGINAL, True
    elif kind is Propensity.NONE:
        raise EvaluationError(
            f"{files[0]}: the file does not say what its propensities are (metadata {PROPENSITY_METADATA!r}); "
            "say conditional or marginal, or have them estimated"
        )
    _require(files[0], names, [*NEEDED, *([] if shares else ["propensity"]), *context])
    policies = (_source(files[0], names, a), _source(files[0], names, b))
    return LogReader(
        files,
        policies,
        kind=kind,
        estimated=estimated,
        shares=shares,
        independent_places=independent_places,
        context={column: name for column, name in CONTEXT.items() if column in names} | {name: CONTEXT.get(name, name) for name in context},
        block_rows=block_rows,
    )


# ---------------------------------------------------------------- where things stand


def _files(path: Path) -> tuple[Path, ...]:
    files = tuple(sorted(path.rglob("*.parquet"))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise EvaluationError(f"{path}: no such file, or no *.parquet in it; expected a log in the impressions schema")
    return files


def _columns_of(file: Path) -> list[str]:
    try:
        return pq.read_schema(file).names
    except pa.ArrowInvalid as error:
        raise EvaluationError(f"{file}: not a Parquet file: {error}") from None


def _require(file: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise EvaluationError(f"{file}: no column {missing[0]!r}; it has {', '.join(names)}")


def _source(log: Path, names: list[str], policy: str | Path) -> PolicySource:
    if not str(policy).endswith(".parquet"):
        column = str(policy)
        if column not in names and Path(policy).is_dir():
            return _source_files(Path(policy))
        if column == "propensity":
            return PolicySource("the logger", _optional(column, names))
        _require(log, names, [column])
        return PolicySource(column, _optional(column, names))
    return _source_files(Path(policy))


def _source_files(path: Path) -> PolicySource:
    files = _files(path)
    names = _columns_of(files[0])
    _require(files[0], names, ["request_id", "position", PROBABILITY])
    return PolicySource(path.stem, {key: key for key in (PROBABILITY, EXPECTED, DIRECT) if key in names}, files)


def _optional(column: str, names: list[str]) -> dict[str, str]:
    found = {PROBABILITY: column, EXPECTED: f"{column}_expected", DIRECT: f"{column}_direct"}
    return {key: name for key, name in found.items() if key == PROBABILITY or name in names}


# ---------------------------------------------------------------- reading


def _tables(files: Sequence[Path], columns: list[str], rows: int) -> Iterator[pa.Table]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            _require(file, parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, each made while the one before is being used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _marking_last(items: Iterator[Item]) -> Iterator[tuple[Item, bool]]:
    held = next(items, None)
    for item in items:
        assert held is not None
        yield held, False
        held = item
    if held is not None:
        yield held, True


class _Aligned:
    """A policy's own file, read in step with the log."""

    def __init__(self, files: tuple[Path, ...], rows: int) -> None:
        self._file = files[0]
        names = _columns_of(files[0])
        self._keys = [key for key in (PROBABILITY, EXPECTED, DIRECT) if key in names]
        self._tables = _tables(files, ["request_id", "position", *self._keys], rows)
        self._rest: pa.Table | None = None

    def beside(self, log: pa.Table, side: str) -> pa.Table:
        """`log` with the columns of the same rows. Raises EvaluationError where the file ends too soon or holds other rows."""
        parts, missing = [], log.num_rows
        while missing:
            table = self._rest if self._rest is not None and self._rest.num_rows else next(self._tables, None)
            if table is None:
                raise EvaluationError(f"{self._file}: ends before the log does; expected one row for each of the log's, in its order")
            parts.append(table.slice(0, missing))
            self._rest = table.slice(missing)
            missing -= parts[-1].num_rows
        mine = pa.concat_tables(parts)
        for key in ("request_id", "position"):
            same = pc.equal(mine[key], log[key].cast(mine[key].type))
            if not pc.all(same, skip_nulls=True).as_py():
                row = pc.index(same, False).as_py()
                raise EvaluationError(f"{self._file}: {key} {mine[key][row]} where the log has {log[key][row]}; expected the log's rows in its order")
        for key in self._keys:
            log = log.append_column(f"{side}/{key}", mine[key])
        return log


def _runs(requests: pa.ChunkedArray) -> Ints:
    """[N] 0, 0, 1, …: the number of the request that each row is in, counted by changes of its id."""
    column = requests.combine_chunks()
    if len(column) < 2:
        return np.zeros(len(column), np.int64)
    changes = pc.fill_null(pc.not_equal(column.slice(1), column.slice(0, len(column) - 1)), True).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(changes)])


def _has_lists(files: Sequence[Path], rows: int) -> bool:
    """Whether two rows beside each other are of one request; stops at the first such pair."""
    before = None
    for table in _tables(files, ["request_id"], rows):
        column = table["request_id"]
        if _runs(column)[-1] + 1 < len(column) or (before is not None and before == column[0].as_py()):
            return True
        before = column[-1].as_py()
    return False


def _shares(files: Sequence[Path], rows: int) -> ShareCounts:
    counts = ShareCounts()
    _require(files[0], _columns_of(files[0]), ["item_id", "position"])
    for table in _tables(files, ["item_id", "position"], rows):
        table = table.filter(pc.is_valid(table["position"]))
        counts = counts.merge(ShareCounts.of(table["item_id"].to_numpy(), table["position"].to_numpy()))
    return counts


def _repeated(runs_N: Ints, position_N: Floats) -> NDArray[np.bool_]:
    """[N] rows whose request and position an earlier row of the block has."""
    repeated = np.zeros(len(runs_N), bool)
    if not ((np.diff(runs_N) > 0) | (np.diff(position_N) > 0)).all():
        order = np.lexsort((position_N, runs_N))
        same = (np.diff(runs_N[order]) == 0) & (np.diff(position_N[order]) == 0)
        repeated[order[1:][same]] = True
    return repeated


def _floats(column: pa.ChunkedArray) -> Floats:
    """[N] with NaN for null."""
    return column.to_numpy().astype(np.float64, copy=False)


def _context(column: pa.ChunkedArray) -> NDArray[Any]:
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64()).to_numpy()
    return column.to_numpy()
