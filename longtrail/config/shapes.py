"""What may stand where in a settings file, read off the settings classes: which of several classes, and which keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from longtrail.config.base import Settings


@dataclass(frozen=True)
class Shape:
    """One place: the type of what may stand there, without null, and for a choice of classes the key that tells which (`kind`, `stage`)."""

    annotation: Any
    key: str | None = None

    @cached_property
    def branches(self) -> dict[str, "Shape"]:
        """What a choice of classes chooses from, by the words that `key` may have; else empty."""
        if self.key is None:
            return {}
        members = [shape_of(member) for member in get_args(self.annotation)]
        return {word: member for member in members for word in member.words(self.key)}

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The keys of a settings class; else empty."""
        return self.annotation.model_fields if isinstance(self.annotation, type) and issubclass(self.annotation, Settings) else {}

    @property
    def is_plain_union(self) -> bool:
        """Whether several types may stand there and no key tells which: true, false or auto."""
        return self.key is None and get_origin(self.annotation) in (Union, UnionType)

    def words(self, key: str) -> tuple[str, ...]:
        """What `key` may be in this class, or in those that this is a choice of."""
        if key in self.fields:
            return get_args(self.fields[key].annotation)
        return tuple(dict.fromkeys(word for branch in self.branches.values() for word in branch.words(key)))

    def leaves(self) -> Iterator[tuple[dict[str, str], "Shape"]]:
        """Every class of a choice within choices, with the keys that tell it: {stage: ranking, kind: sam}."""
        if self.key is None:
            yield {}, self
        for word, branch in self.branches.items():
            for told, leaf in branch.leaves():
                yield {str(self.key): word, **told}, leaf

    def within(self, part: int | str) -> "Shape":
        """The place of a key, or of an element, in this one; nothing is known of what stands in anything else."""
        arguments = get_args(self.annotation)
        if part in self.fields:
            return shape_of(self.fields[str(part)].annotation, self.fields[str(part)].discriminator)
        if get_origin(self.annotation) is dict:
            return shape_of(arguments[1])
        if get_origin(self.annotation) is tuple:
            return shape_of(arguments[0] if Ellipsis in arguments else arguments[int(part)])
        return Shape(None)


def shape_of(annotation: Any, key: Any = None) -> Shape:
    """The place that a type describes; `key` is the discriminator, where the type's field has it."""
    if get_origin(annotation) is Annotated:
        bare, *more = get_args(annotation)
        found = [fact.discriminator for fact in more if isinstance(fact, FieldInfo) and fact.discriminator]
        return shape_of(bare, found[0] if found else key)
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        if len(members) == 1:
            return shape_of(members[0], key)
    return Shape(annotation, key)
