"""docs/settings.md, made of the settings classes: `python -m longtrail.config.reference > docs/settings.md`. A test holds the page to it."""

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from longtrail.config.base import Settings
from longtrail.config.shapes import Shape, shape_of
from longtrail.config.slots import WithItems
from longtrail.config.whole import Config

HEAD = """# Settings

What params.yaml may hold, section by section, with bounds, defaults and meanings. It is made of the classes in `longtrail/config/`:
`python -m longtrail.config.reference > docs/settings.md` writes it anew. What is left out has its default; an unknown key is an error.
"""
MODELS = """
## models

By name: letters, digits, `_`, `.` and `-`, the first a letter or a digit. Each has a `stage` and a `kind`; `pipeline.models` says which are run.
"""
WORDS = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
BOUNDS = {annotated_types.Gt: ("gt", "> "), annotated_types.Ge: ("ge", "≥ "), annotated_types.Lt: ("lt", "< "), annotated_types.Le: ("le", "≤ ")}


def page() -> str:
    """The whole page."""
    made: dict[Any, str] = {}  # what has its table, or will have it once the one that names it is done, and under which heading
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        parts += _models(made) if name == "models" else _place(name, shape_of(field.annotation, field.discriminator), 2, made)
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _models(made: dict[Any, str]) -> Iterator[str]:
    """What all trained models of a stage share stands once, before the first of them."""
    yield MODELS
    for told, leaf in shape_of(Config.model_fields["models"].annotation).within("").leaves():
        shared = [one for one in reversed(leaf.annotation.__mro__[1:]) if issubclass(one, WithItems) and one is not WithItems]
        for base in shared:
            if base not in made:
                known = _rows_of(shared[: shared.index(base)])
                yield from _table(f"{told['stage']}: shared by {_heirs(base)}", Shape(base), 3, made, known=known, told=told)
        more = f"Beside it: {', '.join(_link(made[base]) for base in shared)}." if shared else ""
        yield from _table(f"stage: {told['stage']}, kind: {told['kind']}", leaf, 3, made, known=_rows_of(shared), told=told, more=more)


def _heirs(base: type) -> str:
    leaves = shape_of(Config.model_fields["models"].annotation).within("").leaves()
    return ", ".join(told["kind"] for told, leaf in leaves if issubclass(leaf.annotation, base))


def _place(path: str, shape: Shape, level: int, made: dict[Any, str]) -> Iterator[str]:
    """The tables of all classes that may stand at `path`."""
    for told, leaf in shape.leaves():
        yield from _table(_title(path, told), leaf, level, made, told=told)


def _table(
    title: str,
    leaf: Shape,
    level: int,
    made: dict[Any, str],
    *,
    known: frozenset[tuple[str, ...]] = frozenset(),
    told: dict[str, str] | None = None,
    more: str = "",
) -> Iterator[str]:
    """Heading, meaning and settings of one class, less the rows that are `known` and the keys it is `told` by; then what stands in it."""
    made[leaf.annotation] = title
    path = title.partition(",")[0] if ":" not in title.partition(",")[0] else "models.NAME"
    inner, rows = [], []
    for name, row in _rows(leaf).items():
        if row in known or name in (told or {}):
            continue
        element, within = _element(leaf.within(name))
        if element.branches or element.fields:
            place, leaves = f"{path}.{name}{within}", list(element.leaves())
            if leaves[0][1].annotation not in made:
                made |= {one.annotation: _title(place, by) for by, one in leaves}
                inner.append((place, element))
            row = (*row[:-1], "; ".join(cell for cell in (row[-1], _link(made[leaves[0][1].annotation])) if cell))
        rows.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |")
    meaning = " ".join((leaf.annotation.__doc__ or "").split()) if "__doc__" in vars(leaf.annotation) else ""
    lines = [f"{'#' * level} {title}", "", *([meaning, ""] if meaning else []), *([more, ""] if more else [])]
    if rows:
        lines += ["| setting | what it may be | default | meaning |", "|---|---|---|---|", *rows]
    yield "\n".join(lines)
    for place, shape in inner:
        yield from _place(place, shape, 3, made)


def _title(path: str, told: dict[str, str]) -> str:
    return ", ".join([path, *(f"{key}: {word}" for key, word in told.items())])


def _rows_of(classes: list[Any]) -> frozenset[tuple[str, ...]]:
    return frozenset(row for one in classes for row in _rows(Shape(one)).values())


def _rows(shape: Shape) -> dict[str, tuple[str, ...]]:
    """The cells of each setting's line, by its name."""
    return {
        name: (f"`{name}`", _allowed(field.annotation, field.metadata, field.discriminator), _default(field), field.description or "")
        for name, field in shape.fields.items()
    }


def _element(shape: Shape) -> tuple[Shape, str]:
    """What a list or a mapping of settings holds, and how its place is written; anything else is itself."""
    if get_origin(shape.annotation) is dict:
        return shape.within(""), ".NAME"
    return (shape.within(0), "[]") if get_origin(shape.annotation) is tuple else (shape, "")


def _allowed(annotation: Any, metadata: Any = (), key: Any = None) -> str:
    """What a value may be, in words, with its bounds."""
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        found = [fact for one in more for fact in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _allowed(annotation, [*found, *metadata], key or next((one.discriminator for one in more if isinstance(one, FieldInfo)), None))
    shape, arguments = shape_of(annotation, key), get_args(annotation)
    if get_origin(annotation) in (Union, UnionType) and (NoneType in arguments or not shape.branches):
        words = [_allowed(one, metadata, key) for one in arguments if one is not NoneType]
        return " or ".join([*words, *(["`null`"] if NoneType in arguments else [])])
    if shape.branches:
        return "a mapping with " + " or ".join(f"`{key}: {word}`" for word in shape.branches)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "a mapping"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if get_origin(annotation) is dict:
        return f"a mapping; each value: {_allowed(arguments[1])}"
    if get_origin(annotation) is tuple:
        least = "".join(f", {fact.min_length} at least" for fact in metadata if isinstance(fact, annotated_types.MinLen))
        return f"list{least}; each: {_allowed(arguments[0])}" if Ellipsis in arguments else f"list of {' and '.join(map(_allowed, arguments))}"
    return " ".join([WORDS[annotation], *([limits] if (limits := _limits(metadata)) else [])])


def _limits(metadata: Any) -> str:
    bounds = [f"{sign}{_number(getattr(fact, name))}" for fact in metadata for kind, (name, sign) in BOUNDS.items() if isinstance(fact, kind)]
    longest = [f"of {fact.max_length} characters at most" for fact in metadata if isinstance(fact, annotated_types.MaxLen)]
    patterns = [f"like `{pattern}`" for fact in metadata if (pattern := getattr(fact, "pattern", None))]
    return ", ".join(dict.fromkeys([*bounds, *longest, *patterns]))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    """As it would be written in params.yaml; of settings, what differs from their own defaults."""
    if field.is_required():
        return "none: it must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        told = {key: getattr(value, key) for key in ("kind",) if field.discriminator == key}
        value = told | value.model_dump(mode="json", exclude_defaults=True)
        if not value:
            return "as below"
    elif isinstance(value, tuple):
        value = list(value)
    return f"`{yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix('...' + chr(10)).strip()}`"


def _link(title: str) -> str:
    """To a heading of this page, by the anchor that GitHub gives it."""
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


if __name__ == "__main__":
    print(page(), end="")
