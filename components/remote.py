"""Files by address: s3://bucket/folder, or any other that fsspec knows, or a path. Credentials come from the environment alone (docs/storage.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longtrail.errors import LongtrailError, StorageError

_OTHERS = ("botocore", "aiobotocore", "aiohttp", "dvc_data", "dvc_objects")  # their errors are no OSError


def locate(address: str, *, error: type[LongtrailError] = StorageError) -> tuple[Any, str]:
    """The file system of `address` (fsspec's) and the place in it. Raises `error` where nothing here knows such addresses."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address, use_listings_cache=False)
    except ImportError as reason:
        raise error(f"{address}: {reason}; expected the extra s3: pip install 'longtrail[s3]'") from reason
    except ValueError as reason:
        raise error(f"{address}: {reason}; expected s3://bucket/folder, or a path") from reason


@contextmanager
def answering(address: str, *, error: type[LongtrailError] = StorageError) -> Iterator[None]:
    """What a store refuses, or that it does not answer, becomes one `error` that names `address`; its cause stays behind it."""
    try:
        yield
    except LongtrailError:
        raise
    except FileNotFoundError as reason:
        raise error(f"{address}: not there: {_plain(reason)}") from reason
    except PermissionError as reason:
        raise error(f"{address}: refused: {_plain(reason)}; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of somebody who may") from reason
    except Exception as reason:
        if not isinstance(reason, OSError) and type(reason).__module__.split(".")[0] not in _OTHERS:
            raise
        behind = f" ({_plain(reason.__cause__)})" if isinstance(reason.__cause__, Exception) else ""
        raise error(f"{address}: {type(reason).__name__}: {_plain(reason)}{behind}") from reason


def _plain(reason: Exception) -> str:
    return " ".join(str(reason).split())[:300]
