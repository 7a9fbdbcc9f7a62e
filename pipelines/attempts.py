"""A step is tried again after what may pass, and never after what will not. Our choice, because Kubeflow cannot tell the two apart.

Kubeflow's own retries (`set_retry`) start a pod again whenever its container failed, a bad setting included, and not when its node was lost; its
launcher hides the exit code, so that no rule could look at it. So the steps' own errors are sorted here, where their types are still known. A lost
pod is the workflow controller's: Kubeflow's manifests have it try again twice on an error of the cluster (docs/cluster.md).
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)

RETRIES, WAIT = "LONGTRAIL_RETRIES", "LONGTRAIL_RETRY_WAIT"  # set on the task, outside its inputs: they are no part of what it writes
LONGEST_WAIT = 600.0  # seconds
HTTP = {408, 425, 429, 500, 502, 503, 504}
ERRNO = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "EAGAIN", "EBUSY", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT")
}
# By package and class name, of the error or of one it derives from: the packages are not imported to find out.
PASSING = {
    "redis": {"ConnectionError", "TimeoutError", "BusyLoadingError", "TryAgainError", "ClusterDownError", "ReadOnlyError"},
    "botocore": {"ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseStreamingError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "urllib3": {"TimeoutError", "ProtocolError", "NewConnectionError", "MaxRetryError", "IncompleteRead"},
    "aiohttp": {"ClientConnectionError", "ServerTimeoutError", "ClientPayloadError"},
    "longtrail": {"UnreachableError"},
}
LASTING = {"AuthenticationError", "AuthorizationError", "AuthenticationWrongNumberOfArgsError", "SSLError", "InvalidProxyConfigError"}
S3_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
Result = TypeVar("Result")


def attempt(step: Callable[..., Result], *, sleep: Callable[[float], None] = time.sleep, **arguments: Any) -> Result:
    """What `step(**arguments)` returns, tried $LONGTRAIL_RETRIES times more after errors that may pass, with waits that double.

    Steps write their outputs aside and rename them, so trying again begins from nothing half done. Any other error, and the last one, are raised.
    """
    retries, wait = int(os.environ.get(RETRIES, "0")), float(os.environ.get(WAIT, "30"))
    for left in range(retries, 0, -1):
        try:
            return step(**arguments)
        except Exception as error:
            if not may_pass(error):
                raise
            log.warning("%s: %s: trying again in %.0f s, %d more", type(error).__name__, error, wait, left)
            sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
    return step(**arguments)


def may_pass(error: BaseException) -> bool:
    """Whether `error`, or what it was raised because of, is one that the same call might not meet again."""
    links = list(chain(error))
    if any(_names(link) & LASTING for link in links):
        return False
    answers = [status for link in links if (status := _status(link)) is not None]
    return answers[0] in HTTP if answers else any(map(_passing, links))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and what it was raised from or while handling, `from None` included; the reason that urllib keeps aside too."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        link = waiting.pop()
        if isinstance(link, BaseException) and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__, getattr(link, "reason", None)]


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _passing(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in ERRNO):
        return True
    return any(base.__name__ in PASSING.get(base.__module__.partition(".")[0], ()) for base in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries: urllib's `code`, requests' and botocore's `response`. A store's own code counts as 503."""
    code = getattr(error, "code", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        if response.get("Error", {}).get("Code") in S3_CODES:
            return 503
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        code = getattr(response, "status_code", None)
    return code if isinstance(code, int) else None
