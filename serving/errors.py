"""A request that cannot be answered: what field, what is wrong with it, what was expected."""

from longtrail.errors import LongtrailError


class RequestError(LongtrailError):
    """The client's fault (HTTP 4xx). `field` is a path such as `candidates[3]`; `message` says what was expected there."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
