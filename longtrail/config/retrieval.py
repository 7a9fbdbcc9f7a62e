"""Settings of how the catalogue is searched."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from longtrail.config.base import Count, Settings


class RetrievalSettings(Settings):
    """What is looked for, and how. Every `kind` gives the same lists: the choice is one of time and memory (docs/retrieval.md)."""

    kind: Literal["auto", "dense", "pqtopk", "recjpq_prune"] = Field(
        "auto",
        description="of models with RecJPQ items; auto: by how many they are. Models with item vectors are searched by dense, whatever stands here",
    )
    exclude_seen: bool = Field(
        True, description="what a person has had to do with is not recommended again; False for what is bought, played or visited again and again"
    )
    list_bytes: Count = Field(500_000_000, description="auto takes recjpq_prune only where its lists, M (M + 4) bytes an item, fit in this")

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.kind != "auto":
            yield "list_bytes", f"kind: {self.kind}"
