"""Bearer tokens: who may read lists, send events, read metrics. Without any configured, everybody who reaches the service may do everything.

They come from the environment, never from params.yaml or the Bento: LONGTRAIL_TOKENS_FILE names a file, or LONGTRAIL_TOKENS holds the text itself.
One token a line, `#` starts a comment:

    NAME RIGHTS TOKEN        shop-front read 4fJq…      RIGHTS is one or several of read, events, metrics, with commas

NAME stands in messages and counts against the rate limit; the token never leaves this file: only its hash is kept, and no message holds it.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longtrail.errors import ConfigError

TOKENS, TOKENS_FILE = "LONGTRAIL_TOKENS", "LONGTRAIL_TOKENS_FILE"
RIGHTS = ("read", "events", "metrics")
MIN_LENGTH = 16  # characters; our choice: 16 random ones of base 64 are 96 bits


@dataclass(frozen=True, kw_only=True)
class Client:
    """Whoever holds one token."""

    name: str
    rights: frozenset[str]
    digest: bytes  # SHA-256 of the token


class Tokens:
    """The tokens that are accepted."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = tuple(clients)

    def __bool__(self) -> bool:
        """Whether tokens are asked for at all."""
        return bool(self._clients)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Tokens":
        """Raises ConfigError for a file that cannot be read, and for a line that is not understood (by its number, never by its text)."""
        file, text = environment.get(TOKENS_FILE), environment.get(TOKENS)
        if file and text:
            raise ConfigError(f"{TOKENS_FILE} and {TOKENS} are both set; expected one of them")
        if file:
            try:
                clients = _parse(Path(file).read_text(encoding="utf-8"), file)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{TOKENS_FILE}: {file}: {type(error).__name__}; expected a readable text file of tokens") from None
            if not clients:  # an emptied file must not open the service to everybody
                raise ConfigError(f"{TOKENS_FILE}: {file}: no token; expected lines NAME RIGHTS TOKEN")
            return cls(clients)
        return cls(_parse(text or "", TOKENS))

    def client(self, authorization: bytes) -> Client | None:
        """Whose token a request's Authorization header holds. Every token is compared, each in constant time: the answer's time says nothing."""
        scheme, _, token = authorization.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        found = None
        for client in self._clients:
            if hmac.compare_digest(client.digest, digest):
                found = client
        return found if scheme.lower() == b"bearer" else None


def configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names tokens, readable or not."""
    return bool(environment.get(TOKENS_FILE) or environment.get(TOKENS, "").strip())


def _parse(text: str, where: str) -> list[Client]:
    clients: list[Client] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        at = f"{where}: line {number}"
        if len(words) != 3:
            raise ConfigError(f"{at}: {len(words)} words; expected NAME RIGHTS TOKEN")
        name, rights, token = words
        unknown = set(rights.split(",")) - set(RIGHTS)
        if unknown:
            raise ConfigError(f"{at}: rights of {name!r}: expected some of {', '.join(RIGHTS)}, with commas and no spaces")
        if len(token) < MIN_LENGTH or not token.isascii():
            raise ConfigError(f"{at}: the token of {name!r} is no ASCII text of at least {MIN_LENGTH} characters")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        if any(name == client.name or digest == client.digest for client in clients):
            raise ConfigError(f"{at}: {name!r}: this name or its token stands there twice; expected each once")
        clients.append(Client(name=name, rights=frozenset(rights.split(",")), digest=digest))
    return clients
