"""Whether a service shows the demo: it reads people's histories, so nobody should find it on by accident."""

from collections.abc import Mapping
from typing import Literal

DEMO_VARIABLE = "LONGTRAIL_DEMO"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def shown(setting: bool | Literal["auto"], environment: Mapping[str, str], *, tokens: bool) -> bool:
    """`setting` is serving.demo. "auto": where serving.run says that nobody but this machine can reach the service, and no tokens are configured."""
    if setting == "auto":
        return environment.get(DEMO_VARIABLE) == "1" and not tokens
    return setting


def own_machine(host: str) -> str:
    """What serving.run tells the service in DEMO_VARIABLE about the address it listens on."""
    return "1" if host in _LOOPBACK else "0"
