"""What the demo page asks for."""

from pydantic import Field

from serving.schemas import MAX_KEY, Key, Request

MAX_K = 20


class ExplainRequest(Request):
    """Whose lists, by which arms."""

    user_id: Key = Field(description="the user's raw key; an unknown one gets the popular list")
    arms: list[Key] = Field(min_length=1, max_length=2, description="names of arms, as /demo/api/setup gives them")
    k: int = Field(10, ge=1, le=MAX_K, description="places of each list")


class UsersRequest(Request):
    """Who to look for."""

    starts: str = Field("", max_length=MAX_KEY, description="the beginning of a user's raw key")
