"""What all tests share: a toy log and its features, built once a worker, and one CPU thread each."""

import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.toy import toy_features, toy_tables

_PRINT = builtins.print


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers end at about the same time."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _plain_print() -> Iterator[None]:
    """kfp.local replaces `print` while a task runs; tasks side by side may put each other's back, and all that is printed later is indented."""
    builtins.print = _PRINT
    yield
    builtins.print = _PRINT


@pytest.fixture(scope="session")
def toy_tables_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of `toy_tables()`. Read only: copy it to change it."""
    return toy_tables(tmp_path_factory.mktemp("toy") / "tables")


@pytest.fixture(scope="session")
def toy_features_folder(toy_tables_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy_features()` of `toy_tables_folder`, temporal split. Read only: copy it to change it."""
    return toy_features(toy_tables_folder, tmp_path_factory.mktemp("toy") / "features")
