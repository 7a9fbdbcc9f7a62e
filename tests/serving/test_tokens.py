"""Who a token is, and what a token file may not do: be empty, be half understood, or tell its secrets."""

from pathlib import Path

import pytest

from longtrail.errors import ConfigError
from serving.tokens import TOKENS, TOKENS_FILE, Tokens, configured

SECRET, OTHER = "s3cret-of-the-shop", "0123456789abcdef"
TEXT = f"""# who may do what
shop  read          {SECRET}
apps  read,events   {OTHER}   # both
"""


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"Bearer {SECRET}", "shop"),
        (f"bearer  {OTHER} ", "apps"),
        (f"Basic {SECRET}", None),
        (SECRET, None),
        (f"Bearer {SECRET}x", None),
        (f"Bearer {SECRET[:-1]}", None),
        ("Bearer ", None),
        ("", None),
        ("Bearer shop", None),
    ],
)
def test_whose_token(header: str, name: str | None) -> None:
    client = Tokens.from_environment({TOKENS: TEXT}).client(header.encode())
    assert (client.name if client else None) == name


def test_rights() -> None:
    tokens = Tokens.from_environment({TOKENS: TEXT})
    assert tokens.client(f"Bearer {SECRET}".encode()).rights == {"read"}  # type: ignore[union-attr]
    assert tokens.client(f"Bearer {OTHER}".encode()).rights == {"read", "events"}  # type: ignore[union-attr]


def test_without_any_nobody_is_asked() -> None:
    for environment in ({}, {TOKENS: ""}, {TOKENS: " # none\n"}):
        assert not Tokens.from_environment(environment)
    assert not configured({}) and configured({TOKENS: TEXT}) and configured({TOKENS_FILE: "/nowhere"})


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TEXT)
    assert Tokens.from_environment({TOKENS_FILE: str(file)}).client(f"Bearer {SECRET}".encode())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"shop {SECRET}", "line 1: 2 words"),
        (f"\nshop write {SECRET}", "line 2: rights of 'shop'"),
        ("shop read short", "at least 16 characters"),
        (f"shop read {SECRET}\nshop read {OTHER}", "line 2: 'shop'"),
        (f"shop read {SECRET}\napps read {SECRET}", "line 2: 'apps'"),
        ("shop read pässwörter-sind-lang", "ASCII"),
    ],
)
def test_what_is_not_understood_is_named_and_never_shown(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        Tokens.from_environment({TOKENS: text})
    assert not any(secret in str(raised.value) for secret in (SECRET, OTHER, "short ", "pässwörter"))


def test_a_file_that_is_gone_or_empty_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# later\n")
    for file, says in ((tmp_path / "gone", "FileNotFoundError"), (tmp_path / "empty", "no token"), (tmp_path, "IsADirectoryError")):
        with pytest.raises(ConfigError, match=says):
            Tokens.from_environment({TOKENS_FILE: str(file)})
    with pytest.raises(ConfigError, match="both set"):
        Tokens.from_environment({TOKENS_FILE: "x", TOKENS: TEXT})


def test_the_secret_is_not_kept() -> None:
    tokens = Tokens.from_environment({TOKENS: TEXT})
    assert SECRET not in repr(vars(tokens)) and SECRET not in repr(tokens.client(f"Bearer {SECRET}".encode()))
