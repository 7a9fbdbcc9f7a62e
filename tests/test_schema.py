"""The schema keeps its own rules, and gives every system the types it means."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrail import schema
from longtrail.schema import CANDIDATES, CATALOGUE, EXAMPLES, IMPRESSIONS, INTERACTIONS, ITEMS, TABLES, TARGETS, USERS, Kind, Table

ALL = (*TABLES, CANDIDATES, EXAMPLES, TARGETS, CATALOGUE)


@pytest.mark.parametrize("table", ALL, ids=lambda t: t.name)
def test_each_table_is_well_formed(table: Table) -> None:
    assert table.row and len(set(table.names)) == len(table.names)
    assert set(table.key) <= set(table.names)
    for column in table.columns:
        assert column.meaning and table[column.name] is column
        if column.minimum is not None and column.maximum is not None:
            assert column.minimum <= column.maximum
        if column.kind in (Kind.STRING, Kind.TIMESTAMP):
            assert column.minimum is None and column.maximum is None
    with pytest.raises(KeyError, match=f"table {table.name} has no column 'nothing'; it has {table.names[0]}"):
        table["nothing"]


def test_names_of_tables_differ() -> None:
    assert len({table.name for table in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("kind", "arrow"),
    [
        (Kind.INT8, pa.int8()),
        (Kind.INT32, pa.int32()),
        (Kind.INT64, pa.int64()),
        (Kind.FLOAT32, pa.float32()),
        (Kind.FLOAT64, pa.float64()),
        (Kind.STRING, pa.string()),
        (Kind.TIMESTAMP, pa.timestamp("us", tz="UTC")),
    ],
)
def test_arrow_types(kind: Kind, arrow: pa.DataType) -> None:
    assert kind.arrow == arrow


@pytest.mark.parametrize("table", ALL, ids=lambda t: t.name)
def test_the_schema_survives_parquet(table: Table, tmp_path) -> None:  # type: ignore[no-untyped-def]
    written = table.arrow(propensity="marginal")
    pq.write_table(written.empty_table(), tmp_path / "t.parquet")
    read = pq.read_schema(tmp_path / "t.parquet")
    assert read.names == table.names and [f.nullable for f in read] == [c.nullable for c in table.columns]
    assert [f.type for f in read] == [c.kind.arrow for c in table.columns]
    assert read.metadata[b"table"] == table.name.encode() and read.metadata[b"propensity"] == b"marginal"
    assert read.field(0).metadata[b"meaning"] == table.columns[0].meaning.encode()


def test_padding_never_stands_in_a_table() -> None:
    for table in ALL:
        for name in ("user_id", "item_id"):
            if name in table.names:
                assert table[name].minimum is not None and table[name].minimum > schema.PADDING_ID and not table[name].nullable


def test_columns_of_one_name_are_of_one_kind() -> None:
    kinds: dict[str, Kind] = {}
    for table in (INTERACTIONS, IMPRESSIONS, ITEMS, USERS, EXAMPLES, TARGETS, CATALOGUE, CANDIDATES):
        for column in table.columns:
            assert kinds.setdefault(column.name, column.kind) is column.kind, column.name


def test_statistics_stand_in_the_examples() -> None:
    assert set(schema.USER_STATISTICS) | set(schema.ITEM_STATISTICS) <= set(EXAMPLES.names)
    assert set(schema.ITEM_STATISTICS) <= set(CATALOGUE.names)
