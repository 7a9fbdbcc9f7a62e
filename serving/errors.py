"""What the service cannot do for a request, and whose fault it is."""

from longtrail.errors import LongtrailError


class RequestError(LongtrailError):
    """The client's fault (HTTP 4xx). `field` is a path such as `candidates[3]`; `message` says what was expected there."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Unavailable(LongtrailError):  # noqa: N818  (a state of affairs; every caller answers it with a list)
    """Something a personal list needs does not answer. `reason` is short and of few values: it stands in the answer, the log and the metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotNow(LongtrailError):  # noqa: N818  (a state of affairs that passes)
    """The service cannot take this now (HTTP 503, 507). `retry_after` is when to try again, in seconds."""

    def __init__(self, status: int, field: str, message: str, *, retry_after: int) -> None:
        super().__init__(f"{field}: {message}")
        self.status = status
        self.field = field
        self.message = message
        self.retry_after = retry_after
