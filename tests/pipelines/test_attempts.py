"""Errors of the network, of stores and of disks are tried again with longer waits; errors of the input never are."""

import errno
import socket
import ssl
import urllib.error
from email.message import Message
from typing import Any

import botocore.exceptions as s3
import pytest
import redis.exceptions
import requests
import urllib3.exceptions

from longtrail.datasets.fetching import UnreachableError
from longtrail.errors import ConfigError, DatasetError, LongtrailError, ValidationError
from pipelines.attempts import attempt, may_pass


def raised(error: BaseException, because: BaseException | None = None, *, hidden: bool = False) -> BaseException:
    """`error` as it is when it was raised while `because` was handled."""
    try:
        try:
            if because is not None:
                raise because
            raise error
        except BaseException as cause:
            if cause is error:
                raise
            if hidden:
                raise error from None
            raise error from cause
    except BaseException as whole:
        return whole


def http(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://x", code, "", Message(), None)


def client_error(code: str, status: int) -> s3.ClientError:
    return s3.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[arg-type]


PASSING: list[BaseException] = [
    ConnectionResetError(), BrokenPipeError(), TimeoutError(), OSError(errno.EIO, "disk"), OSError(errno.ESTALE, "file server"),
    socket.gaierror(socket.EAI_AGAIN, "later"), urllib.error.URLError(ConnectionRefusedError()), http(503), http(429),
    redis.exceptions.ConnectionError(), redis.exceptions.TimeoutError(), redis.exceptions.BusyLoadingError(),
    s3.EndpointConnectionError(endpoint_url="http://x"), s3.ReadTimeoutError(endpoint_url="http://x"), client_error("SlowDown", 503),
    client_error("InternalError", 500), requests.exceptions.ConnectTimeout(), urllib3.exceptions.ProtocolError("cut"),
    UnreachableError("no answer"), raised(LongtrailError("online store"), redis.exceptions.ConnectionError("gone")),
    raised(DatasetError("cannot be read"), ConnectionResetError(), hidden=True),
]  # fmt: skip
LASTING: list[BaseException] = [
    ConfigError("unknown key"), ValidationError("3 expectations failed"), DatasetError("no such column"), ValueError(), KeyError("x"),
    MemoryError(),
    FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "disk full"), socket.gaierror(socket.EAI_NONAME, "no such host"),
    http(404), http(401),
    redis.exceptions.AuthenticationError("invalid username-password pair"), redis.exceptions.ResponseError(), client_error("NoSuchBucket", 404),
    client_error("AccessDenied", 403), ssl.SSLCertVerificationError("self-signed"),
    raised(LongtrailError("online store"), redis.exceptions.AuthenticationError("wrong password")),
    raised(ConfigError("params.yaml"), FileNotFoundError(), hidden=True),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_these_may_pass(error: BaseException) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_these_will_not(error: BaseException) -> None:
    assert not may_pass(error)


def test_an_address_that_answered_no_is_not_asked_again() -> None:
    answer = requests.Response()
    answer.status_code = 404
    assert not may_pass(raised(UnreachableError("404"), requests.HTTPError(response=answer), hidden=True))
    answer.status_code = 502
    assert may_pass(raised(UnreachableError("502"), requests.HTTPError(response=answer), hidden=True))


class Step:
    """Fails as often as it is told, then returns what it was given."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return value


def test_waits_double_and_the_result_is_the_step_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTRAIL_RETRIES", "3")
    monkeypatch.setenv("LONGTRAIL_RETRY_WAIT", "200")
    waits: list[float] = []
    step = Step(ConnectionResetError(), TimeoutError(), redis.exceptions.ConnectionError())
    assert attempt(step, sleep=waits.append, value=7) == 7
    assert waits == [200, 400, 600] and step.calls == 4


def test_the_last_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTRAIL_RETRIES", "1")
    step = Step(ConnectionResetError("first"), ConnectionResetError("second"), ConnectionResetError("third"))
    with pytest.raises(ConnectionResetError, match="second"):
        attempt(step, sleep=lambda _: None, value=7)
    assert step.calls == 2


def test_an_error_of_the_input_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTRAIL_RETRIES", "5")
    step = Step(ConfigError("params.yaml: unknown key"))
    with pytest.raises(ConfigError):
        attempt(step, sleep=lambda _: pytest.fail("it waited"), value=7)
    assert step.calls == 1


def test_without_the_variable_a_step_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGTRAIL_RETRIES", raising=False)
    step = Step(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        attempt(step, sleep=lambda _: pytest.fail("it waited"), value=7)
